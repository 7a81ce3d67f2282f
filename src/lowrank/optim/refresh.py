"""When and how a projected rule's basis changes: the clock, the fit, and what becomes of the moments.

    due at steps 0, T − phase, 2T − phase, …   phase = frac(index·φ)·T spreads any number of layers over the interval
    M ← C M,  V ← (C∘C) V,  C = Qₙᵀ Qₒ         moments carried from the old basis into the new one (arXiv 2410.16103)

The clock is five int64 scalars on the CPU, so that an ordinary step on a GPU never waits for it:

    step       steps done
    due        the step of the next refresh
    index      which parameter this is (phase, random streams)
    refreshes  refreshes done
    failures   matrices that had to keep their old basis, summed over the refreshes

Shape legend: G (..., rows, cols);  Q (..., side, rank);  M, V as R in ``linalg.products``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from lowrank.infra.seeds import stable_seed
from lowrank.linalg.basis import Basis, JointBasis, Side, captured_energy, random_basis
from lowrank.linalg.subspace import Subspace
from lowrank.optim.rules import Move, Refresh, State
from lowrank.optim.stacks import add_one_

Noted: TypeAlias = tuple[Tensor, Tensor | None]
_NOTES: list[list[Noted]] = []  # of all threads: on a GPU the backward pass, in which layers may step, has its own
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """Q-GaLore's lazy refresh (arXiv 2407.08296): where the subspace has stopped moving, refresh it less often.

    After a refresh the |cosine| between the old and the new leading vector is noted (absolute, as signs are
    arbitrary; the mean over a stack and over both sides). Once the last ``window`` of them average at least
    ``threshold``, the interval of this parameter is multiplied by ``factor`` and the window starts anew.

    Args:
        threshold: the mean |cosine| that counts as standing still, in (0, 1].
        factor: by which the interval grows, above 1.
        window: refreshes that are averaged.

    Raises:
        ValueError: a value out of its range.
    """

    threshold: float = 0.4
    factor: float = 2.0
    window: int = 5

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0 or not self.factor > 1.0 or self.window < 1:
            raise ValueError(f"{self!r}: threshold must lie in (0, 1], factor be above 1 and window at least 1")

    def init(self, interval: int) -> State:
        """Fresh state: the interval in steps, and an empty window (−1 stands for no cosine yet)."""
        return {
            "interval": torch.tensor(interval, dtype=torch.int64, device="cpu"),
            "cosines": torch.full((self.window,), -1.0, dtype=torch.float32, device="cpu"),
        }

    def note_(self, state: State, old: Iterable[Tensor], new: Iterable[Tensor]) -> None:
        """Note how far the leading vectors have moved, and widen the interval if they have long stood still."""
        moved = [(a[..., 0] * b[..., 0]).sum(dim=-1).abs().mean() for a, b in zip(old, new, strict=True)]
        cosine = torch.stack(moved).mean().float().cpu()
        window, interval = cast(Tensor, state["cosines"]), cast(Tensor, state["interval"])
        window.copy_(torch.cat((window[1:], cosine[None])))
        if bool((window >= 0).all()) and float(window.mean()) >= self.threshold:
            interval.fill_(int(int(interval) * self.factor))
            window.fill_(-1.0)


def new_clock() -> State:
    """The clock at step 0 (module docstring)."""
    names = ("step", "due", "index", "refreshes", "failures")
    return {name: torch.zeros((), dtype=torch.int64, device="cpu") for name in names}


def is_due(clock: State) -> bool:
    """Whether the coming step refreshes the basis."""
    return count(clock, "step") >= count(clock, "due")


def are_due(clocks: list[State]) -> list[bool]:
    """``is_due`` of many clocks."""
    return [step >= due for step, due in zip(counts(clocks, "step"), counts(clocks, "due"), strict=True)]


def counts(clocks: list[State], name: str) -> list[int]:
    """``count`` of many clocks."""
    every: Any = clocks
    return [clock[name].item() for clock in every]


def count(clock: State, name: str) -> int:
    return int(cast(Tensor, clock[name]))


def advance_(clock: State, name: str, by: int = 1) -> None:
    cast(Tensor, clock[name]).add_(by)


def advance_all_(clocks: list[State], name: str) -> None:
    """``advance_`` of many clocks by 1."""
    every: Any = clocks
    add_one_([clock[name] for clock in every])


def schedule_next_(clock: State, interval: int, *, stagger: bool) -> None:
    """Set the step of the next refresh; the first interval is shortened by the phase."""
    first = count(clock, "step") == 0
    phase = int(count(clock, "index") * GOLDEN % 1.0 * interval) if stagger and first else 0
    cast(Tensor, clock["due"]).fill_(count(clock, "step") + interval - phase)


def stream(clock: State) -> int:
    """The seed of everything random in the present basis of this parameter."""
    return stable_seed(count(clock, "index"), count(clock, "refreshes"))


def streams(clocks: list[State]) -> list[int]:
    """``stream`` of many clocks."""
    return [stable_seed(*pair) for pair in zip(counts(clocks, "index"), counts(clocks, "refreshes"), strict=True)]


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


def rotation(old: Subspace, new: Subspace) -> Move:
    """The map (M, power) → C M C'ᵀ into the new basis, with the entries of C (left) and C' (right) to that power."""
    left = None if old.left is None or new.left is None else new.left.mT @ old.left
    right = None if old.right is None or new.right is None else new.right.mT @ old.right

    def move(moment: Tensor, power: int) -> Tensor:
        if left is not None:
            moment = left.pow(power) @ moment
        return moment if right is None else moment @ right.pow(power).mT

    return move


def copy_into_(state: State, fresh: State) -> None:
    """Overwrite a state by another of the same form, tensor by tensor, each staying in its dtype and on its device.

    Raises:
        ValueError: keys, shapes or dtypes differ; tensors before the first that differs have been overwritten.
    """
    if state.keys() != fresh.keys():
        raise ValueError(f"the state given holds {sorted(fresh)}, expected {sorted(state)}")
    for key, mine in state.items():
        value = fresh[key]
        if isinstance(mine, Tensor) and isinstance(value, Tensor):
            if (mine.shape, mine.dtype) != (value.shape, value.dtype):
                given, wanted = f"{value.dtype} {tuple(value.shape)}", f"{mine.dtype} {tuple(mine.shape)}"
                raise ValueError(f"{key} of the state given is {given}, expected {wanted}")
            mine.copy_(value)
        elif isinstance(mine, dict) and isinstance(value, dict):
            copy_into_(mine, value)
        else:
            raise ValueError(f"{key} of the state given is a {type(value).__name__}, expected a {type(mine).__name__}")


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
