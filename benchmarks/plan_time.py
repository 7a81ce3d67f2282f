"""Does a plan tell a step's seconds? This machine is calibrated as ``lowrank plan --calibrate`` does it, and then runs
are trained whose seconds a step were told before.

Ten configurations: GPT, LLaMA and ViT minis and a larger GPT, several methods, two batches. Seconds are the mean of ten
steps of the loop after its first five, merges and refreshes as they come. One thread computes, and seconds are those
that it ran, in the calibration and in the runs, so that a busy machine does not decide.

python -m benchmarks.plan_time         five minutes on an idle core; writes results/plan-time_….json
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import save
from lowrank.infra import step_clock
from lowrank.plan.speed import Speed
from lowrank.recipes import find
from lowrank.run.duration import pace_of
from lowrank.run.memory_estimate import estimate
from lowrank.run.overrides import override, resolve
from lowrank.run.run import Run
from lowrank.train.calibration import calibrated
from lowrank.train.loop import train

FIRST, STEPS = 5, 15
LARGER = {"model.n_layer": 6, "model.n_embd": 512, "model.n_head": 8, "data.context": 256}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt full 16": ("gpt-mini", {"method": "full", "batch_size": 16}),
    "gpt full 4": ("gpt-mini", {"method": "full", "batch_size": 4}),
    "gpt lora 16": ("gpt-mini", {"method": "lora", "batch_size": 16}),
    "gpt lte 8": ("gpt-mini", {"method": "lte", "batch_size": 8, "method.merge_every": 5}),
    "gpt galore 4": ("gpt-mini", {"method": "galore", "batch_size": 4, "method.refresh_every": 5}),
    "llama full 16": ("llama-mini", {"method": "full", "batch_size": 16}),
    "llama galore_8bit 16": ("llama-mini", {"method": "galore_8bit", "batch_size": 16}),
    "llama apollo 4": ("llama-mini", {"method": "apollo", "batch_size": 4}),
    "vit full 32": ("vit-mini", {"method": "full", "batch_size": 32}),
    "vit lora 8": ("vit-mini", {"method": "lora", "batch_size": 8}),
    "larger gpt full 4": ("gpt-mini", {**LARGER, "method": "full", "batch_size": 4}),
    "larger gpt galore 2, checkpointed": (
        "gpt-mini",
        {**LARGER, "method": "galore", "batch_size": 2, "checkpoint_activations": True},
    ),
}


def run_of(name: str) -> Run:
    recipe, changes = CONFIGURATIONS[name]
    seldom = {"steps": STEPS, "eval_every": "never", "checkpoint_every": STEPS, "warmup": 0.0}
    return resolve(override(find(recipe), {**changes, **seldom, "device": "cpu"}))


def seconds_of(run: Run) -> list[float]:
    """Of each step after the first few, which are measured by the loop itself."""
    clock = SimpleNamespace(perf_counter=time.thread_time)
    with tempfile.TemporaryDirectory() as folder, patch.object(step_clock, "time", clock):
        train(run, Path(folder) / "run", quiet=True)
        lines = (Path(folder) / "run" / "log.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "step_seconds" in record]
    return [record["step_seconds"] for record in records if record["step"] > FIRST]


def compared(speed: Speed) -> dict[str, Any]:
    """What was told and what it took, by configuration."""
    rows: dict[str, Any] = {}
    for name in CONFIGURATIONS:
        run = run_of(name)
        told = pace_of(estimate(run, on_card=False, works=True), speed)
        assert told is not None
        took = seconds_of(run)
        rows[name] = {
            "told": told.total,
            "took": statistics.mean(took),
            "error": told.total / statistics.mean(took) - 1,
            "steps": took,
            "parts": vars(told),
        }
        print(
            f"{rows[name]['error']:+7.1%}  {told.total:.3f} s told, {rows[name]['took']:.3f} s taken: {name}",
            flush=True,
        )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    speed = calibrated(torch.device("cpu"), now=time.thread_time)
    rows = compared(speed)
    errors = sorted(abs(row["error"]) for row in rows.values())
    result = {"threads": speed.machine.threads, "median": statistics.median(errors), "worst": errors[-1], "rows": rows}
    print(f"median {result['median']:.1%}, worst {result['worst']:.1%}")
    print(save("plan-time", result))


if __name__ == "__main__":
    main()
