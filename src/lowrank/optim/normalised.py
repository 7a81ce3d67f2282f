"""Rules that normalise a momentum as a whole matrix: Muon (``optim.muon``), and gradients normalised by column (here).

    M ← μM + (1 − μ)G,   N = M, or (1 − μ)G + μM with Nesterov's look ahead,   U = direction(N)

What is kept is number by number; the direction is a function of the whole matrix and needs no state. So on a shard of a
parameter (FSDP2) N is gathered, every rank computes the direction, and takes its shard of it.

``ColumnNormalised`` divides each column by its norm: the steepest step where a layer is measured by how far it moves
its output for a unit input. With momentum on the output layer alone it is SCALE (arXiv 2506.16659, algorithm 1).

State: ``momentum_buffer`` (the parameter's shape) where ``momentum`` is not 0, else nothing; of a vector, that of the
rule ``vectors``.

Shape legend: G, M, U (..., out, in), leading dimensions a stack; ``transposed``: (..., in, out).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lowrank.linalg.kernels import chosen
from lowrank.optim.rules import AdamW, Move, Rule, State
from lowrank.optim.storage import wide

if TYPE_CHECKING:
    from typing_extensions import Self


class MatrixRule(Rule):
    """A rule whose steps are made a whole matrix at a time. Subclasses are frozen dataclasses with two fields more.

    Args:
        vectors: the rule of parameters with fewer than two dimensions.
        stack: whether leading dimensions are a stack of matrices; else a tensor (out, ...) is one matrix (out, −1).
    """

    vectors: Rule
    stack: bool

    def resolve(self, like: Tensor, *, stacked: bool) -> Rule:
        if like.dim() < 2 or (like.dim() > 2 and sum(size > 1 for size in like.shape) <= 1):
            return self.vectors
        stacked = stacked or len(like) == 1  # such as the positions (1, patches, width) of a vision transformer
        return self if self.stack == stacked or like.dim() == 2 else replace(cast(Any, self), stack=stacked)

    def as_matrices(self, g: Tensor) -> Tensor:
        """A gradient, or what is like one, as (..., rows, cols), at least float32 wide."""
        return (g if self.stack else g.reshape(g.shape[0], -1)).to(wide(g.dtype))


class LayerRule(MatrixRule):
    """A rule that knows how a layer stores its matrices: these fields and those of ``MatrixRule``.

    Args:
        transposed: whether matrices are stored as (in, out), as in transformers' ``Conv1D`` and in embeddings.
        parts: how many matrices of equal size lie beside each other along out (3 for fused q, k, v).
    """

    transposed: bool
    parts: int

    def on_layer(self, *, transposed: bool, parts: int) -> Self:
        return replace(cast(Any, self), transposed=transposed, parts=parts)

    def taken_apart(self, m: Tensor) -> Tensor:
        """A parameter's tensor as (..., out, in), fused matrices along one more dimension (..., parts, out, in)."""
        matrices = self.as_matrices(m)
        matrices = matrices.mT if self.transposed else matrices
        return matrices.unflatten(-2, (self.parts, -1)) if self.parts > 1 else matrices

    def put_together(self, apart: Tensor, shape: tuple[int, ...]) -> Tensor:
        """``taken_apart`` undone."""
        u = apart.flatten(-3, -2) if self.parts > 1 else apart
        return (u.mT if self.transposed else u).reshape(shape)


@dataclass(frozen=True, kw_only=True)
class NormalisedMomentum(LayerRule):
    """What these rules share.

    Args:
        momentum: decay of the mean of gradients, in [0, 1); 0 keeps none.
        nesterov: look ahead along the present gradient.
        vectors, stack, transposed, parts: as in ``LayerRule``; fused matrices are normalised one by one.

    Raises:
        ValueError: a momentum out of its range, or ``nesterov`` without one.
    """

    momentum: float = 0.0
    nesterov: bool = False
    vectors: Rule = field(default_factory=AdamW)
    stack: bool = True
    transposed: bool = False
    parts: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1)")
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov=True needs a momentum above 0")

    @abstractmethod
    def direction(self, m: Tensor) -> Tensor:
        """U for a stack of matrices (..., out, in), none of them transposed or fused; ``m`` stays as it is."""

    def gain(self, out_features: int, in_features: int) -> float:
        """What the step of a matrix of this size is multiplied by."""
        return 1.0

    def init(self, like: Tensor) -> State:
        if like.dim() < 2:
            return self.vectors.init(like)
        return {} if self.momentum == 0.0 else {"momentum_buffer": torch.zeros_like(like, dtype=wide(like.dtype))}

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        return self.vectors.update(g, state) if g.dim() < 2 else self.normalised(self.momentum_(g, state))

    def joins(self, grads: list[Tensor]) -> bool:
        """Where the kernel was chosen, whose rounding may depend on what is joined; BLAS's must not (``stacks``)."""
        return self.stack and all(g.dim() > 1 for g in grads) and bool(grads) and chosen("newton_schulz", grads[0])

    def momentum_(self, g: Tensor, state: State) -> Tensor:
        """N, number by number."""
        g = g.to(wide(g.dtype))
        if self.momentum == 0.0:
            return g
        buffer = cast(Tensor, state["momentum_buffer"]).lerp_(g, 1 - self.momentum)
        return g.lerp(buffer, self.momentum) if self.nesterov else buffer

    def normalised(self, m: Tensor) -> tuple[Tensor, float]:
        """(direction, gain) from N of a whole parameter."""
        apart = self.taken_apart(m)
        return self.put_together(self.direction(apart), m.shape), self.gain(*apart.shape[-2:])

    def transport_(self, state: State, like: Tensor, move: Move) -> None:
        if like.dim() < 2:
            self.vectors.transport_(state, like, move)
        elif state:
            buffer = cast(Tensor, state["momentum_buffer"])
            buffer.copy_(move(buffer, 1))


@dataclass(frozen=True, kw_only=True)
class ColumnNormalised(NormalisedMomentum):
    """Each column of the gradient, or of its momentum, divided by its norm (module docstring); zeros stay zeros."""

    def direction(self, m: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(m, dim=-2, keepdim=True)
        return m / torch.where(norms > 0, norms, math.inf)
