"""torch's GradScaler for steps inside the backward pass, where each gradient is freed before the next one is there.

A layer whose gradient overflows skips its step; after the backward pass the scale grows or backs off as it would have,
through GradScaler's public interface, since the gradients that it would read are gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.optim.rules import wide


class LayerScaler:
    """A ``GradScaler`` that is asked layer by layer. ``age``: steps since the scale last changed. Final."""

    def __init__(self, scaler: torch.amp.GradScaler):
        self.scaler, self.age = scaler, 0
        self._overflowed: list[Tensor] = []
        self._inverse: Tensor | None = None

    def unscaled(self, g: Tensor) -> Tensor | None:
        """The gradient divided by the scale; None where it overflowed and this layer must skip the step."""
        if self._inverse is None:
            self._inverse = torch.full((), 1.0 / self.scaler.get_scale())  # on the CPU it multiplies anywhere
        finite = g.isfinite().all()
        self._overflowed.append(~finite)
        return g.to(wide(g.dtype)).mul_(self._inverse) if finite else None

    def finish(self) -> None:
        """Update the scale after a backward pass."""
        if self._overflowed:
            self._update(any(bool(overflowed) for overflowed in self._overflowed))
        self._overflowed, self._inverse = [], None

    def _update(self, overflowed: bool) -> None:
        scale = self.scaler.get_scale()
        self.age = 0 if overflowed else self.age + 1
        if overflowed:
            self.scaler.update(scale * self.scaler.get_backoff_factor())
        elif self.age >= self.scaler.get_growth_interval():
            self.scaler.update(scale * self.scaler.get_growth_factor())
            self.age = 0
