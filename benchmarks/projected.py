"""What projecting costs: step, refresh, first step, state and workspace, beside galore-torch in the same run.

    python -m benchmarks.projected [--text FILE]

The sixteen matrices of four GPT-2 layers (768 × 2304, 768 × 768, 768 × 3072, 3072 × 768, four each), rank 128, float32,
two threads, gradients of a real run (``benchmarks.gradients``). Every matrix is timed by itself and the fastest rounds
are summed: a few milliseconds are often undisturbed even where the machine is shared. Goals:

    an ordinary step     at most 1.1 × its two products (project, project back) and 0.9 × galore-torch's
    a refresh            at most 1/25 of an SVD a matrix, with 99 % of the energy ‖QᵀG‖² that the exact basis captures
    the first step       at most 1/15 of galore-torch's
    200 staggered steps  the slowest after the first at most 2 × the median
    state, workspace     the documented bytes; at most one gradient-sized tensor

"noisy" adds white noise of half the gradient's root mean square: a harder spectrum, as late in training.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import importlib.util
import os
import sys
import time
import types
import warnings
import weakref
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import in_turns, save
from benchmarks.gradients import gradients
from lowrank.linalg.basis import SVD, Basis, PowerIteration, captured_energy
from lowrank.optim import AdamW, Gaussian, Projected, Rescale, Residual
from lowrank.optim.rules import State

RANK, EARLY, LATE = 128, 20, 60
BASES: dict[str, Basis] = {
    "svd": SVD(),
    "one iteration": PowerIteration(iterations=1),
    "two iterations (default)": PowerIteration(),
    "two whole iterations": PowerIteration(sample=1),
}
RULES = {
    "galore": Projected(rank=RANK),
    "galore int8": Projected(inner=AdamW(storage="int8"), rank=RANK),
    "apollo": Projected(rank=RANK, basis=Gaussian(), lift=Rescale()),
    "fira": Projected(rank=RANK, lift=Residual()),
}


def side_of(g: Tensor) -> Any:
    return "right" if g.shape[0] >= g.shape[1] else "left"


@lru_cache
def galore_torch_adamw() -> Any:
    """galore-torch's AdamW, or None where it is not installed. Its package imports bitsandbytes, which needs a GPU."""
    found = importlib.util.find_spec("galore_torch")
    if found is None:
        return None
    package = types.ModuleType("galore_torch")
    package.__path__ = list(found.submodule_search_locations or [])
    sys.modules["galore_torch"] = package
    warnings.simplefilter("ignore", FutureWarning)
    return importlib.import_module("galore_torch.adamw").AdamW


