"""Who trains apart, and who in step: the ranks divided into workers.

A worker is one rank or several consecutive ones. The ranks of one worker train one copy of the model in step (data
parallel, whole or sharded); workers train apart and synchronise now and then. Of six ranks in two workers:

    worker 0: ranks 0 1 2      intra-worker group of rank 1: 0 1 2      cross-worker group of rank 1: 1 4
    worker 1: ranks 3 4 5      intra-worker group of rank 4: 3 4 5      cross-worker group of rank 4: 1 4

That is a device mesh of two dimensions: fast links inside a worker (a node), slow ones across workers (nodes).
``Workers`` is a group in which each worker acts as one rank. What a worker sends is the same on all its ranks, so each
of them carries only its share of it across, and the shares are put together inside the worker: between workers every
number travels once, over all the connections that there are.

Shape legend: W workers of L ranks each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lowrank.distributed.collectives import Group, largest_share
from lowrank.distributed.process_group import ProcessGroup, world_size


class Workers(Group):
    """The workers as if each were one rank; what is given to it must be the same on all ranks of a worker. Final."""

    def __init__(self, intra_worker: ProcessGroup, cross_worker: ProcessGroup):
        self.intra_worker, self.cross_worker = intra_worker, cross_worker
        self.rank, self.count = cross_worker.rank, cross_worker.count
        self.device, self.traffic = intra_worker.device, intra_worker.traffic

    def _add_up(self, flat: Tensor) -> Callable[[], None]:
        mine = self._share_of(flat)
        wait = self.cross_worker._add_up(mine)

        def finish() -> None:
            wait()
            flat.copy_(self.intra_worker._collect(mine)().flatten()[: flat.numel()])

        return finish

    def _collect(self, flat: Tensor) -> Callable[[], Tensor]:
        wait = self.cross_worker._collect(self._share_of(flat))

        def finish() -> Tensor:
            shares = self.intra_worker._collect(wait().flatten())()  # (L, W · share)
            whole = shares.view(self.intra_worker.count, self.count, -1).transpose(0, 1).reshape(self.count, -1)
            return whole[:, : flat.numel()]

        return finish

    def _share_of(self, flat: Tensor) -> Tensor:
        """What this rank carries of ``flat``: one of L equal pieces, the last ones padded."""
        size = largest_share(flat.numel(), self.intra_worker.count)
        padded = F.pad(flat, (0, size * self.intra_worker.count - flat.numel()))
        return padded[self.intra_worker.rank * size :][:size].clone()


class WorldGroup(Group):
    """All ranks, who add up by two levels: first inside each worker, then across workers. So a sum crosses the slow
    links once, in shares, where a ring of all ranks would carry all of it over each. Final."""

    def __init__(self, ranks: ProcessGroup, intra_worker: ProcessGroup, workers: Workers):
        self.intra_worker, self.workers = intra_worker, workers
        self.rank, self.count, self.device, self.traffic = ranks.rank, ranks.count, ranks.device, ranks.traffic

    def _add_up(self, flat: Tensor) -> Callable[[], None]:
        self.intra_worker._add_up(flat)()
        return self.workers._add_up(flat)

    def _collect(self, flat: Tensor) -> Callable[[], Tensor]:
        wait = self.workers._collect(self.intra_worker._collect(flat)().flatten())
        return lambda: wait().reshape(self.count, flat.numel())


@dataclass(frozen=True)
class ProcessLayout:
    """How the ranks of a run are divided (module docstring); everything is None in one process.

    Args:
        ranks: all of them.
        workers: those who train apart, of which each acts as one; None where all ranks are one worker.
        intra_worker: the ranks of this worker; None where it is the only one.
        cross_worker: the ranks at the same place in all workers; None where there is one worker.
        world: all ranks as a group that adds up by the shortest way.
        in_step: all ranks are one worker, as was asked for, whether or not there are several.
    """

    ranks: ProcessGroup | None = None
    workers: Group | None = None
    intra_worker: ProcessGroup | None = None
    cross_worker: ProcessGroup | None = None
    world: Group | None = None
    in_step: bool = False

    @property
    def worker(self) -> int:
        """Which worker this is."""
        return 0 if self.workers is None else self.workers.rank

    @property
    def workers_count(self) -> int:
        """How many workers there are."""
        return 1 if self.workers is None else self.workers.count

    @property
    def is_mesh(self) -> bool:
        """Whether there are several workers of several ranks."""
        return self.intra_worker is not None and self.workers is not None

    @property
    def ranks_per_worker(self) -> int:
        """Ranks in this worker."""
        return 1 if self.intra_worker is None else self.intra_worker.count


def process_layout(ranks: ProcessGroup | None, workers: int | None) -> ProcessLayout:
    """The ranks divided into so many workers of equal size; None: every rank is one. All ranks must call it.

    Raises:
        ValueError: the ranks cannot be divided so.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if ranks is None:
        return ProcessLayout(in_step=workers == 1)
    if workers == 1:
        return ProcessLayout(ranks, intra_worker=ranks, world=ranks, in_step=True)
    if workers is None or workers == ranks.count:
        return ProcessLayout(ranks, workers=ranks, cross_worker=ranks, world=ranks)
    if ranks.count % workers:
        fitting = [n for n in range(1, ranks.count + 1) if ranks.count % n == 0]
        raise ValueError(
            f"{ranks.count} ranks cannot be divided into {workers} workers of equal size: use one of "
            f"{', '.join(map(str, fitting))}"
        )
    size = ranks.count // workers
    intra_worker = ranks.divided([range(first, first + size) for first in range(0, ranks.count, size)], between=False)
    cross_worker = ranks.divided([range(place, ranks.count, size) for place in range(size)], between=True)
    together = Workers(intra_worker, cross_worker)
    return ProcessLayout(ranks, together, intra_worker, cross_worker, WorldGroup(ranks, intra_worker, together))


def nodes() -> int:
    """Machines in the group that ``torchrun`` started.

    Raises:
        ValueError: they have different numbers of ranks, or ``torchrun`` has not started this process.
    """
    here, machines = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("GROUP_WORLD_SIZE")
    if world_size() == 1:
        return 1
    if here is None or machines is None:
        raise ValueError("--workers nodes: torchrun has not said how many nodes there are; give a number of workers")
    if int(here) * int(machines) != world_size():
        raise ValueError(
            f"--workers nodes: {here} of {world_size()} ranks are on this node, so the {machines} nodes do not all "
            "have as many: start as many on each (--nproc-per-node), or give a number of workers"
        )
    return int(machines)
