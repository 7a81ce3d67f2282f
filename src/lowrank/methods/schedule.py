"""Learning-rate schedules: pure functions of the step.

A schedule maps `step`, the number of optimizer steps already completed (so the first step asks for 0), to a factor.
The factor of a step is the run's schedule times the method's own (`Method.lr`), so a restart re-warms under the
run's envelope:

    lr(step) = lr · Envelope(step) · Rewarm(step)

    Envelope   (step + 1) / (warmup + 1)                                    step < warmup
               min_ratio + (1 - min_ratio) · shape(progress)                afterwards; progress runs from 0 to 1
    Rewarm     1                                                            before the first restart
               min(1, (steps since the restart + 1) / (warmup + 1))         after it

Sources: linear warm-up with cosine decay, SGDR (arXiv 1608.03983); the jagged schedule of ReLoRA (arXiv 2307.05695).
Deviation: the decay reaches `min_ratio` in the last step itself, not in the step after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lowrank.infra.checks import check_choice

Schedule = Callable[[int], float]
Shape = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The factor 1, whatever the step.

    >>> constant(0), constant(10_000)
    (1.0, 1.0)
    """

    def __call__(self, step: int) -> float:
        return 1.0


constant = Constant()


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """Linear warm-up, then decay to `min_ratio` at the last of `steps` steps; `min_ratio` for every step beyond.

    Args:
        steps: the horizon, in optimizer steps.
        warmup: steps of linear warm-up; step 0 has the factor 1 / (warmup + 1), step `warmup` the factor 1.
        min_ratio: the factor of the last step (ignored by "constant", which does not decay).
        shape: "cosine", "linear" or "constant".

    Raises:
        ValueError: a horizon below 1, a warm-up outside [0, steps], a ratio outside [0, 1], an unknown shape.

    >>> [round(Envelope(steps=5, warmup=1, min_ratio=0.0, shape="linear")(step), 3) for step in range(6)]
    [0.5, 1.0, 0.667, 0.333, 0.0, 0.0]
    """

    steps: int
    warmup: int = 0
    min_ratio: float = 0.1
    shape: Shape = "cosine"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a schedule needs at least 1 step, got steps={self.steps}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup={self.warmup} must lie between 0 and the run's {self.steps} steps")
        if not 0.0 <= self.min_ratio <= 1.0:
            raise ValueError(f"min_ratio={self.min_ratio} must lie between 0 and 1")
        check_choice("schedule", self.shape, Shape)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.shape == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - 1 - self.warmup))
        if self.shape == "linear":
            fall = 1.0 - progress
        else:
            fall = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.min_ratio + (1.0 - self.min_ratio) * fall


@dataclass(frozen=True, kw_only=True)
class Rewarm:
    """A multiplier that ramps up anew after every restart (a merge after each `every` completed steps).

    Args:
        every: steps between restarts; the first step after one has `step % every == 0`.
        warmup: steps of the ramp; 0 never lowers the rate.

    Raises:
        ValueError: `every` below 1, or a ramp that would not end before the next restart.

    >>> [Rewarm(every=4, warmup=1)(step) for step in range(9)]
    [1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5]
    """

    every: int
    warmup: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"restarts come after at least 1 step, got every={self.every}")
        if not 0 <= self.warmup < self.every:
            raise ValueError(
                f"re-warming over warmup={self.warmup} steps must end before the next restart, every={self.every} steps"
            )

    def __call__(self, step: int) -> float:
        if step < self.every:
            return 1.0
        return min(1.0, (step % self.every + 1) / (self.warmup + 1))
