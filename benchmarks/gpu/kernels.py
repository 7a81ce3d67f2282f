"""Each Triton kernel beside the plain operations that it replaces: right, how fast, and whether to turn it on.

``turn_on`` is a proposal for ``lowrank.linalg.kernels.FASTER``: at least 5 % faster here, and as right as it should be.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from benchmarks.gpu.bench import Bench, medians, ratio
from benchmarks.gpu.correctness import relative
from benchmarks.layer import adapted, frozen
from lowrank.linalg import kernels
from lowrank.optim import AdamW, Muon, Projected, Rule

WORTH, ALLOWED = 0.95, 5e-2  # times the plain seconds; relative error of what bfloat16 numbers change by
STEPS: dict[str, tuple[Rule, list[tuple[int, int]]]] = {
    "projected": (Projected(rank=256, refresh_every=10**6), [(2048, 5461), (5461, 2048), (2048, 2048)]),
    "int8": (AdamW(storage="int8"), [(32000, 2048)]),
    "newton_schulz": (Muon(), [(2048, 2048)] * 4 + [(2048, 5461)] * 2),
}


def run(bench: Bench) -> None:
    for name, (rule, shapes) in STEPS.items():
        for dtype in (torch.bfloat16, torch.float32):
            kind = str(dtype).removeprefix("torch.")
            bench.item(f"{name}, {kind}", partial(step, bench, rule, shapes, dtype))
    for rank in (4,) if bench.tiny else (16, 64):
        bench.item(f"layer, rank {rank}", partial(layer, bench, rank))


@contextmanager
def mode(word: str) -> Iterator[None]:
    before = os.environ.get("LOWRANK_KERNELS", "auto")
    os.environ["LOWRANK_KERNELS"] = word
    try:
        yield
    finally:
        os.environ["LOWRANK_KERNELS"] = before


def compared(bench: Bench, make: Callable[[], tuple[Callable[[], Any], Callable[[], list[Tensor]]]]) -> dict[str, Any]:
    """``make`` gives what to time and what it found; each way has its own."""
    runs: dict[str, Callable[[], Any]] = {}
    found = {}
    for word in ("off", "on"):
        with mode(word):
            run_one, results = make()
            run_one()
            found[word] = results()

        def in_mode(word: str = word, run_one: Callable[[], Any] = run_one) -> None:
            with mode(word):
                run_one()

        runs[word] = in_mode
    error = relative(found["on"], found["off"])
    times = bench.in_turns(runs, seconds=3.0)
    faster = ratio(times, "on", "off")
    with mode("on"):
        here = kernels.possible(torch.empty(0, device=bench.device))
    return {
        "plain_seconds": medians(times["off"])["seconds"],
        "kernel_seconds": medians(times["on"])["seconds"] if here else None,
        "times_plain": faster if here else None,
        "relative_error": error,
        "allowed": ALLOWED,
        "ok": error <= ALLOWED,
        "turn_on": bool(here and faster <= WORTH and error <= ALLOWED),
    }


def step(bench: Bench, rule: Rule, shapes: list[tuple[int, int]], dtype: torch.dtype) -> dict[str, Any]:
    """An optimizer's step of weights that begin as zeros, so that bfloat16 shows what they change by."""
    sizes = [(16, 24)] if bench.tiny else shapes
    chosen = Projected(rank=4) if bench.tiny and isinstance(rule, Projected) else rule

    def make() -> tuple[Callable[[], Any], Callable[[], list[Tensor]]]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.zeros(size, device=bench.device, dtype=dtype)) for size in sizes]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = lowrank.Optimizer([{"params": params, "rule": chosen, "lr": 1e-3}])
        return optimizer.step, lambda: [p.detach().clone() for p in params]

    return compared(bench, make)


def layer(bench: Bench, rank: int) -> dict[str, Any]:
    """A layer with LoRA, forward and backward, 4096 → 4096 on 8192 tokens."""
    width, tokens = (32, 8) if bench.tiny else (4096, 8192)
    kind: dict[str, Any] = {"device": bench.device, "dtype": torch.bfloat16}

    def make() -> tuple[Callable[[], Any], Callable[[], list[Tensor]]]:
        torch.manual_seed(0)
        module = adapted(frozen(width, width, **kind), rank=rank)
        x, dy = torch.randn(tokens, width, **kind, requires_grad=True), torch.randn(tokens, width, **kind)
        trained = [p for p in module.parameters() if p.requires_grad]
        seen: list[Tensor] = []

        def trip() -> None:
            for t in (x, *trained):
                t.grad = None
            y = module(x)
            y.backward(dy)
            seen[:] = [y.detach()]

        return trip, lambda: [*seen, *(t.grad for t in (x, *trained) if t.grad is not None)]

    return compared(bench, make)
