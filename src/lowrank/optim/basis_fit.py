"""How a basis is fitted anew: to one matrix, to a stack of them, and to one that several ranks hold together.

Shape legend: G (..., rows, cols);  Q (..., side, rank).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from lowrank.linalg.basis import Basis, JointBasis, Side, captured_energy, random_basis
from lowrank.linalg.subspace import Subspace
from lowrank.optim.moment_transport import carry_moments_, first_moment
from lowrank.optim.projected_sides import sides_of
from lowrank.optim.refresh_clock import advance_, count, schedule_next_, stream
from lowrank.optim.rules import Refresh, State
from lowrank.optim.storage import basis_code, write_

if TYPE_CHECKING:
    from lowrank.optim.projected import Projected

Noted: TypeAlias = tuple[Tensor, Tensor | None]
_NOTES: list[list[Noted]] = []  # of all threads: on a GPU the backward pass, in which layers may step, has its own


@contextmanager
def noting_refreshes(into: list[Noted]) -> Iterator[None]:
    """Meanwhile ``fit`` adds to ``into``, of every stack of matrices whose orthonormal basis it refreshes, the share of
    ‖G‖² in the new basis and, unless there was none before, ‖Qₙᵀ Qₒ‖² / rank: 1 where the subspace has stayed the same.
    Means over the stack and the sides, on its device."""
    _NOTES.append(into)
    try:
        yield
    finally:
        _NOTES.remove(into)


def _note(g: Tensor, new: dict[str, Tensor], old: Subspace | None) -> None:
    whole = g.square().sum(dim=(-2, -1)).clamp_min(1e-30)
    energy, overlap = [], []
    for side, q in new.items():
        energy.append((captured_energy(g, q, cast(Side, side)) / whole).mean())
        if old is not None:
            overlap.append((q.mT @ getattr(old, side)).square().sum(dim=(-2, -1)).mean() / q.shape[-1])
    noted = torch.stack(energy).mean(), torch.stack(overlap).mean() if overlap else None
    for into in _NOTES:
        into.append(noted)


def fit(
    basis: Basis, g: Tensor, sides: tuple[Side, ...], rank: int, *, old: Subspace | None, seed: int
) -> tuple[Subspace, int]:
    """New bases for ``sides`` of ``g``, and how many matrices failed.

    Those keep their old basis, or get a random one at a cold start (``old`` is None).
    """
    found: dict[str, Tensor] = {}
    failed = ~g.sum(dim=(-2, -1)).isfinite()
    for side in sides:
        before = getattr(old, side) if old is not None else None
        new = _fit_each(basis, g, side, rank, before, seed)
        bad = failed | ~new.isfinite().all(dim=-1).all(dim=-1)
        if bool(bad.any()):
            stay = random_basis(new.shape[-2], rank, new, seed).expand_as(new) if before is None else before
            new = torch.where(bad[..., None, None], stay, new)
        failed = bad
        found[side] = new
    if _NOTES and basis.orthonormal:
        _note(g, found, old)
    return Subspace(left=found.get("left"), right=found.get("right")), int(failed.sum())


def fit_joint(
    basis: JointBasis, g: Tensor, sides: tuple[Side, ...], rank: int, *, old: Subspace | None, seed: int
) -> Generator[Tensor, None, tuple[Subspace, int]]:
    """As ``fit``, one basis for the whole stack (heads, rows, cols), which then is every matrix's; yields what others
    that hold more of the stack are to sum (``Basis.joint``)."""
    found: dict[str, Tensor] = {}
    failures = 0
    for side in sides:
        before = getattr(old, side)[0] if old is not None else None
        try:
            new = yield from basis.joint(g, side, rank, old=before, seed=seed)
            failed = not new.isfinite().all()
        except torch.linalg.LinAlgError:
            failed = True
        if failed:  # on all ranks alike, since they have seen the same sums
            size = g.shape[-2] if side == "left" else g.shape[-1]
            new, failures = random_basis(size, rank, g, seed) if before is None else before, len(g)
        found[side] = new.expand(len(g), *new.shape)
    return Subspace(left=found.get("left"), right=found.get("right")), failures


def together(refreshes: list[Refresh], sum_: Callable[[list[Tensor]], object]) -> list[Subspace]:
    """Run refreshes side by side; ``sum_`` replaces what each of them yields by its sum over all who hold a part."""
    done: dict[int, Subspace] = {}
    while len(done) < len(refreshes):
        yielded = []
        for i in [i for i in range(len(refreshes)) if i not in done]:
            try:
                yielded.append(next(refreshes[i]))
            except StopIteration as stop:
                done[i] = stop.value
        sum_(yielded)
    return [done[i] for i in range(len(refreshes))]


def refreshing(rule: Projected, g: Tensor, state: State) -> Refresh:
    """A new basis from ``g``; where that fails the old one stays, and is counted."""
    cold, sides = count(state, "refreshes") == 0, sides_of(rule.side, *g.shape[-2:])
    old = None if cold else rule.present(g, state).clone()
    if rule.follow and old is not None:
        g = g.mul(1 - rule.follow) + old.lift(first_moment(rule, g, state, corrected=True)) * rule.follow
    if rule.basis.stored:
        rank = min(rule.rank, *g.shape[-2:])
        where: dict[str, Any] = {"old": old, "seed": stream(state)}
        if rule.one_basis and isinstance(rule.basis, JointBasis):
            new, failures = yield from fit_joint(rule.basis, g, sides, rank, **where)
        else:
            new, failures = fit(rule.basis, g, sides, rank, **where)
        advance_(state, "failures", failures)
        if not rule.one_basis and cold and failures == math.prod(g.shape[:-2]):
            cast(Tensor, state["due"]).add_(1)  # the random basis serves for this step; the next tries again
            return new
        for side, kept in cast(Any, state["basis"]).items():
            write_(kept, getattr(new, side), basis_code(rule.basis_storage), None)
    advance_(state, "refreshes")
    new = rule.present(g, state)  # as stored, so that every step of the interval sees the same one
    if old is not None:
        carry_moments_(rule, g, state, old, new)
        if rule.lazy is not None:
            rule.lazy.note_(state, [getattr(old, s) for s in sides], [getattr(new, s) for s in sides])
    interval = rule.refresh_every if rule.lazy is None else count(state, "interval")
    schedule_next_(state, interval, stagger=rule.stagger)
    return new


def _fit_each(basis: Basis, g: Tensor, side: Side, rank: int, old: Tensor | None, seed: int) -> Tensor:
    """``basis.fit``, with NaN for those matrices of a stack for which the decomposition fails, not for all."""
    try:
        return basis.fit(g, side, rank, old=old, seed=seed)
    except torch.linalg.LinAlgError:
        if g.dim() == 2:
            return g.new_full((g.shape[-2] if side == "left" else g.shape[-1], rank), math.nan)
        olds: Iterable[Tensor | None] = [None] * len(g) if old is None else old
        parts = [_fit_each(basis, part, side, rank, before, seed) for part, before in zip(g, olds, strict=True)]
        return torch.stack(parts)
