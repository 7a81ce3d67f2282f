"""A subspace of matrices, and the two products that enter and leave it.

    R = Qᵀ G P        project   (a side without a basis drops out)
    U = Q S Pᵀ        lift

No product copies a transpose: BLAS reads it in place.

Shape legend: G, U (..., rows, cols);  Q = left (..., rows, rank);  P = right (..., cols, rank);
R, S (..., rank, cols) with a left basis, (..., rows, rank) with a right one, (..., rank, rank) with both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Subspace:
    """Bases for the rows (``left``), the columns (``right``), or both; at least one is given.

    Where several ranks hold a part of each matrix, the bases are cut to the rows and columns here, and ``total`` sums
    over the ranks: R, if the side that is cut is projected (``crosses``), and squared norms.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    total: Callable[[Tensor], Tensor] | None = None
    crosses: bool = False

    @property
    def channel_dim(self) -> int | None:
        """The dimension of R along which the rank runs (the other counts channels); None with both bases."""
        if self.left is not None and self.right is not None:
            return None
        return -2 if self.left is not None else -1

    def clone(self) -> Subspace:
        """A copy of the subspace, bases included."""
        left, right = (None if q is None else q.clone() for q in (self.left, self.right))
        return replace(self, left=left, right=right)

    def project(self, g: Tensor) -> Tensor:
        """Qᵀ G P."""
        if self.left is not None:
            g = self.left.mT @ g
        r = g if self.right is None else g @ self.right
        return self.total(r) if self.crosses and self.total is not None else r

    def whole_norm(self, norm: Tensor, *, inside: bool = False) -> Tensor:
        """The norm of whole matrices from that of the parts here; ``inside``: of R or S, of which every rank has the
        whole where they were summed."""
        if self.total is None or (inside and self.crosses):
            return norm
        return self.total(norm.square()).sqrt()

    def lift(self, s: Tensor) -> Tensor:
        """Q S Pᵀ."""
        if self.left is not None:
            s = self.left @ s
        return s if self.right is None else s @ self.right.mT

    def lift_into_(self, target: Tensor, s: Tensor, *, alpha: float, beta: float = 1.0) -> None:
        """target ← β·target + α·Q S Pᵀ in one product, without a matrix of the target's size in between."""
        if self.left is not None and self.right is not None:
            first, second = self.left @ s, self.right.mT
        elif self.left is not None:
            first, second = self.left, s
        else:
            assert self.right is not None
            first, second = s, self.right.mT
        multiply_into_(target, first, second, alpha=alpha, beta=beta)


@dataclass(frozen=True, kw_only=True, eq=False)
class Subspaces:
    """Those of N matrices of one shape, with the same sides: a basis each. As in :class:`Subspace` otherwise."""

    left: list[Tensor] | None = None
    right: list[Tensor] | None = None
    total: Callable[[Tensor], Tensor] | None = None
    crosses: bool = False

    @staticmethod
    def of(each: Sequence[Subspace]) -> Subspaces:
        """Several as one."""
        left, right = [s.left for s in each if s.left is not None], [s.right for s in each if s.right is not None]
        return Subspaces(left=left or None, right=right or None, total=each[0].total, crosses=each[0].crosses)

    def __len__(self) -> int:
        return len(self.left or self.right or ())

    def __getitem__(self, i: int) -> Subspace:
        left, right = (None if side is None else side[i] for side in (self.left, self.right))
        return Subspace(left=left, right=right, total=self.total, crosses=self.crosses)

    def project(self, gs: Sequence[Tensor]) -> list[Tensor]:
        """Qᵀ G P of each."""
        multiply = torch.mm if gs[0].dim() == 2 else torch.matmul
        if self.left is not None:
            gs = [multiply(q.mT, g) for q, g in zip(self.left, gs, strict=True)]
        if self.right is not None:
            gs = list(map(multiply, gs, self.right))
        return [self.total(r) for r in gs] if self.crosses and self.total is not None else list(gs)

    def lift_into_(self, targets: list[Tensor], ss: Sequence[Tensor], *, alpha: float, beta: float = 1.0) -> None:
        """target ← β·target + α·Q S Pᵀ for each, as ``Subspace.lift_into_``."""
        if self.left is None:
            assert self.right is not None
            pairs = [(s, q.mT) for s, q in zip(ss, self.right, strict=True)]
        elif self.right is None:
            pairs = list(zip(self.left, ss, strict=True))
        else:
            pairs = [(q @ s, p.mT) for q, s, p in zip(self.left, ss, self.right, strict=True)]
        for target, (first, second) in zip(targets, pairs, strict=True):
            if target.dim() == 2:
                target.addmm_(first, second, alpha=alpha, beta=beta)
            else:
                multiply_into_(target, first, second, alpha=alpha, beta=beta)


def multiply_into_(target: Tensor, first: Tensor, second: Tensor, *, alpha: float, beta: float = 1.0) -> None:
    """target ← β·target + α·first·second, in place, for matrices or equal stacks of them."""
    if target.dim() == 2:
        target.addmm_(first, second, alpha=alpha, beta=beta)
    elif target.dim() == 3:
        target.baddbmm_(first, second, alpha=alpha, beta=beta)
    else:
        for part, one, two in zip(target, first, second, strict=True):
            multiply_into_(part, one, two, alpha=alpha, beta=beta)


def residual(g: Tensor, r: Tensor, subspace: Subspace, *, share: float = 1.0) -> Tensor:
    """G − share·Q R Pᵀ, with 1 what of G is outside the subspace: the one gradient-sized tensor a lift may allocate."""
    outside = g.clone(memory_format=torch.contiguous_format)
    subspace.lift_into_(outside, r, alpha=-share)
    return outside
