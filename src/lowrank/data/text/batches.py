"""What training reads: an endless sequence of batches, each a pure function of (seed, n)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

Batch = dict[str, Tensor]


class BatchSource(Protocol):
    """Resuming needs no state: ``batch(n)`` is the same whenever it is asked for."""

    @property
    def batches_per_epoch(self) -> int: ...

    def batch(self, n: int) -> Batch: ...
