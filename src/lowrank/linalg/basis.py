"""Bases: the low-dimensional subspace of its rows or columns that a gradient is projected onto.

    SVD             the leading singular vectors, exactly (GaLore, arXiv 2403.03507)
    PowerIteration  Y = G Gᵀ Q, Q ← orth(Y), started at the old basis: as the subspace moves slowly, one or two rounds
                    follow it (subspace iteration: Halko, Martinsson, Tropp, arXiv 0909.4061; PowerSGD, 1905.13727)
    Gaussian        entries N(0, 1/rank), drawn from a seed and never stored (Flora, 2402.03293; APOLLO, 2412.05270)

A basis is a small frozen value with ``fit``. The first two are orthonormal; the sign (for ``SVD`` also the order) of
their vectors is LAPACK's choice, so by default every new vector is flipped to agree with the old one in its place: a
run then does not depend on the library at hand, and moments that are kept stay meaningful where the subspace stayed.

Deviation: galore-torch decomposes in float32 and stores the basis in the gradient's dtype; we keep float32.

Shape legend: G (..., rows, cols);  Q (..., side, rank) with side = rows on the left and cols on the right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lowrank.infra.seeds import generator, stable_seed

Side = Literal["left", "right"]
Joint = Generator[Tensor, None, Tensor]


class Basis(ABC):
    """What ``Projected`` needs of a basis: a frozen dataclass with ``fit``.

    ``stored``: whether the basis is kept as state; if not, it can be made again from the seed and the shape alone.
    ``orthonormal``: whether QᵀQ = I at every refresh.
    """

    stored: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = True

    @abstractmethod
    def fit(self, g: Tensor, side: Side, rank: int, *, old: Tensor | None, seed: int) -> Tensor:
        """A basis (..., rows or cols, rank) for one side of ``g`` (..., rows, cols).

        Args:
            g: the gradient, or a stack of gradients.
            side: ``left`` for the rows, ``right`` for the columns.
            rank: how many vectors, at most min(rows, cols).
            old: the present basis, None at a cold start.
            seed: of whatever is random in the new one.

        Raises:
            torch.linalg.LinAlgError: the decomposition failed, for instance on a gradient that is not finite.
        """

    def draw_each(self, like: Tensor, side: Side, rank: int, seeds: Sequence[int]) -> list[Tensor]:
        """Of a basis that is not stored: ``fit`` of a matrix like this one, for each of the seeds."""
        return [self.fit(like, side, rank, old=None, seed=seed) for seed in seeds]


class JointBasis(Basis):
    """A basis that the matrices of a stack can share, wherever they are (``Projected(one_basis=True)``)."""

    @abstractmethod
    def joint(self, g: Tensor, side: Side, rank: int, *, old: Tensor | None, seed: int) -> Joint:
        """One basis (side, rank) for all matrices of a stack ``g`` (heads, rows, cols): its span keeps the most of
        Σ_h ‖G_h‖². ``old`` is the present one, (side, rank). Where others hold more of the stack, each tensor yielded
        is to be replaced by its sum over all of them before going on."""

    @abstractmethod
    def joint_numbers(self, size: int, rank: int) -> int:
        """How many numbers ``joint`` yields in all for a side of ``size``."""


@dataclass(frozen=True, kw_only=True)
class SVD(JointBasis):
    """The exact leading singular vectors of G, decomposed in its stored orientation (as galore-torch does).

    Args:
        align: flip each vector to agree with the old one in its place.
    """

    align: bool = True

    def fit(self, g: Tensor, side: Side, rank: int, *, old: Tensor | None, seed: int) -> Tensor:
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        new = (u if side == "left" else vh.mT)[..., :rank].contiguous()
        return align_signs(new, old) if self.align and old is not None else new

    def joint(self, g: Tensor, side: Side, rank: int, *, old: Tensor | None, seed: int) -> Joint:
        """The leading eigenvectors of Σ_h G_h G_hᵀ (side, side)."""
        oriented = g if side == "left" else g.mT
        gram = (oriented @ oriented.mT).sum(dim=0)
        yield gram
        new = torch.linalg.eigh(gram)[1][:, -rank:].flip(-1).contiguous()
        return align_signs(new, old) if self.align and old is not None else new

    def joint_numbers(self, size: int, rank: int) -> int:
        return size * size


@dataclass(frozen=True, kw_only=True)
class PowerIteration(JointBasis):
    """Subspace iteration, started at the old basis; at a cold start at a Gaussian sketch of G.

    An iteration is two products with G and one QR of a matrix (side, rank). All but the last read only every
    ``sample``-th vector of G, since they need only come near, and from the second on they work on G Gᵀ − α with α half
    the smallest eigenvalue wanted, whose spectrum falls off faster outside the subspace (dashSVD, arXiv 2404.09276).
    Two of these cost 1.3 plain iterations and capture more than two plain ones. QR is Householder's, since gradients
    are so far from full rank that the Gram matrix of Cholesky-QR is singular even in float64. Where G is zero, the old
    vectors stay.

    Args:
        iterations: iterations at a refresh; ``benchmarks/results`` has the energy that one and two capture. At a cold
            start, which every layer has in the same step, the sketch replaces the first, and the last reads a third of
            G.
        sample: all iterations but the last read every ``sample``-th vector of G; 1 reads all of it.
        align: flip each vector to agree with the old one in its place.

    Raises:
        ValueError: ``iterations`` or ``sample`` below 1.
    """

    iterations: int = 2
    sample: int = 4
    align: bool = True

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.sample < 1:
            raise ValueError(
                f"PowerIteration(iterations={self.iterations}, sample={self.sample}): both must be at least 1"
            )

    def fit(self, g: Tensor, side: Side, rank: int, *, old: Tensor | None, seed: int) -> Tensor:
        oriented = g if side == "left" else g.mT
        stride = max(1, min(self.sample, oriented.shape[-1] // rank))
        few, shift = _every(oriented, stride), torch.zeros((), dtype=g.dtype, device=g.device)
        if old is None:
            new, sampled = orthonormalise(_sketch(few, rank, seed))[0], self.iterations - 2
            third = max(1, min(3, stride, oriented.shape[-1] // (2 * rank)))
            oriented, stride = _every(oriented, third), max(1, stride // third)
        else:
            new, sampled = old, self.iterations - 1
        for _ in range(sampled):
            new, least = orthonormalise(_iterate(few, new, shift))
            shift = least / 2
        new, _ = orthonormalise(_iterate(oriented, new, shift * stride))
        return align_signs(new, old) if self.align and old is not None else new

    def joint(self, g: Tensor, side: Side, rank: int, *, old: Tensor | None, seed: int) -> Joint:
        """Q ← orth(Σ_h G_h G_hᵀ Q), ``iterations`` times, from the old basis or a random one."""
        oriented = g if side == "left" else g.mT
        new = random_basis(oriented.shape[1], rank, g, seed) if old is None else old
        for _ in range(self.iterations):
            y = (oriented @ (oriented.mT @ new)).sum(dim=0)
            yield y
            new = _kept(y, new)
        return align_signs(new, old) if self.align and old is not None else new

    def joint_numbers(self, size: int, rank: int) -> int:
        return self.iterations * size * rank


@dataclass(frozen=True, kw_only=True)
class Gaussian(JointBasis):
    """Random vectors with entries N(0, 1/rank), so that E|Qᵀx|² = |x|². Drawn again each time: the seed is the state.

    Args:
        seed: of the stream; parameters and refreshes have streams of their own within it.
    """

    seed: int = 0

    stored = False
    orthonormal = False

    def fit(self, g: Tensor, side: Side, rank: int, *, old: Tensor | None, seed: int) -> Tensor:
        return self.draw_each(g, side, rank, [seed])[0]

    def draw_each(self, like: Tensor, side: Side, rank: int, seeds: Sequence[int]) -> list[Tensor]:
        *lead, rows, cols = like.shape
        size = rows if side == "left" else cols
        keys = [("gaussian basis", self.seed, seed, side) for seed in seeds]
        noise = generator(like.device, *keys[0])  # one for all, since making one costs as much as drawing from it
        kind: Any = {"generator": noise, "device": like.device, "dtype": like.dtype}
        drawn = []
        for key in keys:
            noise.manual_seed(stable_seed(*key))
            drawn.append(torch.randn(size, rank, **kind))
        torch._foreach_mul_(drawn, rank**-0.5)
        return [q.expand(*lead, size, rank) for q in drawn] if lead else drawn

    def joint(self, g: Tensor, side: Side, rank: int, *, old: Tensor | None, seed: int) -> Joint:
        """As drawn for one matrix; nothing needs to be told."""
        yield from ()
        return self.fit(g[0], side, rank, old=None, seed=seed)

    def joint_numbers(self, size: int, rank: int) -> int:
        return 0


def orthonormalise(y: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, least): QR of ``y`` (..., size, rank), and the least |diagonal entry| of R, (..., 1, 1).

    ``y`` is scaled first (in place), so that the squares of small gradients do not underflow.
    """
    scale = _largest(y)
    q, r = torch.linalg.qr(y.div_(scale))
    return q, r.diagonal(dim1=-2, dim2=-1).abs().amin(dim=-1)[..., None, None] * scale


