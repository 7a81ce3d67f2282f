"""The optimizer's step as a CUDA graph (``lowrank.optim.CapturedStep``) beside the same step launched by the host.

Models of many small matrices, where the host is what a step waits for. Without CUDA both are the ordinary step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

import lowrank
from benchmarks.gpu.bench import Bench, medians, ratio
from lowrank.optim import AdamW, CapturedStep, Projected, Residual, Rule

NEVER = 10**6
RULES: dict[str, Rule] = {
    "full": AdamW(),
    "galore": Projected(rank=32, refresh_every=NEVER),
    "galore 8-bit": Projected(rank=32, refresh_every=NEVER, inner=AdamW(storage="int8")),
    "fira": Projected(rank=32, refresh_every=NEVER, lift=Residual()),
}


def run(bench: Bench) -> None:
    for name, rule in RULES.items():
        bench.item(name, partial(measure, bench, rule))


def measure(bench: Bench, rule: Rule) -> dict[str, Any]:
    count, width = (4, 48) if bench.tiny else (300, 256)
    steps: dict[str, Any] = {}
    for name in ("launched", "captured"):
        params = [nn.Parameter(torch.randn(width, width, device=bench.device)) for _ in range(count)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = lowrank.Optimizer([{"params": params, "rule": rule, "lr": 1e-3}], capturable=name == "captured")
        optimizer.step()
        steps[name] = CapturedStep(optimizer) if name == "captured" else optimizer.step
    found = bench.in_turns(steps, rounds=30, seconds=3.0)
    record = {f"{name}_{key}": value for name, rounds in found.items() for key, value in medians(rounds).items()}
    return {**record, "times_launched": ratio(found, "captured", "launched"), "matrices": count}