def galore_torch(weight: Tensor, g: Tensor, gap: int) -> torch.optim.Optimizer | None:
    """galore-torch on a copy of the weight."""
    if galore_torch_adamw() is None:
        return None
    p = nn.Parameter(weight.clone())
    p.grad = g
    group = {"params": [p], "rank": RANK, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    optimizer: torch.optim.Optimizer = galore_torch_adamw()([group], lr=1e-6)
    return optimizer


class Run:
    """A rule on one weight, with the same gradient at every step."""

    def __init__(self, rule: Projected, weight: Tensor, g: Tensor, index: int = 0):
        self.rule, self.weight, self.g = rule, weight.clone(), g
        self.state: State = rule.init(weight)
        rule.place_(self.state, index)

    def step(self) -> None:
        self.rule.apply_([self.weight], [self.g], [self.state], lr=1e-6, decay=0.0)


def products(weight: Tensor, g: Tensor) -> Callable[[], None]:
    """The two products of a step and nothing else, the second into the weight."""
    q, w = torch.linalg.qr(torch.randn(min(g.shape), RANK))[0], weight.clone()

    def run() -> None:
        if side_of(g) == "right":
            w.addmm_(g @ q, q.T, alpha=-1e-6)
        else:
            w.addmm_(q, q.T @ g, alpha=-1e-6)

    return run


def fastest(every: list[dict[str, Callable[[], Any]]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Seconds of each alternative, summed over the matrices, of each the fastest round."""
    totals: dict[str, float] = collections.defaultdict(float)
    for runs in every:
        for name, seconds in in_turns(runs, rounds=rounds, warmup=warmup).items():
            totals[name] += min(seconds)
    return dict(totals)


def against(seconds: dict[str, float], base: str) -> dict[str, float]:
    return {name: value / seconds[base] for name, value in seconds.items()} if base in seconds else {}


def ordinary_step(weights: list[Tensor], gs: list[Tensor], rounds: int) -> dict[str, Any]:
    every: list[dict[str, Callable[[], Any]]] = []
    for w, g in zip(weights, gs, strict=True):
        runs: dict[str, Callable[[], Any]] = {"products": products(w, g)}
        runs |= {name: Run(rule, w, g).step for name, rule in RULES.items()}
        reference = galore_torch(w, g, 10**9)
        every.append(runs if reference is None else {**runs, "galore-torch": reference.step})
    seconds = fastest(every, rounds)
    times = {f"times {base}": against(seconds, base) for base in ("products", "galore-torch")}
    return {"seconds": seconds, **times}


def refresh(early: list[Tensor], late: list[Tensor], rounds: int) -> dict[str, Any]:
    """Seconds and energy of refreshing from the basis of ``early`` gradients to ``late`` ones."""
    every: list[dict[str, Callable[[], Any]]] = []
    energy: dict[str, float] = collections.defaultdict(float)
    for first, g in zip(early, late, strict=True):
        side = side_of(g)
        energy["gradient"] += g.square().sum().item()
        every.append({})
        for name, basis in BASES.items():
            old = basis.fit(first, side, RANK, old=None, seed=0)
            every[-1][name] = partial(basis.fit, g, side, RANK, old=old, seed=0)
            energy[name] += captured_energy(g, every[-1][name](), side).item()
            energy[f"{name}, before the refresh"] += captured_energy(g, old, side).item()
    quick = [{name: run for name, run in runs.items() if name != "svd"} for runs in every]
    seconds = fastest(quick, rounds) | fastest([{"svd": runs["svd"]} for runs in every], max(2, rounds // 5), warmup=0)
    return {"seconds": seconds, "times svd": against(seconds, "svd"), "energy": against(dict(energy), "svd")}


def first_step(weights: list[Tensor], gs: list[Tensor], rounds: int) -> dict[str, Any]:
    """The cold start included; states are made anew each time and outside of the timing."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for w, g in zip(weights, gs, strict=True):
        times: dict[str, list[float]] = collections.defaultdict(list)
        for _ in range(rounds):
            steps = {"galore": Run(RULES["galore"], w, g).step}
            if galore_torch_adamw() is not None:
                steps["galore-torch"] = galore_torch(w, g, 200).step  # type: ignore[union-attr]
            for name, step in steps.items():
                times[name].append(timed(step))
        for name, values in times.items():
            seconds[name] += min(values)
    return {"seconds": dict(seconds), "times galore-torch": against(dict(seconds), "galore-torch")}


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def staggered(weights: list[Tensor], gs: list[Tensor], repeats: int) -> dict[str, float]:
    """The 200 steps after the first, with one refresh a matrix; the fastest repeat of each matrix and step."""
    best = torch.full((201, len(weights)), float("inf"))
    for _ in range(repeats):
        runs = [Run(RULES["galore"], w, g, i) for i, (w, g) in enumerate(zip(weights, gs, strict=True))]
        best = torch.minimum(best, torch.tensor([[timed(run.step) for run in runs] for _ in range(201)]))
    steps = best.sum(dim=1)[1:]
    return {"median seconds": steps.median().item(), "slowest to median": (steps.max() / steps.median()).item()}


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made and not yet freed, and their peak; what kernels use inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.live += t.nbytes
                self.peak = max(self.peak, self.live)
                weakref.finalize(t, self.free, t.nbytes)
        return result

    def free(self, count: int) -> None:
        self.live -= count


def workspace(weights: list[Tensor], gs: list[Tensor]) -> dict[str, Any]:
    """Peak bytes of temporaries, in units of the gradient, over the shapes."""
    result: dict[str, Any] = {"first step": {}, "ordinary step": {}}
    for name, rule in RULES.items():
        peaks: dict[str, list[float]] = {"first step": [], "ordinary step": []}
        for w, g in zip(weights[:4], gs[:4], strict=True):
            run = Run(rule, w, g)
            for values in peaks.values():
                with Live() as live:
                    run.step()
                values.append(live.peak / g.nbytes)
        for step, values in peaks.items():
            result[step][name] = max(values)
    return result


def state_bytes(weights: list[Tensor]) -> dict[str, int]:
    def count(state: State) -> int:
        return sum(v.nbytes if isinstance(v, Tensor) else count(v) for v in state.values())

    held = sum(count(RULES["galore"].init(w.to("meta"))) for w in weights)
    formula = sum(4 * (min(w.shape) + 2 * max(w.shape)) * RANK + 44 for w in weights)
    return {"held": held, "formula": formula, "adamw": sum(8 * w.numel() + 4 for w in weights)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, help="any text of some hundred thousand words; default: Python's own manual"
    )
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(2)
    text = options.text.read_text(encoding="utf8") if options.text else "\n".join(topics.values())
    kept = gradients(text, (EARLY, LATE))
    early, late = kept[EARLY], kept[LATE]
    torch.manual_seed(0)
    weights = [torch.randn(g.shape) * 0.02 for g in late]
    noisy = [[g + 0.5 * g.square().mean().sqrt() * torch.randn_like(g) for g in gs] for gs in (early, late)]
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "workspace, in gradients": lambda: workspace(weights, late),
        "state bytes": lambda: state_bytes(weights),
        "ordinary step": lambda: ordinary_step(weights, late, options.rounds),
        "refresh": lambda: refresh(early, late, options.rounds),
        "refresh, noisy": lambda: refresh(noisy[0], noisy[1], options.rounds),
        "first step": lambda: first_step(weights, late, 3),
        "staggered": lambda: staggered(weights, late, 5),
    }
    result: dict[str, Any] = {}
    for name, measure in parts.items():
        result[name] = measure()
        show(name, result[name])
    result["load average of the machine"] = os.getloadavg()[0]
    print(f"\n{save('projected', result)}")


def show(part: str, values: dict[str, Any]) -> None:
    print(f"\n{part}")
    for name, value in values.items():
        several = value if isinstance(value, dict) else {"": value}
        print(
            f"  {name:28}",
            "   ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in several.items()),
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
