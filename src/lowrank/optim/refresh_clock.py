"""When a basis is refreshed: the clock of a projected matrix, and how lazily it goes.

    due at steps 0, T − phase, 2T − phase, …   phase = frac(index·φ)·T spreads any number of layers over the interval

The clock is five int64 scalars on the CPU, so that an ordinary step on a GPU never waits for it:

    step       steps done
    due        the step of the next refresh
    index      which parameter this is (phase, random streams)
    refreshes  refreshes done
    failures   matrices that had to keep their old basis, summed over the refreshes
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lowrank.infra.seeds import stable_seed
from lowrank.optim.rules import State
from lowrank.optim.stacks import add_one_

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """Q-GaLore's lazy refresh (arXiv 2407.08296): where the subspace has stopped moving, refresh it less often.

    After a refresh the |cosine| between the old and the new leading vector is noted (absolute, as signs are
    arbitrary; the mean over a stack and over both sides). Once the last ``window`` of them average at least
    ``threshold``, the interval of this parameter is multiplied by ``factor`` and the window starts anew.

    Args:
        threshold: the mean |cosine| that counts as standing still, in (0, 1].
        factor: by which the interval grows, above 1.
        window: refreshes that are averaged.

    Raises:
        ValueError: a value out of its range.
    """

    threshold: float = 0.4
    factor: float = 2.0
    window: int = 5

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0 or not self.factor > 1.0 or self.window < 1:
            raise ValueError(f"{self!r}: threshold must lie in (0, 1], factor be above 1 and window at least 1")

    def init(self, interval: int) -> State:
        """Fresh state: the interval in steps, and an empty window (−1 stands for no cosine yet)."""
        return {
            "interval": torch.tensor(interval, dtype=torch.int64, device="cpu"),
            "cosines": torch.full((self.window,), -1.0, dtype=torch.float32, device="cpu"),
        }

    def note_(self, state: State, old: Iterable[Tensor], new: Iterable[Tensor]) -> None:
        """Note how far the leading vectors have moved, and widen the interval if they have long stood still."""
        moved = [(a[..., 0] * b[..., 0]).sum(dim=-1).abs().mean() for a, b in zip(old, new, strict=True)]
        cosine = torch.stack(moved).mean().float().cpu()
        window, interval = cast(Tensor, state["cosines"]), cast(Tensor, state["interval"])
        window.copy_(torch.cat((window[1:], cosine[None])))
        if bool((window >= 0).all()) and float(window.mean()) >= self.threshold:
            interval.fill_(int(int(interval) * self.factor))
            window.fill_(-1.0)


def new_clock() -> State:
    """The clock at step 0 (module docstring)."""
    names = ("step", "due", "index", "refreshes", "failures")
    return {name: torch.zeros((), dtype=torch.int64, device="cpu") for name in names}


def is_due(clock: State) -> bool:
    """Whether the coming step refreshes the basis."""
    return count(clock, "step") >= count(clock, "due")


def are_due(clocks: list[State]) -> list[bool]:
    """``is_due`` of many clocks."""
    return [step >= due for step, due in zip(counts(clocks, "step"), counts(clocks, "due"), strict=True)]


def counts(clocks: list[State], name: str) -> list[int]:
    """``count`` of many clocks."""
    every: Any = clocks
    return [clock[name].item() for clock in every]


def count(clock: State, name: str) -> int:
    return int(cast(Tensor, clock[name]))


def advance_(clock: State, name: str, by: int = 1) -> None:
    cast(Tensor, clock[name]).add_(by)


def advance_all_(clocks: list[State], name: str) -> None:
    """``advance_`` of many clocks by 1."""
    every: Any = clocks
    add_one_([clock[name] for clock in every])


def schedule_next_(clock: State, interval: int, *, stagger: bool) -> None:
    """Set the step of the next refresh; the first interval is shortened by the phase."""
    first = count(clock, "step") == 0
    phase = int(count(clock, "index") * GOLDEN % 1.0 * interval) if stagger and first else 0
    cast(Tensor, clock["due"]).fill_(count(clock, "step") + interval - phase)


def stream(clock: State) -> int:
    """The seed of everything random in the present basis of this parameter."""
    return stable_seed(count(clock, "index"), count(clock, "refreshes"))


def streams(clocks: list[State]) -> list[int]:
    """``stream`` of many clocks."""
    return [stable_seed(*pair) for pair in zip(counts(clocks, "index"), counts(clocks, "refreshes"), strict=True)]
