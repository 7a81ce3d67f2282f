"""The optimizer step of LLaMA 1B, beside the least bytes that it must move.

    floor   every gradient read once, every weight read and written, every number of state read and written; a lift that
            needs G (APOLLO, Fira) reads the gradient a second time, since R = QᵀG must be whole before it

in picoseconds a parameter, against the bandwidth of a copy on this card. Steps are ordinary ones: no basis is
refreshed; the first, which makes all of them anew, is beside it. Where 1B does not fit, the largest size that does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import lowrank
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.ceilings import bytes_a_second
from benchmarks.gpu.models import llama, parameters_of, shape_of
from benchmarks.projected import galore_torch_adamw
from lowrank.optim import Projected
from lowrank.plan.ledger import state_bytes

SIZES = ("1b", "350m", "130m", "60m")
NEVER = 10**6  # steps between refreshes
LR = 1e-6
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "galore, rank 128": ("galore", {"rank": 128, "refresh_every": NEVER}),
    "full": ("full", {}),
    "apollo, rank 256": ("apollo", {"rank": 256, "refresh_every": NEVER}),
    "galore_8bit, rank 512": ("galore_8bit", {"rank": 512, "refresh_every": NEVER}),
    "galore, rank 512": ("galore", {"rank": 512, "refresh_every": NEVER}),
    "fira, rank 512": ("fira", {"rank": 512, "refresh_every": NEVER}),
    "apollo_mini": ("apollo_mini", {"refresh_every": NEVER}),
    "full_8bit": ("full_8bit", {}),
    "muon": ("muon", {}),
}


def run(bench: Bench) -> None:
    for dtype in (torch.bfloat16,) if bench.tiny else (torch.bfloat16, torch.float32):
        steps_of(bench, dtype)
        bench.free()
    bench.item("galore-torch", lambda: galore_torch(bench), needs=0.0 if bench.tiny else 10.0)
    bench.item("refresh, galore, rank 512", lambda: refresh(bench), needs=0.0 if bench.tiny else 10.0)


def steps_of(bench: Bench, dtype: torch.dtype) -> None:
    """Every optimizer on one model, with weights and gradients of this dtype."""
    kind = f"{str(dtype).removeprefix('torch.')} weights"
    size = "tiny" if bench.tiny else next((s for s in SIZES if fits(bench, s, dtype)), SIZES[-1])
    made: list[nn.Module] = []

    def build() -> dict[str, Any]:
        made.append(with_gradients(size, bench, dtype))
        return describe(size, made[0])

    if bench.item(f"model, {kind}", build) is None:
        return
    (model,) = made
    fused: float | None = None
    for name, make in alternatives(bench, model).items():
        run_one = partial(measure, bench, model, make, fused)
        found = bench.item(f"{name}, {kind}", run_one, needs=0.0 if bench.tiny else 5.0)
        if fused is None and found is not None:
            fused = found["seconds"]
    if bench.cuda and dtype is torch.float32:
        bench.item(f"ours: galore, rank 128, TF32, {kind}", lambda: with_tf32(bench, model, fused), needs=5.0)


def fits(bench: Bench, size: str, dtype: torch.dtype) -> bool:
    """Weights, gradients and Adam's float32 moments, with a tenth to spare."""
    count = parameters_of(llama(size, torch.device("meta"), dtype))
    return count * (2 * dtype.itemsize + 8) * 1.1 + (1 << 30) < bench.free_bytes()


def describe(size: str, model: nn.Module) -> dict[str, Any]:
    hidden, feed_forward, _, layers = shape_of(size)
    return {
        "size": size,
        "parameters": parameters_of(model),
        "hidden": hidden,
        "feed_forward": feed_forward,
        "layers": layers,
    }


def with_gradients(size: str, bench: Bench, dtype: torch.dtype) -> nn.Module:
    model = llama(size, bench.device, dtype)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def alternatives(bench: Bench, model: nn.Module) -> dict[str, Callable[[], Any]]:
    """What makes each optimizer; torch's fused AdamW first, which the others are compared with."""
    params = list(model.parameters())
    found: dict[str, Callable[[], Any]] = {
        "torch AdamW, fused": lambda: [torch.optim.AdamW(params, lr=LR, fused=True)],
        **{f"ours: {name}": partial(ours, model, *which) for name, which in chosen(bench).items()},
        "torch AdamW, foreach": lambda: [torch.optim.AdamW(params, lr=LR, foreach=True)],
    }
    if hasattr(torch.optim, "Muon") and not bench.tiny:
        found["torch Muon"] = lambda: torch_muon(model)
    if bench.cuda and importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes AdamW8bit"] = lambda: eight_bits(params)
    return found


def chosen(bench: Bench) -> dict[str, tuple[str, dict[str, Any]]]:
    """Of ``OURS`` the methods that there are; small ranks for the tiny model."""
    present = {name: which for name, which in OURS.items() if which[0] in lowrank.METHODS}
    if not bench.tiny:
        return present
    present = {name: which for name, which in present.items() if which[0] in ("galore", "apollo", "galore_8bit")}
    return {name: (method, {k: 4 if k == "rank" else v for k, v in o.items()}) for name, (method, o) in present.items()}


