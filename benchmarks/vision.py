"""What LoRA costs on a vision transformer, of images and of volumes: time, memory, and waiting for batches.

    python -m benchmarks.vision

vit_tiny_patch16_224, batch 8, 2 threads, float32; LoRA of rank 8 on q and v of the fused qkv. Goals: forward and
backward at most 1.15 × the model whose head alone trains while gradients flow through its blocks, and at most 0.8 ×
full fine-tuning; peak memory below full fine-tuning's by at least the gradients and optimizer state that LoRA does not
have; at most 5 % of a step spent waiting for its batch. The same ratios of time on volumes: vit_tiny's blocks on 64³
voxels in cubes of 8, batch 2.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn

import lowrank
from benchmarks.common import in_turns, medians, ratio, save
from lowrank.infra.log import read_log
from lowrank.infra.step_clock import peak_bytes, reset_peak
from lowrank.models.volumes import inflated_
from lowrank.recipes.vit import vit_finetune
from lowrank.run.overrides import override, resolve
from lowrank.run.run import Run
from lowrank.train.loop import train

MODEL, BATCH, SIDE, ROUNDS, CLASSES = "vit_tiny_patch16_224", 8, 64, 25, 9
METHODS = {
    "full": lowrank.methods.full,
    "lora": lambda: lowrank.methods.lora(rank=8),
    "head": lowrank.methods.linear_probe,
}


def bound(name: str, *, volumes: bool = False) -> tuple[nn.Module, lowrank.Plan]:
    """The model under a method, as loaded but for its head; under ``head`` gradients flow through every block."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"img_size": SIDE, "patch_size": 8} if volumes else {}
    model: Any = timm.create_model(MODEL, num_classes=CLASSES, **shape)
    if volumes:
        model = inflated_(model, SIDE)
    lowrank.mark_loaded_(model, [n for n, _ in model.named_parameters() if not n.startswith("head.")])
    plan = lowrank.apply_(model, METHODS[name]())
    if name == "head":
        model.blocks[0].register_forward_pre_hook(lambda block, args: (args[0].requires_grad_(),))
    return model, plan


def round_trip(model: nn.Module, *, volumes: bool = False) -> Callable[[], None]:
    noise = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, SIDE, SIDE, SIDE) if volumes else (BATCH, 3, 224, 224), generator=noise)
    y = torch.arange(len(x)) % CLASSES

    def run() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()

    return run


def time_of_a_step(*, volumes: bool = False) -> dict[str, object]:
    steps = {name: round_trip(bound(name, volumes=volumes)[0], volumes=volumes) for name in METHODS}
    seconds = in_turns(steps, rounds=ROUNDS)
    return {
        "seconds": medians(seconds),
        "lora / head with gradients through (goal ≤ 1.15)": ratio(seconds, "lora", "head"),
        "lora / full (goal ≤ 0.8)": ratio(seconds, "lora", "full"),
    }


def peak(name: str) -> None:
    """Print the peak memory of a few steps; run in a process of its own, since the peak is the process's."""
    torch.set_num_threads(2)
    model, plan = bound(name)
    opt, run = plan.optimizer(lr=1e-4), round_trip(model)
    for step in range(5):
        if step == 2:
            reset_peak(torch.device("cpu"))
        run()
        opt.step()
    sheet = plan.ledger
    print(peak_bytes(torch.device("cpu")), sheet.gradients + sheet.state, sheet.factors)


def memory() -> dict[str, object]:
    # Freed blocks go back to the system at once, so that the resident set is what is in use.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    figures = {}
    for name in ("full", "lora"):
        command = [sys.executable, "-c", f"from benchmarks.vision import peak; peak({name!r})"]
        runs = [
            subprocess.run(
                command, env=os.environ | settings, capture_output=True, text=True, check=True
            ).stdout.split()
            for _ in range(3)
        ]
        figures[name] = [min(int(run[0]) for run in runs), int(runs[0][1]), int(runs[0][2])]
    saved = figures["full"][1] - figures["lora"][1]
    return {
        "peak bytes": {name: values[0] for name, values in figures.items()},
        "gradients and state, bytes": {name: values[1] for name, values in figures.items()},
        "peak saved": figures["full"][0] - figures["lora"][0],
        "gradients and state saved (goal: less than the peak saved)": saved,
    }


def waiting() -> dict[str, float]:
    """Σ waiting / Σ step over a run of the loop itself, its images grown from 28 pixels to 224."""
    shares = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOWRANK_CACHE"] = f"{folder}/cache"
        noise = np.random.default_rng(0)
        content = {}
        for split in ("train", "val", "test"):
            content[f"{split}_images"] = noise.integers(0, 255, size=(64, 28, 28, 3), dtype=np.uint8)
            content[f"{split}_labels"] = np.arange(64, dtype=np.uint8)[:, None] % CLASSES
        np.savez(f"{folder}/pathmnist.npz", **content)  # type: ignore[arg-type]
        for name, augment in {"as they are": "", "flipped and cropped": "hflip,crop"}.items():
            log = _logged(Path(folder) / name, f"{folder}/pathmnist.npz", augment)
            shares[name] = sum(r["wait_seconds"] for r in log[1:]) / sum(r["step_seconds"] for r in log[1:])
    return shares


def _logged(out: Path, file: str, augment: str) -> list[dict[str, float]]:
    settings: dict[str, object] = {
        "model.name": MODEL,
        "model.weights": "none",
        "data.size": "none",
        "data": file,
        "batch_size": BATCH,
        "steps": 40,
        "eval_batches": 1,
        "device": "cpu",
        **({"data.augment": augment} if augment else {}),
    }
    run: Run = resolve(override(vit_finetune(), settings))
    train(run, out, quiet=True)
    return [record for record in read_log(out / "log.jsonl") if "wait_seconds" in record]


def main() -> None:
    torch.set_num_threads(2)
    result: dict[str, dict[str, Any]] = {
        "forward and backward": time_of_a_step(),
        "forward and backward, volumes": time_of_a_step(volumes=True),
        "memory": memory(),
        "share of a step spent waiting (goal ≤ 0.05)": waiting(),
    }
    for name, figures in result.items():
        print(name)
        for key, value in figures.items():
            print(f"  {key}: {value}")
    print("written to", save("vit-tiny", result).name)


if __name__ == "__main__":
    main()
