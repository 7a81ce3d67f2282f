"""Run by ``test_kernels`` in a process with Triton's interpreter: prints what it finds as one line of JSON."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters import AdaptedLinear, LoRA, Site
from lowrank.linalg.kernels import int8, layer, projected, symmetric_product
from lowrank.optim import AdamW, Muon, Optimizer, Projected

CALLS: Counter[str] = Counter()
ERRORS: dict[str, float] = {}


def counted(module: Any, name: str, **smaller: Any) -> None:
    """Count calls of a kernel, whose tiles are to be smaller than the matrices here."""
    real = getattr(module, name)

    def call(*args: Any, **options: Any) -> Any:
        CALLS[name] += 1
        return real(*args, **{**smaller, **options})

    setattr(module, name, call)


@contextmanager
def plain() -> Iterator[None]:
    os.environ["LOWRANK_KERNELS"] = "off"
    yield
    os.environ["LOWRANK_KERNELS"] = "on"


def note(case: str, found: Tensor, expected: Tensor) -> None:
    apart, size = (found.double() - expected.double()).norm(), expected.double().norm()
    ERRORS[case] = float(apart / size)


def steps(rule: Any, shapes: list[tuple[int, ...]], dtype: torch.dtype, count: int) -> tuple[list[Tensor], Optimizer]:
    """What some steps change parameters by, per parameter; bfloat16 ones are 0 at first, so that little is rounded."""
    noise = torch.Generator().manual_seed(0)
    start = 0.0 if dtype is torch.bfloat16 else 1.0
    params = [nn.Parameter((start * torch.randn(shape, generator=noise)).to(dtype)) for shape in shapes]
    before = [p.detach().clone() for p in params]
    optimizer = Optimizer([{"params": params, "rule": rule, "lr": 0.05, "decay": 0.1}])
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=noise).to(dtype)
        optimizer.step()
    return [p.detach() - b for p, b in zip(params, before, strict=True)], optimizer


def of_a_projected_step() -> None:
    """Against the plain step, from one refresh to the next; the third is of bfloat16 weights."""
    for shape, dtype in (((19, 37), torch.float32), ((37, 19), torch.float32), ((21, 33), torch.bfloat16)):
        rule = Projected(rank=5, refresh_every=9, scale=0.5)
        (found,), _ = steps(rule, [shape], dtype, 1)
        with plain():
            (expected,), _ = steps(rule, [shape], dtype, 1)
        name = "projected" if dtype is torch.float32 else "projected, bfloat16"
        note(f"{name}: {shape}", found, expected)


def of_a_layer() -> None:
    """Output and every gradient, against float64."""
    for dtype, name in ((torch.float32, "layer"), (torch.bfloat16, "layer, bfloat16")):
        torch.manual_seed(0)
        linear = nn.Linear(37, 29).requires_grad_(False)
        adapter = LoRA(rank=3, heads=2)(Site("all", linear.weight))
        nn.init.normal_(adapter.B, std=0.2)
        x, dy = torch.randn(3, 7, 37), torch.randn(3, 7, 29)
        found = passed(linear.to(dtype), adapter, x.to(dtype).requires_grad_(), dy.to(dtype))
        exact = [t.detach().to(dtype).double() for t in (x, dy)]
        with plain():
            expected = passed(linear.double(), adapter.double(), exact[0].requires_grad_(), exact[1])
        for key, value in found.items():
            note(f"{name}: {key}", value, expected[key])


def passed(linear: nn.Linear, adapter: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    adapter.zero_grad()
    y = AdaptedLinear(linear, {"all": adapter}, {"all": slice(0, 29)})(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "dA": adapter.A.grad.clone(), "dB": adapter.B.grad.clone()}  # type: ignore[dict-item]


def of_8_bits() -> int:
    """Two steps, and how many codes differ after them."""
    shapes: list[tuple[int, ...]] = [(19, 37), (3, 7, 11)]
    found, mine = steps(AdamW(storage="int8"), shapes, torch.float32, 2)
    with plain():
        expected, theirs = steps(AdamW(storage="int8"), shapes, torch.float32, 2)
    apart = 0
    for i, shape in enumerate(shapes):
        note(f"int8: {shape}", found[i], expected[i])
        here, there = (list(o.state.values())[i] for o in (mine, theirs))
        for moment in ("exp_avg", "exp_avg_sq"):
            apart += int((here[moment]["codes"].int() - there[moment]["codes"].int()).count_nonzero())
    return apart


def of_newton_schulz() -> None:
    """Four matrices of two shapes step in two stacks; a product that is not square comes out symmetric."""
    shapes = [(19, 37), (37, 19), (19, 37), (37, 19)]
    found, _ = steps(Muon(), shapes, torch.float32, 1)  # type: ignore[arg-type]
    with plain():
        expected, _ = steps(Muon(), shapes, torch.float32, 1)  # type: ignore[arg-type]
    for i, shape in enumerate(shapes):
        note(f"newton_schulz: {i} {shape}", found[i], expected[i])


def of_rounding() -> tuple[float, float]:
    """Weights of 1 step by 2⁻¹⁰, an eighth of the way to the bfloat16 above them, twice."""
    rule, up = AdamW(storage="int8"), []
    p = nn.Parameter(torch.ones(40, 50, dtype=torch.bfloat16))
    optimizer = Optimizer([{"params": [p], "rule": rule, "lr": 2.0**-10}])
    for _ in range(2):
        with torch.no_grad():
            p.fill_(1.0)
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
        up.append(p.detach() > 1)
    return float(up[0].float().mean()), float((up[0] & up[1]).sum() / up[0].sum())


if __name__ == "__main__":
    counted(projected, "projected_adam_", tile=(16, 16, 16))
    counted(layer, "linear", tile=(16, 16, 16))
    counted(symmetric_product, "symmetric", tile=(16, 16))
    counted(int8, "adamw_int8_")
    of_a_projected_step()
    of_a_layer()
    apart = of_8_bits()
    of_newton_schulz()
    result = {"errors": ERRORS, "calls": dict(CALLS), "codes apart": apart}
    result["rounded up"], result["rounded alike in two steps"] = of_rounding()
    print(json.dumps(result))
