"""Sums of gradients that are under way while the backward pass goes on, as torch's DDP has them.

Parameters are put into buckets in the reverse of their order, which is about that in which their gradients are ready.
As soon as all of a bucket are, and all buckets before it have been sent, its sum is started: so every rank starts the
same sums in the same order, whichever parameters it has used. What was not started by then is when the sums are needed.

Beside DDP's: a gradient of which the coming step needs R = QᵀG alone travels as R and is freed at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank.distributed.collectives import Group, buckets
from lowrank.optim.gradient_sync import Finish, Fold, start_sum

SMALL = 4 * 2**20  # bytes of a bucket: the smaller, the sooner the first is sent


class EarlySums:
    """The sums of one optimizer's gradients; told of each gradient, and finished once a step. Final.

    Args:
        summed: over whom each parameter's gradient is summed.
        fold: the gradient in the smaller form that may stand for it, or None.
        micro_batches: backward passes in a step.
    """

    def __init__(self, summed: Mapping[nn.Parameter, Group], fold: Fold, micro_batches: int):
        self.fold, self.micro_batches = fold, micro_batches
        self._buckets: list[tuple[Group, list[nn.Parameter]]] = []
        for group in dict.fromkeys(summed.values()):
            params = [p for p, over in reversed(list(summed.items())) if over is group]
            self._buckets += [(group, bucket) for bucket in buckets(params, SMALL)]
        self._bucket_of = {p: i for i, (_, bucket) in enumerate(self._buckets) for p in bucket}
        self._reset()

    @property
    def params(self) -> list[nn.Parameter]:
        """Those whose gradients are summed."""
        return list(self._bucket_of)

    def _reset(self) -> None:
        self._seen = dict.fromkeys(self._bucket_of, 0)
        self._missing = [len(bucket) for _, bucket in self._buckets]
        self._started: list[Finish] = []

    @torch.no_grad()
    def arrived(self, p: nn.Parameter) -> None:
        """To be called from the hook of each: the gradient of ``p`` for one micro-batch is complete."""
        self._seen[p] += 1
        if self._seen[p] > self.micro_batches:
            raise RuntimeError(
                f"a gradient came {self._seen[p]} times, and its sum over the ranks may be under way since the "
                f"{self.micro_batches}. time: call step() after {self.micro_batches} backward passes, or tell "
                "sum_during_backward() how many your loop makes"
            )
        if self._seen[p] == self.micro_batches:
            self._missing[self._bucket_of[p]] -= 1
            while len(self._started) < len(self._buckets) and not self._missing[len(self._started)]:
                self._start()

    def _start(self) -> None:
        group, params = self._buckets[len(self._started)]
        self._started.append(start_sum(group, params, self.fold))

    def finish(self, held: dict[nn.Parameter, Tensor]) -> None:
        """Start what has not been, and wait for all: gradients are then the sums, and those that travelled folded are
        in ``held``. Every rank must call it."""
        while len(self._started) < len(self._buckets):
            self._start()
        for wait in self._started:
            wait(held)
        self._reset()

    def drop(self) -> None:
        """Wait for what is under way, and forget it."""
        for wait in self._started:
            wait({})
        self._reset()
