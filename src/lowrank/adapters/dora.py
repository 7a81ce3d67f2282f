"""DoRA (arXiv 2402.09353): magnitude and direction apart.

    W' = m · V / ‖V‖,   V = W + Δ,   ‖V‖ the norm of each row (each output's weights), m (out,) trained

As in the paper (section 4.3), ‖V‖ is a constant in the backward pass. Δ is any adapter that shares the batch; for LoRA
the norms come from the factors, so that no matrix of W's size is made in a step.

Shapes: W, V (out, in), m (out,), x (batch, ..., in), y (batch, ..., out).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.adapter import Adapter, Site, splits_batch
from lowrank.adapters.lora import LoRA


@dataclass(frozen=True)
class DoRA:
    """Makes a :class:`DoRAAdapter`: a trained magnitude times the direction that ``inner`` changes.

    Raises:
        ValueError: an ``inner`` whose heads split the batch.
    """

    inner: Callable[[Site], Adapter] = field(default_factory=LoRA)

    def __post_init__(self) -> None:
        if splits_batch(self.inner):
            raise ValueError(
                "DoRA has one magnitude for all heads, so its heads cannot train on different data: use split=False"
            )

    def __call__(self, linear: Site | nn.Module) -> DoRAAdapter:
        return DoRAAdapter(self, Site.of(linear))


class DoRAAdapter(Adapter):
    """Parameters: ``magnitude`` (out,) and those of the inner adapter."""

    counts_merges = False

    def __init__(self, config: DoRA, site: Site):
        super().__init__(site)
        self.config = config
        self.inner = config.inner(site)
        self.heads = self.inner.heads
        with torch.no_grad():
            self.magnitude = nn.Parameter(self.inner.row_norms(site.weight))

    @property
    def merges(self) -> Tensor:  # type: ignore[override]
        """How often the adapter was merged, as the inner one counts it."""
        return self.inner.merges

    def _gain(self, W: Tensor) -> Tensor:
        """m / ‖V‖, (out,); exactly 1 for a fresh adapter, and 0 for a row of zeros, which has no direction."""
        with torch.no_grad():
            norms = self.inner.row_norms(W)
            norms = norms.masked_fill(norms == 0, math.inf)
        return self.magnitude / norms

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        return self._scaled(self.inner(x, W), W)

    def onto(self, y: Tensor, x: Tensor, W: Tensor) -> Tensor:
        return self._scaled(self.inner.onto(y, x, W), W)

    def _scaled(self, y: Tensor, W: Tensor) -> Tensor:
        return torch.addcmul(y, y, (self._gain(W) - 1).to(y.dtype))  # bfloat16 is coarse near 1, and fine near 0

    def rows(self, ids: Tensor, W: Tensor) -> Tensor:
        y = self.inner.rows(ids, W)
        return torch.addcmul(y, y, F.embedding(ids, (self._gain(W) - 1)[:, None]).to(y.dtype))

    def merged(self, W: Tensor) -> Tensor:
        V = self.inner.merged(W.to(self.magnitude.dtype))
        return (V * self._gain(W)[:, None]).to(W.dtype)

    @torch.no_grad()
    def settle_(self) -> None:
        self.inner.settle_()
        self.magnitude.abs_()  # rows of W' have norm |m|: the sign of m is now in their direction
