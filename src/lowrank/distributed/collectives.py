"""A group of those who train together: its collectives, and how many bytes they are.

    group.sum_(tensors)         in place, bitwise the same on every member
    group.gather(tensors)       those of all members, in their order

A member is a process (``ProcessGroup``), or several that train in step and act as one (``workers.Workers``). Both give
``_add_up`` and ``_collect`` of one flat tensor; everything else is made of these two.

Bytes are what a ring sends per rank, whatever the backend does: 2(R−1)/R of a sum's bytes, R−1 times what one rank
contributes to a gather, all of a broadcast. A rank receives as much.

Shape legend: R members.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lowrank.infra.messages import decode, encode

T = TypeVar("T")
AnyTensor = TypeVar("AnyTensor", bound=Tensor)
BUCKET_BYTES = 25 * 2**20


@dataclass
class Traffic:
    """Bytes that one rank has sent and received; ``between``: of those sent, to ranks of other workers."""

    sent: int = 0
    received: int = 0
    collectives: int = 0
    between: int = 0

    def count(self, size: int, *, between: bool = False) -> None:
        self.sent, self.received, self.collectives = self.sent + size, self.received + size, self.collectives + 1
        self.between += size if between else 0


def ring_sum_bytes(size: int, ranks: int) -> int:
    """Bytes that each rank of a ring sends (and receives) to sum ``size`` bytes: scatter the sums, gather them.

    >>> ring_sum_bytes(1000, 4)
    1500
    """
    return 2 * (ranks - 1) * size // ranks


def ring_gather_bytes(size: int, ranks: int) -> int:
    """Bytes that each rank of a ring sends (and receives) until everyone has everyone's ``size`` bytes.

    >>> ring_gather_bytes(1000, 4)
    3000
    """
    return (ranks - 1) * size


def share(count: int, rank: int, ranks: int) -> range:
    """Which of ``count`` things are this rank's: consecutive, as even as it goes.

    >>> [list(share(5, rank, 2)) for rank in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(rank * count // ranks, (rank + 1) * count // ranks)


def largest_share(count: int, ranks: int) -> int:
    """The longest of the ranks' shares: what is gathered is padded to it."""
    return -(-count // ranks)


class Group(ABC):
    """This process, or those it acts with as one, among ``count``, as number ``rank``."""

    rank: int
    count: int
    device: torch.device
    traffic: Traffic

    @abstractmethod
    def _add_up(self, flat: Tensor) -> Callable[[], object]:
        """Start to replace ``flat`` (n,) by its sum over the members, counted; the function returned waits for it."""

    @abstractmethod
    def _collect(self, flat: Tensor) -> Callable[[], Tensor]:
        """Start to gather everyone's ``flat`` (n,), counted; the function returned waits for it, and gives (R, n)."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the members; all give the same shapes, in the same order.

        Sums are float32 or wider, whatever the tensors are. Each number is summed in one place and then passed on, so
        that all members hold the same bits.
        """
        self.start_sum(tensors)()

    def start_sum(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Start ``sum_`` and go on; the function returned waits for it and writes the sums. What the tensors are in the
        meantime does not matter."""
        started = []
        for bucket in buckets(tensors):
            flat = torch.cat([t.detach().reshape(-1).to(_wide(t.dtype)) for t in bucket])
            started.append((bucket, flat, self._add_up(flat)))

        def finish() -> None:
            for bucket, flat, wait in started:
                wait()
                for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view(tensor.shape))

        return finish

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """For each tensor everyone's, (R, ...); all members give the same shapes and dtypes, in the same order."""
        return self.start_gather(tensors)()

    def start_gather(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Start ``gather`` and go on; the function returned waits for it."""
        started = [
            (bucket, self._collect(torch.cat([t.detach().reshape(-1) for t in bucket]))) for bucket in buckets(tensors)
        ]

        def finish() -> list[Tensor]:
            gathered: list[Tensor] = []
            for bucket, wait in started:
                parts = wait().split([t.numel() for t in bucket], dim=1)
                gathered += [part.reshape(self.count, *t.shape) for part, t in zip(parts, bucket, strict=True)]
            return gathered

        return finish

    def gather_objects(self, value: T) -> list[T]:
        """The ``value`` of every member, in their order: a pytree of data and tensors (``infra.messages``), so that
        nothing that arrives can run code."""
        data = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8).to(self.device)
        sizes = self.gather([torch.tensor([data.numel()], device=self.device)])[0].flatten().tolist()
        padded = data.new_zeros(max(sizes))
        padded[: data.numel()] = data
        rows = self.gather([padded])[0].cpu()
        return [decode(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def total(self, *numbers: float) -> list[float]:
        """The sums over the members of a few numbers, in float64."""
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.sum_([values])
        return values.tolist()


def buckets(tensors: Sequence[AnyTensor], limit: int = BUCKET_BYTES) -> Iterator[list[AnyTensor]]:
    """Neighbours of one dtype together, up to ``limit`` bytes (or one larger tensor)."""
    bucket: list[AnyTensor] = []
    for tensor in tensors:
        size = sum(t.nbytes for t in bucket)
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > limit):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