def _largest(y: Tensor) -> Tensor:
    """The largest magnitude in each matrix (..., 1, 1), or 1 where that is 0."""
    largest = y.abs().amax(dim=(-2, -1), keepdim=True)
    return torch.where(largest == 0, 1, largest)


def random_basis(size: int, rank: int, like: Tensor, seed: int) -> Tensor:
    """An orthonormal basis (size, rank) that depends on nothing but the seed."""
    noise = generator(like.device, "random basis", seed)
    return orthonormalise(torch.randn(size, rank, generator=noise, device=like.device, dtype=like.dtype))[0]


def iterated(gram: Tensor, q: Tensor) -> Tensor:
    """One step of orthogonal iteration: the Q of QR(gram·q), for symmetric ``gram`` (..., side, side)."""
    return _kept(gram @ q, q)


def _kept(y: Tensor, old: Tensor) -> Tensor:
    """QR of ``y`` (in place), where the old vectors decide what is zero in it."""
    return orthonormalise(y.addcmul_(old, _largest(y) * 1e-7))[0]


def _every(g: Tensor, stride: int) -> Tensor:
    """Every ``stride``-th column of ``g``; copied once where BLAS, which needs a stride of 1, would copy it often."""
    taken = g[..., ::stride]
    return taken if 1 in taken.stride()[-2:] else taken.contiguous()


def _iterate(g: Tensor, q: Tensor, shift: Tensor) -> Tensor:
    """(G Gᵀ − shift) Q, plus a tiny multiple of Q, which is what remains where G is zero."""
    y = g @ (g.mT @ q)
    return y.addcmul_(q, _largest(y) * 1e-7 - shift)


def _sketch(g: Tensor, rank: int, seed: int) -> Tensor:
    noise = generator(g.device, "sketch", seed)
    return g @ torch.randn(g.shape[-1], rank, generator=noise, device=g.device, dtype=g.dtype)


def align_signs(new: Tensor, old: Tensor) -> Tensor:
    """``new`` with each column flipped to have a non-negative product with the same column of ``old``."""
    agreement = (new * old).sum(dim=-2, keepdim=True)
    return torch.where(agreement < 0, -new, new)


def captured_energy(g: Tensor, q: Tensor, side: Side) -> Tensor:
    """‖QᵀG‖²_F (on the right ‖GQ‖²_F) of each matrix: how much of ‖G‖²_F an orthonormal basis keeps."""
    return (q.mT @ g if side == "left" else g @ q).square().sum(dim=(-2, -1))
