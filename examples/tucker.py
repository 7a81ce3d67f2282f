"""Low-rank gradients of tensors with more than two dimensions: a basis per mode (Tensor-GaLore, arXiv 2501.02379).

    every T steps   Q_k ← basis(unfolding of G along mode k)        modes no longer than their rank have none
    each step       R = G ×₁ Q₁ᵀ … ×_d Q_dᵀ,   (S, c) = inner(R),   U = S ×₁ Q₁ … ×_d Q_d

A convolution (out, in, 3, 3) then keeps its spatial modes and compresses both channels, where ``Projected`` on the
matrix (out, in·3·3) compresses one side. galore-torch's tensor projector sets out to do the same, but it ignores Adam's
output on the way back and never refreshes. A method names it as any rule: ``Use("*conv*", Tucker(rank=32))``.

State: Q_k (n_k·r_k numbers) for the compressed modes, the inner rule's state for R (Π r_k numbers a moment, r_k = n_k
where mode k has no basis), the clock (40 bytes). Tensors of fewer than three dimensions, and those of which no mode is
longer than its rank, follow the inner rule alone.

Shape legend: G, U (n₁, …, n_d);  Q_k (n_k, r_k);  R, S (r₁, …, r_d).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from lowrank.linalg.basis import Basis, PowerIteration
from lowrank.linalg.rounding import wide
from lowrank.linalg.subspace import Subspace
from lowrank.optim.basis_fit import fit
from lowrank.optim.refresh_clock import advance_, count, is_due, new_clock, schedule_next_, stream
from lowrank.optim.rules import AdamW, Rule, State


@dataclass(frozen=True, kw_only=True)
class Tucker(Rule):
    """Run ``inner`` on the core of the gradient's Tucker decomposition.

    Args:
        inner: any rule.
        rank: the rank of every mode, or a tuple with one for each.
        basis: ``PowerIteration`` or ``SVD``.
        refresh_every, scale, stagger: as in ``Projected``; moments keep their coordinates at a refresh.

    Raises:
        ValueError: a size that is not a positive whole number, a basis that is not orthonormal, or an inner rule that
            projects by itself.
    """

    inner: Rule = field(default_factory=AdamW)
    rank: int | tuple[int, ...] = 32
    basis: Basis = field(default_factory=PowerIteration)
    refresh_every: int = 200
    scale: float = 0.25
    stagger: bool = True

    projects = True

    def __post_init__(self) -> None:
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        for name, value in (*(("rank", rank) for rank in ranks), ("refresh_every", self.refresh_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        if self.inner.projects:
            raise ValueError(f"inner={self.inner!r} projects by itself; give the rule inside it, such as AdamW()")
        if not self.basis.orthonormal:
            raise ValueError(f"{self.basis!r} is not orthonormal; use PowerIteration() or SVD()")

    def ranks_for(self, shape: tuple[int, ...]) -> dict[int, int]:
        """The rank of each mode that is compressed, by mode; empty where the inner rule is followed alone.

        Raises:
            ValueError: ``rank`` is a tuple of another length than the shape.
        """
        if len(shape) < 3:
            return {}
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,) * len(shape)
        if len(ranks) != len(shape):
            raise ValueError(
                f"rank={self.rank} is for {len(ranks)} modes, the parameter {tuple(shape)} has {len(shape)}"
            )
        every = {m: min(r, math.prod(shape) // n) for m, (r, n) in enumerate(zip(ranks, shape, strict=True))}
        return {mode: rank for mode, rank in every.items() if rank < shape[mode]}

    def init(self, like: Tensor) -> State:
        ranks, dtype = self.ranks_for(tuple(like.shape)), wide(like.dtype)
        if not ranks:
            return self.inner.init(like)
        core = [ranks.get(mode, size) for mode, size in enumerate(like.shape)]
        bases: State = {
            str(mode): torch.zeros(like.shape[mode], rank, dtype=dtype, device=like.device)
            for mode, rank in ranks.items()
        }
        return {**new_clock(), "basis": bases, "inner": self.inner.init(like.new_empty(core, dtype=dtype))}

    def place_(self, state: State, index: int) -> None:
        if "due" in state:
            cast(Tensor, state["index"]).fill_(index)
        else:
            self.inner.place_(state, index)

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        if "due" not in state:
            return self.inner.update(g, state)
        g = g.to(wide(g.dtype))
        if is_due(state):
            self._refresh_(g, state)
        bases = {int(mode): cast(Tensor, q) for mode, q in cast(State, state["basis"]).items()}
        core = g
        for mode, q in bases.items():
            core = multiply_mode(core, q, mode)
        s, gain = self.inner.update(core, cast(State, state["inner"]))
        for mode, q in bases.items():
            s = multiply_mode(s, q.T, mode)
        advance_(state, "step")
        return s, gain * self.scale

    def _refresh_(self, g: Tensor, state: State) -> None:
        cold, failed = count(state, "refreshes") == 0, 0
        for name, kept in cast(State, state["basis"]).items():
            q = cast(Tensor, kept)
            unfolding = g.movedim(int(name), 0).flatten(1)
            old = None if cold else Subspace(left=q)
            new, failures = fit(self.basis, unfolding, ("left",), q.shape[1], old=old, seed=stream(state))
            q.copy_(cast(Tensor, new.left))
            failed = max(failed, failures)
        advance_(state, "failures", failed)
        if cold and failed:
            cast(Tensor, state["due"]).add_(1)
            return
        advance_(state, "refreshes")
        schedule_next_(state, self.refresh_every, stagger=self.stagger)


def multiply_mode(x: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """x ×ₖ Mᵀ: dimension ``mode`` of ``x``, of size n, times ``matrix`` (n, m), so that its size becomes m."""
    return torch.tensordot(x, matrix, dims=([mode], [0])).movedim(-1, mode)
