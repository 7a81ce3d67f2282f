"""Which sides of a matrix are projected, and the shapes that follow: of the bases Q and of R (see ``projected``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

from torch import Tensor

from lowrank.linalg.basis import Side

ProjectedSide = Literal["short", "long", "left", "right", "both"]


def sides_of(side: ProjectedSide, rows: int, cols: int) -> tuple[Side, ...]:
    """The sides that get a basis; of a square the columns are the short side."""
    if side == "both":
        return ("left", "right")
    if side == "left" or side == "right":
        return (side,)
    return ("right",) if (rows >= cols) == (side == "short") else ("left",)


@lru_cache(maxsize=1024)
def basis_shapes(shape: tuple[int, ...], side: ProjectedSide, rank: int) -> dict[Side, tuple[int, ...]]:
    """The shape (..., size of the side, rank) of each basis for a stack of matrices."""
    *lead, rows, cols = shape
    sizes: dict[Side, int] = {"left": rows, "right": cols}
    return {s: (*lead, sizes[s], min(rank, rows, cols)) for s in sides_of(side, rows, cols)}


def inside_shape(shape: tuple[int, ...], side: ProjectedSide, rank: int) -> tuple[int, ...]:
    """The shape of R for a stack of matrices of ``shape`` (..., rows, cols)."""
    *lead, rows, cols = shape
    bases = basis_shapes(shape, side, rank)
    return (*lead, bases["left"][-1] if "left" in bases else rows, bases["right"][-1] if "right" in bases else cols)


@contextmanager
def matrices_of(params: Sequence[Tensor], shape: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """Tensors in another shape, to change in place; where memory has no such view, a copy that is written back."""
    matrices = [p if p.shape == shape else p.reshape(shape) for p in params]
    yield matrices
    for p, matrix in zip(params, matrices, strict=True):
        if matrix is not p and matrix.data_ptr() != p.data_ptr():
            p.copy_(matrix.view(p.shape))
