"""Which method is best on PneumoniaMNIST with vit-mini: from scratch, and adapting a vit-mini trained on the digits.

    python -m benchmarks.vision_quality --data ../shared/data/pneumoniamnist.npz --out runs/vision-quality
                                        [--epochs 3] [--seeds 0 1 2]

Every method gets the same epochs and seeds, and the best rate of the same small grid; the rate is chosen by validation
AUC on the first seed, so that the other seeds cost one run each. Runs that exist are not repeated: stopped, the same
command goes on. Adapting starts from one full training on the digits (``lowrank export`` of it); the head is new, what
was loaded is frozen but for ``full`` and the projected methods.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import save
from lowrank.evaluate.export import export
from lowrank.infra.log import read_log
from lowrank.recipes.vit import vit_mini
from lowrank.run.overrides import fingerprint, override, resolve
from lowrank.run.run import Run
from lowrank.run.validation import validate
from lowrank.train.loop import train

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RANKS = (8, 1, 2, 4, 16, 32, 64)  # the first looks for the rate of all
PATCH = 7  # 16 tokens an image instead of 49: three times as fast
GALORE = {"method.rank": 16, "method.refresh_every": 50}


@dataclass(frozen=True)
class Variant:
    """A row of the study: a method with settings.

    ``rate_of`` is the row whose learning rate it takes; by default its own is searched for.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate_of: str | None = None


def variants() -> list[Variant]:
    everywhere = {"method.target_modules": "all-linear"}
    loras = [
        Variant(f"lora, rank {r}", "lora", {"method.rank": r, **everywhere}, None if r == RANKS[0] else "lora, rank 8")
        for r in RANKS
    ]
    return [
        Variant("linear probe", "linear_probe"),
        Variant("full", "full"),
        *loras,
        Variant("dora, rank 8", "dora", {"method.rank": 8, **everywhere}),
        Variant("galore, rank 16", "galore", GALORE),
        Variant("lte, 4 heads of rank 4", "lte", {"method.rank": 4, "method.heads": 4, **everywhere}),
        Variant("lte_galore, mixed", "lte_galore", {"method.kind": "mixed"}),
        Variant("lte_galore, explorers", "lte_galore", {"method.kind": "explorers"}),
    ]


def run_of(variant: Variant, data: str, epochs: float, seed: int, lr: float, start: Path | None) -> Run:
    """One run of the study, resolved and checked."""
    changes: dict[str, object] = {"data": data, "epochs": epochs, "device": "cpu", "method": variant.method}
    changes["model.patch_size"] = PATCH
    if start is not None:
        changes["model.weights"] = str(start)
    run = override(override(vit_mini(), changes), {**variant.settings, "seed": seed, "lr": lr, "log_every": 10})
    run = resolve(run)
    validate(run)
    return run


def trained(run: Run, folder: Path) -> dict[str, Any]:
    """The summary of a run, trained where it is not complete: anew, as it takes seconds."""
    place = folder / fingerprint(run)[:16]
    if not complete(place):
        shutil.rmtree(place, ignore_errors=True)
        train(run, place, quiet=True)
    found: dict[str, Any] = json.loads((place / "summary.json").read_text())
    found["val_auc by epoch"] = [r["val_auc"] for r in read_log(place / "log.jsonl") if "val_auc" in r]
    return found


def complete(place: Path) -> bool:
    """Whether the folder holds a run that came to its end."""
    summary = place / "summary.json"
    return summary.is_file() and not json.loads(summary.read_text())["interrupted"]


def on_digits(out: Path, epochs: float) -> Path:
    """The weights of a vit-mini trained in full on the digits."""
    plain = out / "digits-plain"
    if not (plain / "model.safetensors").is_file():
        run = resolve(override(vit_mini(), {"epochs": epochs, "device": "cpu", "model.patch_size": PATCH}))
        trained(run, out / "digits")
        export(out / "digits" / fingerprint(run)[:16], plain)
    return plain


def study(asked: argparse.Namespace, name: str, start: Path | None) -> list[dict[str, Any]]:
    """The rows of one half of the study: the grid on the first seed, then the best rate on the others."""
    rows: list[dict[str, Any]] = []
    rates: dict[str, float] = {}
    for variant in chosen(asked.only):

        def result(seed: int, lr: float, variant: Variant = variant) -> dict[str, Any]:
            return trained(run_of(variant, asked.data, asked.epochs, seed, lr, start), asked.out / name)

        first = {lr: result(asked.seeds[0], lr) for lr in _rates(variant, rates)}
        best = max(first, key=lambda lr: first[lr]["best_val_auc"] or 0.0)
        rates[variant.name] = best
        rows.append(_row(variant.name, best, [first[best], *(result(seed, best) for seed in asked.seeds[1:])]))
        print(name, rows[-1], flush=True)
    return rows


def chosen(only: Sequence[str]) -> list[Variant]:
    """All variants, or those of the methods in ``only``."""
    return [variant for variant in variants() if not only or variant.method in only]


def _rates(variant: Variant, found: Mapping[str, float]) -> Sequence[float]:
    return GRID if variant.rate_of is None else (found[variant.rate_of],)


def _row(name: str, lr: float, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    spread = {
        key: [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]
        for key in ("test_auc", "test_acc", "test_balanced_accuracy", "best_val_auc")
        if (values := [summary[key] for summary in summaries])
    }
    by_epoch = [statistics.mean(values) for values in zip(*(s["val_auc by epoch"] for s in summaries), strict=True)]
    kept = {key: summaries[0][key] for key in ("parameters_trained", "parameters_total", "state_bytes")}
    peak = max(summary["peak_bytes"] for summary in summaries)
    seconds = max(summary["step_seconds"] * summary["steps"] for summary in summaries)
    spread["val_auc by epoch"] = [round(value, 4) for value in by_epoch]
    return {"method": name, "lr": lr, **spread, **kept, "peak_bytes": peak, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/vision-quality"))
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--digits-epochs", type=float, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=[], help="these methods alone")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    scratch = study(asked, "scratch", None)
    adapted = study(asked, "adapted", on_digits(asked.out, asked.digits_epochs))
    told = {
        "epochs": asked.epochs,
        "seeds": asked.seeds,
        "grid": GRID,
        "patch": PATCH,
        "figures": "[mean, standard deviation] over the seeds",
    }
    print("written to", save("vision-quality", {**told, "from scratch": scratch, "from the digits": adapted}).name)


if __name__ == "__main__":
    main()
