"""The adapter that adds nothing: W stays as it is.

With it a comparison gets its control, "these layers frozen, the rest trained".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.adapters.adapter import Additive, Site


@dataclass(frozen=True)
class Unchanged:
    """Makes an :class:`UnchangedAdapter`, which has no parameters."""

    def __call__(self, linear: Site | nn.Module) -> UnchangedAdapter:
        return UnchangedAdapter(self, Site.of(linear))


class UnchangedAdapter(Additive):
    """The adapter of :class:`Unchanged`: no parameters, and W stays as it is."""

    counts_merges = False

    def __init__(self, config: Unchanged, site: Site):
        super().__init__(site)
        self.config = config

    @property
    def merges(self) -> Tensor:  # type: ignore[override]
        """None: W is not changed, and so never rounded."""
        return torch.zeros((), dtype=torch.int64)

    def add_(self, y: Tensor, x: Tensor, start: int = 0) -> Tensor:
        return y

    def merged(self, W: Tensor) -> Tensor:
        return W

    def settle_(self) -> None:
        pass
