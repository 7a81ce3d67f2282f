"""What the host costs: steps of many matrices, and passes of many layers, so small that there is nothing else to pay.

    OMP_NUM_THREADS=1 python -m benchmarks.overhead

On a GPU this is the time that kernels wait for, so that a model of many layers steps no faster than this. One thread,
and its own processor time: what else runs on the machine disturbs it little.

    step     300 matrices of 32 × 16, rank 8, between two refreshes. Goals, in the same run: GaLore at most torch's
             AdamW with foreach=True, APOLLO and Fira at most twice that, GaLore in 8 bits three times
    layers   100 layers 32 × 32 one after the other on 8 rows, forward and backward, rank 4. Goals: LoRA and multi-head
             at most PEFT's LoRA, LTE (4 heads, merged once) at most 1.3 times it, DoRA at most PEFT's DoRA
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import lowrank
from benchmarks.common import in_turns, medians, ratio, save
from benchmarks.layer import adapted, frozen, round_trip
from benchmarks.projected import galore_torch_adamw
from lowrank.adapters import AdaptedLinear, DoRA, LoRA, Site
from lowrank.optim import AdamW, Gaussian, Projected, Rescale, Residual, Rule

MATRICES, ROWS, COLS, RANK, ROUNDS = 300, 32, 16, 8, 60
LAYERS, WIDTH, BATCH, LAYER_RANK = 100, 32, 8, 4
RULES: dict[str, Rule] = {
    "full": AdamW(),
    "galore": Projected(rank=RANK),
    "apollo": Projected(rank=RANK, basis=Gaussian(), lift=Rescale(), scale=1.0),
    "fira": Projected(rank=RANK, lift=Residual()),
    "galore 8-bit": Projected(rank=RANK, inner=AdamW(storage="int8")),
}
GOALS = {  # name: (what it is compared with, at most this many times it)
    "galore": ("torch foreach", 1.0),
    "apollo": ("torch foreach", 2.0),
    "fira": ("torch foreach", 2.0),
    "galore 8-bit": ("torch foreach", 3.0),
    "lora": ("peft lora", 1.0),
    "multi-head": ("peft lora", 1.0),
    "lte": ("peft lora", 1.3),
    "dora": ("peft dora", 1.0),
}


def parameters() -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(ROWS, COLS)) for _ in range(MATRICES)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def steps() -> dict[str, Callable[[], Any]]:
    """A step of every optimizer on matrices of its own; the refreshes are past and to come."""
    optimizers: dict[str, torch.optim.Optimizer] = {
        "torch fused": torch.optim.AdamW(parameters(), lr=1e-6, fused=True),
        "torch foreach": torch.optim.AdamW(parameters(), lr=1e-6, foreach=True),
    }
    if (made := galore_torch_adamw()) is not None:
        group = {"params": parameters(), "rank": RANK, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std"}
        optimizers["galore-torch"] = made([group], lr=1e-6)
    for name, rule in RULES.items():
        group = {"params": parameters(), "rule": seldom(rule), "lr": 1e-6}
        optimizers[name] = lowrank.Optimizer([group])
    return {name: optimizer.step for name, optimizer in optimizers.items()}


def seldom(rule: Rule) -> Rule:
    return replace(rule, refresh_every=10**6, stagger=False) if isinstance(rule, Projected) else rule


def chain(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(*[make() for _ in range(LAYERS)])


def with_dora(linear: nn.Linear) -> nn.Module:
    adapter = DoRA(LoRA(rank=LAYER_RANK))(Site("all", linear.weight.detach()))
    nn.init.normal_(adapter.inner.B, std=0.01)  # type: ignore[arg-type]
    return AdaptedLinear(linear, {"all": adapter}, {"all": slice(0, linear.out_features)})


def with_peft(*, dora: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = [str(i) for i in range(LAYERS)]
    config = LoraConfig(r=LAYER_RANK, lora_alpha=LAYER_RANK, lora_dropout=0.0, target_modules=targets, use_dora=dora)
    model: nn.Module = get_peft_model(chain(lambda: nn.Linear(WIDTH, WIDTH)), config)
    return model


def passes() -> dict[str, Callable[[], None]]:
    """Forward and backward through every kind of layer; the adapters are no longer fresh."""
    models = {
        "plain": chain(lambda: nn.Linear(WIDTH, WIDTH)),
        "frozen": chain(lambda: frozen(WIDTH, WIDTH)),
        "peft lora": with_peft(dora=False),
        "peft dora": with_peft(dora=True),
        "lora": chain(lambda: adapted(frozen(WIDTH, WIDTH))),
        "multi-head": chain(lambda: adapted(frozen(WIDTH, WIDTH), heads=4)),
        "lte": chain(lambda: adapted(frozen(WIDTH, WIDTH), heads=4, split=True, keep=True)),
        "dora": chain(lambda: with_dora(frozen(WIDTH, WIDTH))),
    }
    x, dy = torch.randn(BATCH, WIDTH, requires_grad=True), torch.randn(BATCH, WIDTH)
    return {name: round_trip(model, x, dy) for name, model in models.items()}


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    seconds = in_turns(runs, rounds=rounds, warmup=3, clock=time.thread_time)
    found = {name: (ratio(seconds, name, GOALS[name][0]), *GOALS[name]) for name in runs if name in GOALS}
    return {
        "milliseconds": {name: round(1e3 * value, 3) for name, value in medians(seconds).items()},
        "goals": {n: {"times": round(x, 3), "of": base, "goal": goal} for n, (x, base, goal) in found.items()},
    }


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"step": measure(steps(), ROUNDS), "layers": measure(passes(), ROUNDS)}
    for part in ("step", "layers"):
        print(part)
        for name, value in result[part]["milliseconds"].items():
            print(f"  {name:14} {value:8.3f} ms")
        for name, goal in result[part]["goals"].items():
            met = "met" if goal["times"] <= goal["goal"] else "missed"
            print(f"  {name:14} {goal['times']:.2f} × {goal['of']} (goal {goal['goal']}): {met}")
    result["load average of the machine"] = os.getloadavg()[0]
    print("written to", save("overhead", result).name)


if __name__ == "__main__":
    main()
