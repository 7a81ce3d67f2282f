"""What composes with what: every pair of a method's family and an option, and of two options, tried on a tiny model.

    python -m benchmarks.composition           tries all, writes results/composition_….json and docs/composition.md
    python -m benchmarks.composition --page    the page anew from the results, nothing is tried

A pair is tried by training three steps through the ordinary loop (a GPT of two layers on bytes): it trains, or it is
refused before anything is done, and the refusal's first sentence stands under the table. On two ranks (gloo) three
families are tried, by torchrun.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, save
from lowrank.infra.files import write_text_atomically
from lowrank.recipes import find
from lowrank.report.table import markdown_table
from lowrank.run.overrides import override, resolve
from lowrank.run.validation import validate
from lowrank.train.loop import train

PAGE = Path(__file__).resolve().parents[1] / "docs" / "composition.md"
TINY: dict[str, Any] = {
    **{"model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16, "data.context": 16, "data.tokenizer": "bytes"},
    **{"steps": 3, "batch_size": 4, "warmup": 0, "eval_every": "never", "checkpoint_every": 3, "device": "cpu"},
    "max_grad_norm": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "full": {},
    "full_8bit": {},
    "muon": {},
    "lora": {"method.rank": 2},
    "lte": {"method.rank": 2, "method.heads": 2, "method.merge_every": 2},
    "relora": {"method.rank": 2, "method.merge_every": 2},
    "galore": {"method.rank": 4, "method.refresh_every": 2},
    "galore_8bit": {"method.rank": 4, "method.refresh_every": 2},
    "apollo": {"method.rank": 4, "method.refresh_every": 2},
    "diloco": {"method.heads": 2, "method.merge_every": 2},
    "lte_galore": {"method.rank": 2, "method.heads": 2, "method.merge_every": 2, "method.galore_rank": 4},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "`--per-layer`": {"per_layer": True},
    "`--grad-accum 2`": {"grad_accum": 2},
    "`--max-grad-norm 1`": {"max_grad_norm": 1.0},
    "`--clip-per-layer 1`": {"clip_per_layer": 1.0},
    "`--precision bf16`": {"precision": "bf16"},
    "`--precision bf16-weights`": {"precision": "bf16-weights"},
    "`--precision fp16`": {"precision": "fp16"},
    "`--checkpoint-activations`": {"checkpoint_activations": True},
    "`--compile`": {"compile": True},
}
RANKED = ("full", "galore", "lte")
ENGINES: dict[str, dict[str, Any]] = {
    "`--engine ddp`": {"engine": "ddp"},
    "`--engine fsdp`": {"engine": "fsdp"},
}
WITH_RANKS = ("", "`--per-layer`", "`--grad-accum 2`", "`--max-grad-norm 1`", "`--precision bf16`")


def tried(changes: Mapping[str, Any]) -> str:
    """ "" where the settings train three steps; the refusal's text where they are refused."""
    run = resolve(override(replace(find("gpt-mini"), per_method={}), {**TINY, **changes}))
    try:
        validate(run)
        with tempfile.TemporaryDirectory() as folder:
            train(run, Path(folder) / "run", quiet=True)
    except ValueError as error:
        return " ".join(str(error).split())
    finally:
        torch.compiler.reset()
    return ""


def tried_on_ranks(changes: Mapping[str, Any]) -> str:
    """As ``tried``, on two ranks."""
    words = [f"--{name.replace('_', '-')}={'none' if v is None else v}" for name, v in {**TINY, **changes}.items()]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29511"]
        told = subprocess.run(
            [*command, "-m", "lowrank", "train", "gpt-mini", *words, "--quiet", "--out", f"{folder}/run"],
            capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if told.returncode == 0:
        return ""
    said = re.findall(r"^lowrank: (.*)$", told.stderr, re.M)
    assert said, told.stderr
    return " ".join(said[0].split())


def everything() -> dict[str, Any]:
    methods = {
        method: {name: tried({"method": method, **own, **option}) for name, option in OPTIONS.items()}
        for method, own in FAMILIES.items()
    }
    names = list(OPTIONS)
    base = {"method": "galore", **FAMILIES["galore"]}
    options = {
        first: {second: tried({**base, **OPTIONS[first], **OPTIONS[second]}) for second in names[i + 1 :]}
        for i, first in enumerate(names)
        if not set(OPTIONS[first]) & {"compile"}
    }
    for first, row in options.items():  # two precisions are one option twice
        options[first] = {s: told for s, told in row.items() if not set(OPTIONS[first]) & set(OPTIONS[s])}
    ranks = {
        method: {
            f"{engine} {name}".replace("` `", " ").strip(): tried_on_ranks(
                {"method": method, **FAMILIES[method], **how, **OPTIONS.get(name, {})}
            )
            for engine, how in ENGINES.items()
            for name in WITH_RANKS
        }
        for method in RANKED
    }
    return {"methods": methods, "options": options, "ranks": ranks}


def newest() -> Path:
    return max(RESULTS.glob("composition_*.json"), key=lambda file: file.name.rpartition("_")[2])


def page(found: Mapping[str, Any]) -> str:
    """docs/composition.md: a table a kind, the refusals as numbered notes."""
    notes: dict[str, int] = {}

    def cell(told: str | None) -> str:
        if told is None:
            return ""
        return "yes" if not told else f"no ({notes.setdefault(told, len(notes) + 1)})"

    def table(rows: Mapping[str, Mapping[str, str]], what: str) -> str:
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        return markdown_table(
            [what, *columns], [[name.strip("`"), *(cell(row.get(c)) for c in columns)] for name, row in rows.items()]
        )

    parts = [
        "# What composes with what",
        "Generated by `python -m benchmarks.composition`: each pair trained three steps of a tiny GPT through the "
        "ordinary loop, on a CPU; not to be edited. A *no* is refused before any work, in the words of its note.",
        "## A method and an option",
        table(found["methods"], "method"),
        "## Two options, under `galore`",
        table(found["options"], "option"),
        "## Two ranks",
        "By torchrun, gloo; `--engine ddp` keeps whole weights on each rank, `fsdp` (FSDP2) a share.",
        table(found["ranks"], "method"),
        "## The notes",
        "\n".join(f"{number}. {told}" for told, number in notes.items()),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    if "--page" not in sys.argv:
        print(save("composition", everything()))
    write_text_atomically(PAGE, page(json.loads(newest().read_text())))
    print(PAGE)


if __name__ == "__main__":
    main()