def ours(model: nn.Module, method: str, options: dict[str, Any]) -> list[Any]:
    plan = lowrank.apply_(model, lowrank.METHODS[method](**options))
    made: Any = plan.optimizer(lr=LR)
    made.floor_bytes = floor_of(plan)
    return [made]


def floor_of(plan: Any) -> int:
    """The least bytes that a step of this plan moves (module docstring)."""
    total = 0
    for row in plan.rows:
        if row.rule is not None:
            passes = 4 if isinstance(row.rule, Projected) and row.rule.lift.needs_gradient else 3
            total += passes * row.numel * row.dtype.itemsize + 2 * state_bytes(row.rule, row.shape, row.dtype)
    return total


def torch_muon(model: nn.Module) -> list[Any]:
    """Muon on the matrices inside, AdamW on the rest, as its authors say."""
    inside = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    taken = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [torch.optim.Muon(inside, lr=LR), torch.optim.AdamW(rest, lr=LR, fused=True)]


def eight_bits(params: list[nn.Parameter]) -> list[Any]:
    import bitsandbytes

    return [bitsandbytes.optim.AdamW8bit(params, lr=LR)]


def measure(bench: Bench, model: nn.Module, make: Callable[[], Any], fused: float | None) -> dict[str, Any]:
    """Seconds of the first and of an ordinary step, and what that is a parameter."""
    optimizers = make()

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    first, _ = bench.once(step)
    took = bench.timed(step, rounds=12, seconds=2.0)
    count = parameters_of(model)
    floor = sum(getattr(optimizer, "floor_bytes", 0) for optimizer in optimizers) or None
    if fused is None and floor is None:  # torch's fused AdamW, whose moments have the weights' dtype
        floor = 7 * count * next(model.parameters()).dtype.itemsize
    bandwidth = bytes_a_second(bench)
    least = floor / bandwidth if floor and bandwidth else None
    return {
        **took,
        "first_step_seconds": first,
        "ps_a_parameter": took["seconds"] / count * 1e12,
        "state_bytes_a_parameter": sum(map(held, optimizers)) / count,
        "floor_ps_a_parameter": None if least is None else least / count * 1e12,
        "times_floor": None if least is None else took["seconds"] / least,
        "times_adamw_fused": None if fused is None else took["seconds"] / fused,
    }


def held(optimizer: Any) -> int:
    """Bytes of an optimizer's state."""
    if hasattr(optimizer, "state_bytes"):
        return optimizer.state_bytes()
    return sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))


def with_tf32(bench: Bench, model: nn.Module, fused: float | None) -> dict[str, Any]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return measure(bench, model, lambda: ours(model, *OURS["galore, rank 128"]), fused)
    finally:
        torch.set_float32_matmul_precision(before)


def block(bench: Bench, layers: int) -> list[nn.Parameter]:
    """The seven matrices of each of some layers of 1B, in float32, with gradients."""
    hidden, wide = (32, 48) if bench.tiny else shape_of("1b")[:2]
    shapes = [(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide)]
    params = [nn.Parameter(torch.randn(shape, device=bench.device) * 0.02) for _ in range(layers) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def galore_torch(bench: Bench) -> dict[str, Any]:
    """galore-torch and ours on two layers of 1B, rank 512, float32: its first step decomposes every gradient."""
    if galore_torch_adamw() is None:
        return {"skipped": "galore-torch is not installed"}
    params = block(bench, 1 if bench.tiny else 2)
    rank = 4 if bench.tiny else 512
    group = {"params": params, "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    theirs = galore_torch_adamw()([group], lr=LR)
    rule = Projected(rank=rank, refresh_every=NEVER)
    mine = lowrank.Optimizer([{"params": params, "rule": rule, "lr": LR}])
    firsts = {"galore-torch": bench.once(theirs.step)[0], "ours": bench.once(mine.step)[0]}
    found = bench.in_turns({"galore-torch": theirs.step, "ours": mine.step})
    count = sum(p.numel() for p in params)
    record: dict[str, Any] = {f"first_step_seconds_{name}": took for name, took in firsts.items()}
    for name, rounds in found.items():
        record[f"ps_a_parameter_{name}"] = sorted(device for device, _ in rounds)[len(rounds) // 2] / count * 1e12
    return record


def refresh(bench: Bench) -> dict[str, Any]:
    """What refreshing the bases of one layer adds to its step, and so, every 200 steps, to the mean step."""
    params = block(bench, 1)
    rank = 4 if bench.tiny else 512
    steps = {}
    for name, every in (("ordinary", NEVER), ("refreshing", 1)):
        rule = Projected(rank=rank, refresh_every=every)
        steps[name] = lowrank.Optimizer([{"params": params, "rule": rule, "lr": LR}]).step
    found = bench.in_turns(steps, rounds=8)
    ordinary, both = (sorted(device for device, _ in found[name])[len(found[name]) // 2] for name in steps)
    return {
        "ordinary_seconds": ordinary,
        "refresh_seconds": both - ordinary,
        "adds_every_200_steps": (both - ordinary) / 200 / ordinary,
    }
