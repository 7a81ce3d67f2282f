"""The adapter that adds nothing: W stays as it is.

With it a comparison gets its control, "these layers frozen, the rest trained".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lowrank.adapters.adapter import Additive, Site


@dataclass(frozen=True)
class Unchanged:
    """Makes an :class:`UnchangedAdapter`, which has no parameters."""

    def __call__(self, linear: Site | nn.Module) -> UnchangedAdapter:
        return UnchangedAdapter()


class UnchangedAdapter(Additive):
    """The adapter of :class:`Unchanged`: no parameters, and W stays as it is."""

    def add_(self, y: Tensor, x: Tensor, start: int = 0) -> Tensor:
        return y

    def merged(self, W: Tensor) -> Tensor:
        return W

    def settle_(self) -> None:
        pass
