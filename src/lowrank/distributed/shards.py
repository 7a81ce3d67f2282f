"""Parameters of which every rank holds a part (FSDP2's ``fully_shard``: DTensors on a mesh of one dimension).

    part = shard_of(p, ranks)       which part of p this rank holds; None where it holds the whole
    part.narrow(whole)                this rank's part of a tensor of that shape
    part.gather(mine)              everyone's parts together
    unsharded_parameter(module, …)     for a moment one parameter of a module is whole, to be changed in place

A dimension of n numbers is cut into R pieces of ⌈n/R⌉, the last one what is left, as ``torch.chunk`` does. All
that is said here goes through ``Ranks``, which counts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.distributed.process_group import Ranks


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's part of a parameter of ``shape``, which is cut along ``dim``."""

    shape: tuple[int, ...]
    dim: int
    ranks: Ranks

    @property
    def start(self) -> int:
        """The first row (column, …) of this rank."""
        return self.ranks.rank * self._piece(self.shape[self.dim])

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's part."""
        size = self.shape[self.dim]
        length = min(self._piece(size), size - self.start)
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    def _piece(self, size: int) -> int:
        return largest_piece(size, self.ranks.count)

    def narrow(self, whole: Tensor, dim: int | None = None) -> Tensor:
        """This rank's part of ``whole``, a view; it is cut along ``dim`` where that differs."""
        dim = self.dim if dim is None else dim
        return whole.narrow(dim, self.start, self.local_shape[self.dim])

    def gather(self, mine: Tensor, dim: int | None = None) -> Tensor:
        """Everyone's parts in their order; every rank must call it."""
        dim = self.dim if dim is None else dim % mine.dim()
        size = self.shape[self.dim]
        missing = self._piece(size) - mine.shape[dim]
        padded = F.pad(mine, (0, 0) * (mine.dim() - 1 - dim) + (0, missing)) if missing else mine
        return torch.cat(list(self.ranks.gather([padded])[0]), dim=dim).narrow(dim, 0, size)

    def total(self, mine: Tensor) -> Tensor:
        """The sum over the ranks of a tensor that each has, the same bits on all."""
        summed = mine.clone()
        self.ranks.sum_([summed])
        return summed


@dataclass(frozen=True)
class ShardSpec:
    """A tensor of ``shape`` of which each rank holds a piece along ``dim``, cut as ``part`` is."""

    part: Shard
    dim: int
    shape: tuple[int, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's piece."""
        length = self.part.local_shape[self.part.dim]
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    def as_dtensor(self, mine: Tensor) -> Tensor:
        """The whole as torch sees it, a DTensor, of which ``mine`` is this rank's piece."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Placement

        placed: Any = [Placement(self.dim)]
        stride = torch.empty(self.shape, device="meta").stride()
        whole: Tensor = DTensor.from_local(
            mine, self.part.ranks.mesh, placed, run_check=False, shape=torch.Size(self.shape), stride=stride
        )
        return whole


def largest_piece(size: int, ranks: int) -> int:
    """What all ranks but perhaps the last hold of ``size`` rows."""
    return -(-size // ranks)


def all_hold_some(size: int, ranks: int) -> bool:
    """Whether no rank is left without a row.

    >>> [all_hold_some(size, 4) for size in (3, 4, 5, 7)]
    [False, True, False, True]
    """
    return (ranks - 1) * largest_piece(size, ranks) < size


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "device_mesh")


def to_local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: for most the tensor itself; without its history."""
    held: Any = tensor.detach()
    return held.to_local() if is_sharded(tensor) else held


def shard_of(p: Tensor, ranks: Ranks | None, name: str = "the parameter") -> Shard | None:
    """Which part of ``p`` this rank holds, or None where ``p`` is an ordinary tensor.

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
    """Let go of weights that an evaluation has left whole, so that every parameter is its part again."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            module.reshard()  # type: ignore[operator]


@contextmanager
def unsharded_parameter(module: nn.Module, name: str, ranks: Ranks | None) -> Iterator[None]:
    """Meanwhile the module's own parameter ``name`` is whole, to be changed in place by all ranks alike.

    Each rank keeps its part of what has become of it. Where it is not sharded nothing happens.
    """
    own = module._parameters[name]
    part = None if own is None else shard_of(own, ranks, name)
    if own is None or part is None:
        yield
        return
    whole = nn.Parameter(part.gather(to_local(own)), requires_grad=False)
    module._parameters[name] = whole
    try:
        yield
        to_local(own).copy_(part.narrow(whole.detach()))
    finally:
        module._parameters[name] = own
