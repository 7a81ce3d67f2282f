"""Parameters of which every rank holds a shard (FSDP2's ``fully_shard``: DTensors on a mesh of one dimension).

    shard = shard_of(p, ranks)           which shard of p this rank holds; None where it holds the full tensor
    shard.narrow(full)                   this rank's shard of a tensor of that shape
    shard.gather(mine)                   the shards of all ranks together
    unsharded_parameter(module, …)       for a moment one parameter of a module is full, to be changed in place

A dimension of n numbers is cut into R pieces of ⌈n/R⌉, the last one what is left, as ``torch.chunk`` does. All that is
sent here goes through ``ProcessGroup``, which counts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.distributed.collectives import largest_share
from lowrank.distributed.process_group import ProcessGroup


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's shard of a parameter of ``shape``, which is cut along ``dim``."""

    shape: tuple[int, ...]
    dim: int
    ranks: ProcessGroup

    @property
    def start(self) -> int:
        """The first row (column, …) of this rank."""
        return self.ranks.rank * self._largest

    @property
    def length(self) -> int:
        """The rows (columns, …) of this rank."""
        return min(self._largest, self.shape[self.dim] - self.start)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.dim], self.length, *self.shape[self.dim + 1 :])

    @property
    def _largest(self) -> int:
        return largest_share(self.shape[self.dim], self.ranks.count)

    def narrow(self, full: Tensor, dim: int | None = None) -> Tensor:
        """This rank's shard of ``full``, a view; it is cut along ``dim`` where that differs."""
        return full.narrow(self.dim if dim is None else dim, self.start, self.length)

    def gather(self, mine: Tensor, dim: int | None = None) -> Tensor:
        """The shards of all ranks in their order; every rank must call it."""
        dim = self.dim if dim is None else dim % mine.dim()
        missing = self._largest - mine.shape[dim]
        padded = F.pad(mine, (0, 0) * (mine.dim() - 1 - dim) + (0, missing)) if missing else mine
        return torch.cat(list(self.ranks.gather([padded])[0]), dim=dim).narrow(dim, 0, self.shape[self.dim])

    def total(self, mine: Tensor) -> Tensor:
        """The sum over the ranks of a tensor that each has, the same bits on all."""
        summed = mine.clone()
        self.ranks.sum_([summed])
        return summed


@dataclass(frozen=True)
class ShardSpec:
    """A tensor of ``shape`` that is sharded along ``dim``, cut as ``shard`` is."""

    shard: Shard
    dim: int
    shape: tuple[int, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.dim], self.shard.length, *self.shape[self.dim + 1 :])

    def as_dtensor(self, mine: Tensor) -> Tensor:
        """The full tensor as torch sees it, of which ``mine`` is this rank's shard."""
        from torch.distributed import tensor

        placed: Any = [tensor.Shard(self.dim)]
        stride, mesh = torch.empty(self.shape, device="meta").stride(), self.shard.ranks.mesh
        full: Tensor = tensor.DTensor.from_local(
            mine, mesh, placed, run_check=False, shape=torch.Size(self.shape), stride=stride
        )
        return full


def all_hold_some(size: int, ranks: int) -> bool:
    """Whether no rank is left without a row.

    >>> [all_hold_some(size, 4) for size in (3, 4, 5, 7)]
    [False, True, False, True]
    """
    return (ranks - 1) * largest_share(size, ranks) < size


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this process holds a shard."""
    return hasattr(tensor, "device_mesh")


def to_local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: for most the tensor itself; without its history."""
    held: Any = tensor.detach()
    return held.to_local() if is_sharded(tensor) else held


def shard_of(p: Tensor, ranks: ProcessGroup | None, name: str = "the parameter") -> Shard | None:
    """Which shard of ``p`` this rank holds, or None where ``p`` is an ordinary tensor.

    Raises:
        ValueError: it is cut in a way that this library does not follow.
    """
    if not is_sharded(p):
        return None
    cut: Any = p
    remedy = "apply_(model, method, ranks=ranks, workers=1), then lowrank.plan.fsdp.shard_(plan)"
    if ranks is None:
        raise ValueError(f"{name} is sharded over several processes, and the plan knows of one: {remedy}")
    placement = cut.placements[0]
    if cut.device_mesh.ndim != 1 or cut.device_mesh.size() != ranks.count or type(placement).__name__ != "Shard":
        raise ValueError(
            f"{name} is placed as {cut.placements} on a mesh of {tuple(cut.device_mesh.shape)}; followed is Shard on a "
            f"mesh of one dimension with all {ranks.count} ranks: {remedy}"
        )
    if not all_hold_some(p.shape[placement.dim], ranks.count):
        raise ValueError(
            f"{name} {tuple(p.shape)} is cut along dimension {placement.dim}, which leaves a rank of {ranks.count} "
            f"without any of it: {remedy}"
        )
    return Shard(tuple(p.shape), placement.dim, ranks)


def reshard_(model: nn.Module) -> None:
    """Let go of weights that an evaluation has left full, so that every parameter is its shard again."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            module.reshard()  # type: ignore[operator]


@contextmanager
def unsharded_parameter(module: nn.Module, name: str, ranks: ProcessGroup | None) -> Iterator[None]:
    """Meanwhile the module's own parameter ``name`` is full, to be changed in place by all ranks alike.

    Each rank keeps its shard of what has become of it. Where it is not sharded nothing happens.
    """
    own = module._parameters[name]
    shard = None if own is None else shard_of(own, ranks, name)
    if own is None or shard is None:
        yield
        return
    full = nn.Parameter(shard.gather(to_local(own)), requires_grad=False)
    module._parameters[name] = full
    try:
        yield
        to_local(own).copy_(shard.narrow(full.detach()))
    finally:
        module._parameters[name] = own
