"""Lifts: from a direction S in the subspace back to an update U of the whole matrix.

    GaLore    U = Q S                          what lies outside the subspace is dropped        arXiv 2403.03507
    Rescale   U = G · |S| / |R|                S only says how long the step is                 2412.05270 (APOLLO)
    Residual  U = Q S + (G − Q R) · |S| / |R|  the outside too, at the subspace's step length   2410.01623 (Fira)
    Signed    U = Q S + outside · sign(G − QR) the outside by sign; S is after bias correction  2411.07837 (FRUGAL)

|S| / |R| is taken per channel, that is per column for a left basis and per row for a right one, or over the whole
matrix.

The norm-growth limiter of both papers: where |U_t| > γ |U_{t-1}|, U_t is scaled down to γ |U_{t-1}|; for Fira U stands
for the second term alone. Its state is the last norm (one float32 a matrix), 0 before the first step. As in the papers'
codes, S is the inner rule's direction before bias correction. Deviations: a norm of 0 starts the limiter anew (in the
codes every later update would be 0 too), and where those guard the quotients by adding 1e-8, here they are tested for
0, so that small gradients are scaled like large ones.

Shape legend: G, U (..., rows, cols);  R, S as in ``linalg.products``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from lowrank.infra.checks import check_choice
from lowrank.linalg.subspace import Subspace, Subspaces
from lowrank.optim.rules import State
from lowrank.optim.stacks import apart, copied, joined, joined_states

Scope = Literal["channel", "tensor"]
Factor = Tensor | float


class Lift(ABC):
    """What ``Projected`` needs of a lift: a frozen dataclass."""

    needs_gradient: ClassVar[bool] = True  # whether U depends on G itself; if not, micro-batches may be kept as R
    corrected: ClassVar[bool] = False  # whether S is to come with the inner rule's gain in it

    def check(self, side: str) -> None:  # noqa: B027  (all sides serve, where it is not given)
        """Raise ValueError if the lift cannot serve this ``side`` of ``Projected``."""

    def init(self, like: Tensor) -> State:
        """Fresh state for a gradient G like this one, (..., rows, cols)."""
        return {}

    @abstractmethod
    def __call__(self, g: Tensor, r: Tensor, s: Tensor, subspace: Subspace, state: State) -> Tensor:
        """U (..., rows, cols), by the definition; ``state`` is changed in place."""

    @abstractmethod
    def add_(
        self,
        targets: list[Tensor],
        gs: list[Tensor] | None,
        rs: list[Tensor],
        s: Tensor,
        subspaces: Subspaces,
        states: list[State],
        alpha: Factor,
        beta: float,
    ) -> None:
        """target ← β·target + α·U for N matrices of one shape, in place, equal to ``__call__`` up to rounding.

        Args:
            targets, gs, rs, subspaces, states: of each; ``gs`` may be None where ``needs_gradient`` is False.
            s: (N, ...), the N of S joined. alpha: a number, or numbers that multiply ``s``. beta: a number.
        """


@dataclass(frozen=True, kw_only=True)
class GaLore(Lift):
    """U = Q S: the update stays in the subspace."""

    needs_gradient = False

    def __call__(self, g: Tensor, r: Tensor, s: Tensor, subspace: Subspace, state: State) -> Tensor:
        return subspace.lift(s)

    def add_(
        self,
        targets: list[Tensor],
        gs: list[Tensor] | None,
        rs: list[Tensor],
        s: Tensor,
        subspaces: Subspaces,
        states: list[State],
        alpha: Factor,
        beta: float,
    ) -> None:
        if isinstance(alpha, Tensor):
            s, alpha = s * alpha, 1.0
        subspaces.lift_into_(targets, apart(s), alpha=alpha, beta=beta)


@dataclass(frozen=True, kw_only=True)
class _ByLength(Lift):
    """What Rescale and Residual share: a step length |S|/|R| by channel or tensor, and the norm-growth limiter."""

    scope: Scope = "channel"
    limiter: float | None = 1.01

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, Scope)
        if self.limiter is not None and not self.limiter >= 1.0:
            raise ValueError(f"limiter={self.limiter} must be at least 1 (the papers' is 1.01), or None for none")

    def check(self, side: str) -> None:
        if side == "both" and self.scope == "channel":
            raise ValueError(
                f"{self!r} scales channels, and side='both' leaves none; use scope='tensor', or another side"
            )

    def init(self, like: Tensor) -> State:
        if self.limiter is None:
            return {}
        return {"norm": torch.zeros(like.shape[:-2], dtype=like.dtype, device=like.device)}

    def limited_length(self, g: Tensor, rs: list[Tensor], s: Tensor, subspace: Subspace, states: list[State]) -> Tensor:
        """|S|/|R| of N matrices, shaped to multiply ``g`` (N, ...), within what the limiter allows, which is noted.

        ``subspace``: that of any of them, of which the sides alone are looked at.
        """
        length = _length(s, joined(rs), self.scope, subspace)
        if self.limiter is None:
            return length
        with joined_states(states, 0) as state:
            return length * _limit(_scaled_norm(g, length, subspace), self.limiter, state)


@dataclass(frozen=True, kw_only=True)
class Rescale(_ByLength):
    """U = G·|S|/|R| (APOLLO). The basis only estimates a step length, so a random one serves.

    Args:
        scope: one length a ``channel``, or one for the whole ``tensor`` (APOLLO-Mini, whose scale of 128 is applied as
            √128).
        limiter: γ of the norm-growth limiter, at least 1, or None for none.

    Raises:
        ValueError: an unknown scope, or a limiter below 1.
    """

    def __call__(self, g: Tensor, r: Tensor, s: Tensor, subspace: Subspace, state: State) -> Tensor:
        u = g * _length(s, r, self.scope, subspace)
        return u if self.limiter is None else u * _limit(_norm(u, subspace), self.limiter, state)

    def add_(
        self,
        targets: list[Tensor],
        gs: list[Tensor] | None,
        rs: list[Tensor],
        s: Tensor,
        subspaces: Subspaces,
        states: list[State],
        alpha: Factor,
        beta: float,
    ) -> None:
        assert gs is not None
        length = self.limited_length(joined(gs), rs, s, subspaces[0], states)
        if beta != 1.0:
            torch._foreach_mul_(targets, beta)
        torch._foreach_addcmul_(targets, gs, list((length * alpha).unbind()))


@dataclass(frozen=True, kw_only=True)
class Residual(_ByLength):
    """U = QS + (G − QR)·|S|/|R| (Fira): full-rank updates from low-rank state.

    Args:
        scope: the part outside the subspace is scaled a ``channel`` at a time, or as one ``tensor``.
        limiter: γ of the norm-growth limiter on that part, at least 1, or None for none.

    Raises:
        ValueError: an unknown scope, or a limiter below 1.
    """

    def __call__(self, g: Tensor, r: Tensor, s: Tensor, subspace: Subspace, state: State) -> Tensor:
        outside = (g - subspace.lift(r)) * _length(s, r, self.scope, subspace)
        if self.limiter is not None:
            outside = outside * _limit(_norm(outside, subspace), self.limiter, state)
        return subspace.lift(s) + outside

    def add_(
        self,
        targets: list[Tensor],
        gs: list[Tensor] | None,
        rs: list[Tensor],
        s: Tensor,
        subspaces: Subspaces,
        states: list[State],
        alpha: Factor,
        beta: float,
    ) -> None:
        assert gs is not None
        outside, each = copied(gs)  # the one gradient-sized tensor that a lift may allocate
        subspaces.lift_into_(each, rs, alpha=-1.0)
        length = self.limited_length(outside, rs, s, subspaces[0], states)
        subspaces.lift_into_(targets, apart(s * alpha), alpha=1.0, beta=beta)
        torch._foreach_addcmul_(targets, each, list((length * alpha).unbind()))


@dataclass(frozen=True, kw_only=True)
class Signed(Lift):
    """U = QS + outside·sign(G − QR) (FRUGAL): the subspace by the inner rule, the rest by sign.

    Args:
        outside: how long the steps by sign are, in learning rates.

    Raises:
        ValueError: ``outside`` is not above 0.
    """

    outside: float = 1.0

    corrected = True

    def __post_init__(self) -> None:
        if not self.outside > 0:
            raise ValueError(f"outside={self.outside} must be above 0; without steps outside use lift=GaLore()")

    def __call__(self, g: Tensor, r: Tensor, s: Tensor, subspace: Subspace, state: State) -> Tensor:
        return subspace.lift(s) + (g - subspace.lift(r)).sign_() * self.outside

    def add_(
        self,
        targets: list[Tensor],
        gs: list[Tensor] | None,
        rs: list[Tensor],
        s: Tensor,
        subspaces: Subspaces,
        states: list[State],
        alpha: Factor,
        beta: float,
    ) -> None:
        assert gs is not None
        outside, each = copied(gs)
        subspaces.lift_into_(each, rs, alpha=-1.0)
        subspaces.lift_into_(targets, apart(s * alpha), alpha=1.0, beta=beta)
        torch._foreach_add_(targets, list(outside.sign_().mul_(alpha * self.outside).unbind()))


def _length(s: Tensor, r: Tensor, scope: Scope, subspace: Subspace) -> Tensor:
    """|S| / |R|, shaped to multiply G: (..., 1, cols), (..., rows, 1) or (..., 1, 1); 0 where R is 0."""
    dim: Any = subspace.channel_dim if scope == "channel" else (-2, -1)
    above = torch.linalg.vector_norm(s, dim=dim, keepdim=True)
    below = torch.linalg.vector_norm(r, dim=dim, keepdim=True)
    if scope == "tensor":
        above, below = (subspace.whole_norm(norm, inside=True) for norm in (above, below))
    return torch.where(below > 0, above / below, 0)


def _norm(u: Tensor, subspace: Subspace) -> Tensor:
    """‖u‖_F for each matrix."""
    return subspace.whole_norm(torch.linalg.matrix_norm(u))


def _scaled_norm(g: Tensor, length: Tensor, subspace: Subspace) -> Tensor:
    """‖g·length‖_F of each matrix, (...,), without a tensor of g's size in between."""
    dim: Any = (-2, -1) if subspace.channel_dim is None else subspace.channel_dim
    each = torch.linalg.vector_norm(g, dim=dim, keepdim=True) * length
    return subspace.whole_norm(torch.linalg.vector_norm(each, dim=(-2, -1)))


def _limit(norm: Tensor, growth: float, state: State) -> Tensor:
    """The factor (..., 1, 1) that keeps ``norm`` (...,) within ``growth`` times the last; the limited norm is noted."""
    last = cast(Tensor, state["norm"])
    factor = torch.where((last > 0) & (norm > growth * last), growth * last / norm, 1)
    last.copy_(norm * factor)
    return factor[..., None, None]
