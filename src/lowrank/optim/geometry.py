"""Which sides of a matrix are projected, and the shapes that follow: of the bases Q and of R (see ``projected``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from torch import Tensor

from lowrank.linalg.basis import Side

ProjectedSide = Literal["short", "long", "left", "right", "both"]


def check_side(side: str) -> None:
    """Raise ValueError for an unknown side."""
    if side not in get_args(ProjectedSide):
        raise ValueError(f"side={side!r} is unknown; it is one of {', '.join(get_args(ProjectedSide))}")


def sides_of(side: ProjectedSide, rows: int, cols: int) -> tuple[Side, ...]:
    """The sides that get a basis; of a square the columns are the short side."""
    if side == "both":
        return ("left", "right")
    if side == "left" or side == "right":
        return (side,)
    return ("right",) if (rows >= cols) == (side == "short") else ("left",)


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
def matrix_of(p: Tensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """``p`` in another shape, to change in place; where its memory has no such view, a copy that is written back."""
    matrix = p.reshape(shape)
    yield matrix
    if matrix.data_ptr() != p.data_ptr():
        p.copy_(matrix.view(p.shape))
