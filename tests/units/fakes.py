"""A small catalogue and a training function that trains nothing, for testing what stands around the loop."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lowrank.infra.log import Log
from lowrank.run.overrides import Catalogue
from lowrank.run.run import Call, Run


def full(*, rest: Literal["train", "freeze"] = "train") -> None: ...


def lora(
    target_modules: str | Sequence[str] = ("q", "v"),
    *,
    rank: int = 8,
    alpha: float | None = None,
    rule: type | None = None,
) -> None:
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")


def lte(*, rank: int = 4, heads: int = 4, merge_every: int = 10, keep: bool = True) -> None: ...


def gpt(data: object, *, n_layer: int = 4, context: int | Literal["auto"] = "auto") -> None: ...


def text(source: str = "builtin", *, tokenizer: str | None = None, context: int = 128) -> None: ...


OFFER = Catalogue(model={"gpt": gpt}, data={"text": text}, method={"full": full, "lora": lora, "lte": lte})


def a_run(**changes) -> Run:
    settings = {
        "recipe": "tiny",
        "task": "text",
        "model": Call(name="gpt", args={"n_layer": 2}),
        "data": Call(name="text", args={"tokenizer": "bytes"}),
        "method": Call(name="full"),
        "steps": 40,
        "eval_every": 10,
        "per_method": {"*": {"lr": 1e-3}, "lora": {"lr": 3e-3, "method.rank": 16}},
    }
    return Run(**(settings | changes))


class FakeTrain:
    """Writes what training writes, with a loss that depends on the run; counts its calls, and fails where told."""

    def __init__(self, *, failing: str = "", interrupting: str = ""):
        self.failing, self.interrupting = failing, interrupting
        self.calls: list[tuple[Run, Path, bool]] = []

    def __call__(self, run: Run, out: Path, *, resume: bool = False) -> dict:
        self.calls.append((run, out, resume))
        out.mkdir(parents=True, exist_ok=True)
        run.write(out / "run.json")
        if run.method.name == self.failing:
            raise RuntimeError("it went wrong")
        level = {"full": 2.0, "lora": 2.4, "lte": 2.2}[run.method.name] + 0.01 * run.seed + abs(math.log(run.lr / 1e-3))
        with Log(out / "log.jsonl", after=0 if resume else None) as log:
            for step in range(1, run.steps + 1):
                log.write({"step": step, "loss": level + 3 / step, "step_seconds": 0.1, "tokens_per_second": 2.9e4})
                if step % run.eval_every == 0:
                    log.write({"step": step, "val_loss": level + 2 / step})
        summary = {
            "method": run.method.name,
            "recipe": run.recipe,
            "seed": run.seed,
            "steps": run.steps,
            "interrupted": run.method.name == self.interrupting,
            "val_loss": level,
            "best_val_loss": level,
            "val_accuracy": 0.5,
            "val_tokens": 1000,
            "parameters_trained": 850_000,
            "parameters_total": 900_000,
            "state_bytes": 6_800_000,
            "step_seconds": 0.07,
            "tokens_per_second": 29_000.0,
            "peak_bytes": 612_000_000,
        }
        (out / "summary.json").write_text(json.dumps(summary))
        return summary
