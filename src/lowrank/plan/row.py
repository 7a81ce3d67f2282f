"""A row of the plan: one parameter, who trains it, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lowrank.methods import Use
from lowrank.methods.method import Group
from lowrank.optim.rules import Rule

ADAPTER = "adapter"  # why a factor trains
Across = Literal["shared", "own", "local"]


@dataclass(frozen=True)
class Row:
    """One parameter of the model under the plan: its rule, or why it does not train.

    ``across`` says how several ranks train it: ``shared``: the same on all, its gradients are summed; ``own``: heads
    that this worker alone trains; ``local``: each worker trains its own copy, which is averaged now and then.
    ``lr`` and ``decay`` are ratios to the run's, ``group`` (``methods.groups``) is what they depend on beside the Use.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    use: Use | None
    rule: Rule | None
    why: str
    across: Across = "shared"
    group: Group | None = None
    lr: float = 1.0
    decay: float = 1.0

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def is_factor(self) -> bool:
        """Whether it belongs to an adapter."""
        return self.why == ADAPTER
