"""What becomes of the inner rule's moments as the basis turns, and of what a projection leaves out.

keep         their coordinates stay
rotate       the first moment by C = QₙᵀQₒ, the second by C's squared entries
statistics   as estimates of mean and variance, which are rotated (LDAdam, arXiv 2410.16103)
reset        they begin anew
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from torch import Tensor

from lowrank.linalg.subspace import Subspace
from lowrank.optim.refresh_clock import count
from lowrank.optim.rules import AdamW, Move, State
from lowrank.optim.state import matched

if TYPE_CHECKING:
    from lowrank.optim.projected import Projected

Transport = Literal["keep", "rotate", "statistics", "reset"]


@dataclass(frozen=True, kw_only=True)
class ErrorFeedback:
    """What the projection leaves out is not lost but added to the next gradient (LDAdam, PowerSGD).

        G ← G + E,   step with R = QᵀG,   E ← G − share·Q R + β₁/(1 − β₁)·(Qₒ M − Qₙ QₙᵀQₒ M)

    Args:
        share: of what lies in the subspace, how much counts as dealt with, in (0, 1].
        moments: the last term: also what AdamW's first moment M loses where the basis turns (LDAdam).

    Raises:
        ValueError: a share out of its range.
    """

    share: float = 1.0
    moments: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share={self.share} must lie in (0, 1]")


def check_turning(rule: Projected) -> None:
    """Raise ValueError where what is to be carried over, or kept of what is left out, does not go with other slots."""
    if rule.error_feedback is not None and (rule.lift.needs_gradient or not rule.basis.orthonormal):
        raise ValueError(
            "error_feedback= keeps what an orthonormal basis leaves out and lift=GaLore() drops; it cannot go with "
            f"{rule.lift!r} and {rule.basis!r}"
        )
    turns = rule.transport in ("rotate", "statistics")
    by_moment = rule.follow > 0 or (rule.error_feedback is not None and rule.error_feedback.moments)
    if not 0.0 <= rule.follow < 1.0:
        raise ValueError(f"follow={rule.follow} must lie in [0, 1)")
    if by_moment and (type(rule.inner) is not AdamW or not turns or rule.one_basis):
        raise ValueError(
            "follow= and ErrorFeedback(moments=True) read AdamW's first moment as the basis turns: use "
            "inner=AdamW(), transport='rotate' or 'statistics', and one_basis=False"
        )
    if not rule.basis.orthonormal and (turns or rule.lazy is not None):
        raise ValueError(
            f"transport={rule.transport!r} and lazy= compare the old basis with the new one, but "
            f"{rule.basis!r} is drawn anew; use transport='keep' and lazy=None"
        )
    if turns and not rule.inner.transports:
        raise ValueError(
            f"transport={rule.transport!r} needs an inner rule that can rotate its moments, and "
            f"{type(rule.inner).__name__} cannot; use 'keep' or 'reset'"
        )


def rotation(old: Subspace, new: Subspace) -> Move:
    """The map (M, power) → C M C'ᵀ into the new basis, with the entries of C (left) and C' (right) to that power."""
    left = None if old.left is None or new.left is None else new.left.mT @ old.left
    right = None if old.right is None or new.right is None else new.right.mT @ old.right

    def move(moment: Tensor, power: int) -> Tensor:
        if left is not None:
            moment = left.pow(power) @ moment
        return moment if right is None else moment @ right.pow(power).mT

    return move


def carry_moments_(rule: Projected, g: Tensor, state: State, old: Subspace, new: Subspace) -> None:
    """Carry the moments of a matrix with the gradient ``g`` from one basis into the next."""
    inner = rule.inner_state(state)
    if rule.transport == "reset":
        for moment, fresh in matched(inner, rule.inner.init(rule.like_inside(g)), "a basis"):
            moment.copy_(fresh)
        rule.place_(state, count(state, "index"))
        return
    lost = rule.error_feedback is not None and rule.error_feedback.moments
    if lost:
        _add_moment_(rule, g, state, old, 1.0)
    if rule.transport == "rotate":
        rule.inner.transport_(inner, rule.like_inside(g), rotation(old, new))
    elif rule.transport == "statistics":
        rule.inner.transport_statistics_(inner, rule.like_inside(g), rotation(old, new))
    if lost:
        _add_moment_(rule, g, state, new, -1.0)


def _add_moment_(rule: Projected, g: Tensor, state: State, subspace: Subspace, sign: float) -> None:
    """E ← E ± β₁/(1 − β₁)·Q M."""
    beta1 = cast(AdamW, rule.inner).betas[0]
    moment = first_moment(rule, g, state)
    subspace.lift_into_(cast(Tensor, state["error"]), moment, alpha=sign * beta1 / (1 - beta1))


def first_moment(rule: Projected, g: Tensor, state: State, *, corrected: bool = False) -> Tensor:
    """AdamW's first moment, in the form of R; ``corrected`` for its start at 0."""
    inner = cast(AdamW, rule.inner)
    moments = rule.inner_state(state)
    m = inner.first_moment(moments, rule.like_inside(g))
    return m / (1 - inner.betas[0] ** cast(Tensor, moments["step"]).double()).to(m.dtype) if corrected else m
