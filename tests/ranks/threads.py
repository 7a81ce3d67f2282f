"""Several workers as threads of this process: for what needs their numbers, and no processes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowrank.distributed.collectives import Group, Traffic, ring_gather_bytes, ring_sum_bytes

T = TypeVar("T")


class Threads(Group):
    """Worker ``rank`` of as many as there are places on the ``board`` that they share."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier):
        self.rank, self.count, self.board, self.barrier = rank, len(board), board, barrier
        self.device, self.traffic = torch.device("cpu"), Traffic()

    def _all(self, flat: Tensor) -> Tensor:
        self.board[self.rank] = flat.clone()
        self.barrier.wait(30)
        found = torch.stack(self.board)
        self.barrier.wait(30)
        return found

    def _add_up(self, flat: Tensor) -> Callable[[], object]:
        self.traffic.count(ring_sum_bytes(flat.nbytes, self.count))
        total = self._all(flat).sum(dim=0)
        return lambda: flat.copy_(total)

    def _collect(self, flat: Tensor) -> Callable[[], Tensor]:
        self.traffic.count(ring_gather_bytes(flat.nbytes, self.count))
        found = self._all(flat)
        return lambda: found


def together(count: int, function: Callable[[Any], T]) -> Sequence[T]:
    """What ``function`` returns on each of so many workers, which is given to it."""
    board, barrier = [None] * count, threading.Barrier(count)

    def one(rank: int) -> T:
        try:
            return function(Threads(rank, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(pool.map(one, range(count)))
