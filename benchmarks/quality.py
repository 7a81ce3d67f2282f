"""Where the methods end at equal steps, over several seeds, each at the best of the same few learning rates.

    python -m benchmarks.quality gpt --data ../shared/data/cnn_dailymail_sample.csv
    python -m benchmarks.quality llama --data ../shared/data/cnn_dailymail_sample.csv

The rate is chosen on the first seed and then held for the others. Runs that exist in the folder already are not
repeated, so an interrupted study goes on where it stopped. The result names seeds, rates, losses one by one, and what
each method trained and kept.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import newest, save
from lowrank.recipes import find
from lowrank.report.runs import find_results
from lowrank.report.table import text_table
from lowrank.report.variants import Variant, execute, parse_variant, planned
from lowrank.run.overrides import override, resolve
from lowrank.run.session import open_session
from lowrank.train.loop import train


@dataclass(frozen=True, kw_only=True)
class Study:
    """A recipe, how long, which methods, which learning rates."""

    recipe: str
    steps: int
    methods: tuple[str, ...]
    rates: tuple[float, ...]


STUDIES = {
    "gpt": Study(
        recipe="gpt-mini",
        steps=200,
        methods=(
            "full",
            "frozen:target_modules=all-linear",
            "lora",
            "multihead_lora",
            "lte:merge_every=1",
            "lte:merge_every=10",
            "relora",
        ),
        rates=(5e-4, 1e-3, 3e-3, 1e-2),
    ),
    "llama": Study(
        recipe="llama-mini",
        steps=150,
        methods=(
            "full",
            "frozen",
            "galore",
            "galore:basis=svd",
            "galore:transport=rotate",
            "galore:transport=reset",
            "galore_8bit",
            "apollo",
            "apollo_mini",
            "fira",
            "lora",
            "relora:merge_every=50",
            "lte",
            "lte_galore",
            "lte_galore:kind=explorers",
        ),
        rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ),
}


def run_study(study: Study, data: str, seeds: Sequence[int], out: Path) -> list[dict[str, Any]]:
    """Every variant at its best rate: a row each."""
    base, changes = find(study.recipe), {"data": data, "steps": study.steps}
    rows = []
    for text in study.methods:
        variant = parse_variant(text)
        tried = {rate: _loss(base, variant, changes, [seeds[0]], rate, out)[0] for rate in study.rates}
        best = min(tried, key=lambda rate: tried[rate]["val_loss"])
        others = _loss(base, variant, changes, list(seeds[1:]), best, out) if len(seeds) > 1 else []
        rows.append(_row(text, best, tried, [tried[best], *others], seeds))
    return rows


def _loss(
    base: Any, variant: Variant, changes: dict[str, Any], seeds: list[int], rate: float, out: Path
) -> list[dict[str, Any]]:
    """Summaries of one variant at one rate, a seed each; a run that diverged has an infinite loss."""
    runs = planned(base, [variant], seeds=seeds, rates=[rate], changes=changes)
    outcomes = execute(runs, out, lambda run, folder, resume: train(run, folder, resume=resume, quiet=True))
    found = []
    for outcome in outcomes:
        failed = outcome.error is not None
        summary: dict[str, Any] = {} if failed else dict(find_results([outcome.folder])[0].summary)
        found.append({**summary, "val_loss": float("inf")} if failed or summary["val_loss"] is None else summary)
    return found


def _row(
    name: str, rate: float, tried: dict[float, dict[str, Any]], runs: list[dict[str, Any]], seeds: Sequence[int]
) -> dict[str, Any]:
    losses = [run["val_loss"] for run in runs]
    return {
        "method": name,
        "lr": rate,
        "losses over the rates, first seed": {f"{r:g}": round(s["val_loss"], 4) for r, s in tried.items()},
        "losses by seed": {str(seed): round(loss, 4) for seed, loss in zip(seeds, losses, strict=True)},
        "mean": statistics.fmean(losses),
        "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
        "parameters_trained": runs[0]["parameters_trained"],
        "state_bytes": runs[0]["state_bytes"],
        "kept_bytes": runs[0]["kept_bytes"],
    }


def unigram_entropy(study: Study, data: str) -> float:
    """The loss, in nats a token, of a model that knows how frequent each token is and nothing else."""
    session = open_session(resolve(override(find(study.recipe), {"data": data})))
    return session.data.tokens.unigram_entropy("val")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, help="folder of the runs (default runs/quality-STUDY)")
    parser.add_argument("--only", nargs="+", help="measure these alone; the other rows of the newest result stay")
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = STUDIES[given.study]
    others = []
    if given.only:
        others = [row for row in newest(f"quality-{given.study}")["rows"] if row["method"] not in given.only]
        study = replace(study, methods=tuple(given.only))
    out = given.out or Path(f"runs/quality-{given.study}")
    measured = {row["method"]: row for row in [*others, *run_study(study, given.data, given.seeds, out)]}
    order = [name for name in STUDIES[given.study].methods if name in measured]
    rows = [measured[name] for name in order]
    entropy = unigram_entropy(study, given.data)
    header = ["method", "lr", "val loss", "±", "trained", "state MB"]
    body = [
        [
            row["method"],
            f"{row['lr']:g}",
            f"{row['mean']:.4f}",
            "" if row["deviation"] is None else f"{row['deviation']:.4f}",
            f"{row['parameters_trained']:,}",
            f"{row['state_bytes'] / 1e6:.2f}",
        ]
        for row in rows
    ]
    print(text_table(header, body))
    result = {
        "study": given.study,
        "data": Path(given.data).name,
        "recipe": study.recipe,
        "steps": study.steps,
        "seeds": given.seeds,
        "unigram entropy of the validation tokens, nats": entropy,
        "rows": rows,
    }
    print(f"unigram entropy {entropy:.4f}; written to {save(f'quality-{given.study}', result).name}")


if __name__ == "__main__":
    main()
