"""What fewer bytes cost: the validation loss of each way to talk against DDP's, at equal steps and tokens.

    python -m benchmarks.traffic_loss --data ../shared/data/cnn_dailymail_sample.csv
    python -m benchmarks.traffic_loss --data ../shared/data/cnn_dailymail_sample.csv --table exchange
    python -m benchmarks.traffic_loss --data ../shared/data/cnn_dailymail_sample.csv --table diloco

`gpt-mini`, 200 steps on two ranks of this machine (gloo, loopback, a core each), several seeds, every method at its
recipe's learning rate. Runs that exist in the folder are not repeated. Bytes are those that a rank has sent in training
(counted, evaluation and checkpoints included), beside what DDP's gradients would have been; in the table ``exchange``,
where only what travels differs, those of the steps alone, which merges and averages are, and the most at one step; its
model has two layers 64 wide, an outer optimizer at MuLoCo's rates, and a rest that is averaged every 20 steps. In the
table ``diloco`` the same model is trained as whole local copies with an outer step (DiLoCo, MuLoCo), a worker a rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import save
from benchmarks.traffic import launch
from lowrank.infra.progress import short_bytes
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
TINY = {"model.n_layer": 2, "model.n_embd": 64, "model.n_head": 2, "data.context": 64, "eval-every": STEPS}
OUTER = {**ALL, **TINY, "method.rest_every": 20, "method.outer_lr": 0.7, "method.outer_momentum": 0.5}
EXCHANGES: dict[str, dict[str, object]] = {
    **{each: {**OUTER, "method.exchange": each} for each in ("float32", "int8", "2bit", "topk3", "topk1")},
    "2bit, 4 fragments": {**OUTER, "method.exchange": "2bit", "method.fragments": 4},
    "float32, 4 fragments": {**OUTER, "method.fragments": 4},
}
DILOCO = {**TINY, "method": "diloco", "method.heads": 2, "method.merge_every": 20}
MULOCO = {**DILOCO, "method.inner": "muon", "lr": 3e-2}
DILOCOS: dict[str, dict[str, object]] = {
    "DDP": {**TINY, "method": "full"},
    "DDP, Muon": {**TINY, "method": "muon", "lr": 3e-2},
    "DiLoCo": DILOCO,
    "DiLoCo, Muon inside": MULOCO,
    **{f"DiLoCo, Muon inside, {each}": {**MULOCO, "method.exchange": each} for each in ("int8", "2bit", "topk3")},
}
TABLES = {"traffic-loss": VARIANTS, "exchange": EXCHANGES, "diloco": DILOCOS}


def run(table: str, name: str, seed: int, data: str, out: Path) -> dict[str, Any]:
    """One run's summary, and what each of its steps sent; trained if it has not been."""
    variants = TABLES[table]
    folder = out / table / f"{list(variants).index(name)}-{seed}"
    if not (folder / "summary.json").exists():
        settings = {**variants[name], "data": data, "steps": STEPS, "seed": seed, "checkpoint-every": STEPS}
        launch([f"--{key}={value}" for key, value in settings.items()], folder)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {**summary, "steps_sent": [record.get("bytes_sent", 0) for record in log if "loss" in record]}


def row(table: str, name: str, runs: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    losses = [each["val_loss"] for each in runs]
    whole = table == "traffic-loss"  # what evaluation sends counts too
    sent = statistics.fmean(each["bytes_sent"] if whole else sum(each["steps_sent"]) for each in runs) / STEPS
    return {
        "variant": name,
        "options": TABLES[table][name],
        "losses by seed": dict(zip(map(str, seeds), losses, strict=True)),
        "mean": statistics.fmean(losses),
        "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
        "bytes sent a step": sent,
        "most at one step": max(max(each["steps_sent"]) for each in runs),
        "times fewer than DDP": runs[0]["ddp_bytes_per_step"] / sent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/traffic-loss"))
    parser.add_argument("--table", choices=TABLES, default="traffic-loss")
    parser.add_argument(
        "--only", choices={**VARIANTS, **EXCHANGES, **DILOCOS}, help="train this one, and write no result"
    )
    given = parser.parse_args()
    table, where = given.table, (given.data, given.out)
    if given.only and given.only not in TABLES[table]:
        parser.error(f"--only {given.only} is not in --table {table}: {', '.join(TABLES[table])}")
    if given.only:
        for seed in given.seeds:
            run(table, given.only, seed, *where)
        return
    rows = [
        row(table, name, [run(table, name, seed, *where) for seed in given.seeds], given.seeds)
        for name in TABLES[table]
    ]
    base = rows[0]["mean"]
    header = ["two ranks", "val loss", f"against {rows[0]['variant']}", "fewer bytes than DDP", "most at one step"]
    body = [
        [
            r["variant"],
            f"{r['mean']:.4f}",
            f"{r['mean'] - base:+.4f}",
            f"{r['times fewer than DDP']:.1f}",
            short_bytes(r["most at one step"]),
        ]
        for r in rows
    ]
    print(text_table(header, body))
    result = {"recipe": "gpt-mini", "data": Path(given.data).name, "steps": STEPS, "ranks": 2, "rows": rows}
    print(f"written to {save(table, result).name}")


if __name__ == "__main__":
    main()
