"""One of several ranks, without the others: for plans, which start no processes.

    with simulated(8) as ranks:      rank 0 of 8; collectives have the right shapes and are counted, and nothing is sent

What the others would send is unknown: a sum stays what this rank gave, and what it gathers has no meaning. So shapes,
bytes and memory are right, and numbers are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank.distributed.collectives import Traffic
from lowrank.distributed.process_group import ProcessGroup

T = TypeVar("T")


class SimulatedGroup(ProcessGroup):
    """Rank ``rank`` of ``count`` on torch's backend that sends nothing. Final."""

    def __init__(self, count: int, rank: int):
        self.rank, self.count, self.device, self.timeout = rank, count, torch.device("cpu"), 1.0
        self.traffic, self.between, self.numbers = Traffic(), True, range(count)
        self.process_group = dist.group.WORLD
        self._mesh, self._divided, self._addresses = None, {}, [("", 0)] * count

    def __str__(self) -> str:
        return f"{self.count} ranks, none of them started: this is rank {self.rank}"

    def gather_objects(self, value: T) -> list[T]:
        return [value] * self.count

    def agree(self, facts: Mapping[str, object]) -> None:
        """All are as this one is."""

    def agree_on(self, tensors: Mapping[str, Tensor]) -> None:
        """All have what this one has, which may have no numbers."""


@contextmanager
def simulated(count: int, rank: int = 0) -> Iterator[ProcessGroup]:
    """Rank ``rank`` of ``count``.

    Raises:
        ValueError: this process is one of several already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    if dist.is_initialized():
        raise ValueError("this process is one of several already: plan in a process of its own, without torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield SimulatedGroup(count, rank)
    finally:
        dist.destroy_process_group()
