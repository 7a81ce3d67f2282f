"""What fewer bytes cost: the validation loss of each way to talk against DDP's, at equal steps and tokens.

    python -m benchmarks.traffic_loss --data ../shared/data/cnn_dailymail_sample.csv

`gpt-mini`, 200 steps on two ranks of this machine (gloo, loopback, a core each), several seeds, every method at its
recipe's learning rate. Runs that exist in the folder are not repeated. Bytes are those that a rank has sent in training
(counted, evaluation and checkpoints included), beside what DDP's gradients would have been.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import save
from benchmarks.traffic import launch
from lowrank.report.table import text_table

STEPS = 200
ALL = {"method": "lte", "method.target_modules": "all-linear", "method.rest_every": 100}
VARIANTS: dict[str, dict[str, object]] = {
    "DDP": {"method": "full"},
    "LTE on attention": {"method": "lte", "method.target_modules": "attention"},
    "LTE on attention, int8": {"method": "lte", "method.target_modules": "attention", "method.exchange": "int8"},
    "LTE on all linear layers": {"method": "lte", "method.target_modules": "all-linear"},
    "… rest every 100": ALL,
    "… rest every 100, bfloat16": {**ALL, "method.exchange": "bfloat16"},
    "… rest every 100, int8": {**ALL, "method.exchange": "int8"},
    "… rest every 100, overlap": {**ALL, "method.overlap": "true"},
    "… rest every 100, outer 0.7, 0.9": {**ALL, "method.outer_lr": 0.7, "method.outer_momentum": 0.9},
}


def run(name: str, seed: int, data: str, out: Path) -> dict[str, Any]:
    """One run's summary; trained if it has not been."""
    folder = out / f"{list(VARIANTS).index(name)}-{seed}"
    if not (folder / "summary.json").exists():
        settings = {**VARIANTS[name], "data": data, "steps": STEPS, "seed": seed, "checkpoint-every": STEPS}
        launch([f"--{key}={value}" for key, value in settings.items()], folder)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def row(name: str, runs: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    losses = [each["val_loss"] for each in runs]
    sent = statistics.fmean(each["bytes_sent"] for each in runs) / STEPS
    return {
        "variant": name,
        "options": VARIANTS[name],
        "losses by seed": dict(zip(map(str, seeds), losses, strict=True)),
        "mean": statistics.fmean(losses),
        "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
        "bytes sent a step": sent,
        "times fewer than DDP": runs[0]["ddp_bytes_per_step"] / sent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/traffic-loss"))
    parser.add_argument("--only", choices=VARIANTS, help="train this one, and write no result")
    given = parser.parse_args()
    if given.only:
        for seed in given.seeds:
            run(given.only, seed, given.data, given.out)
        return
    rows = [
        row(name, [run(name, seed, given.data, given.out) for seed in given.seeds], given.seeds) for name in VARIANTS
    ]
    base = rows[0]["mean"]
    body = [
        [r["variant"], f"{r['mean']:.4f}", f"{r['mean'] - base:+.4f}", f"{r['times fewer than DDP']:.1f}"] for r in rows
    ]
    print(text_table(["two ranks", "val loss", "against DDP", "fewer bytes"], body))
    result = {"recipe": "gpt-mini", "data": Path(given.data).name, "steps": STEPS, "ranks": 2, "rows": rows}
    print(f"written to {save('traffic-loss', result).name}")


if __name__ == "__main__":
    main()
