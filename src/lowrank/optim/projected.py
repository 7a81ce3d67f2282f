"""Low-rank gradients: any update rule, run in a moving subspace of the gradient (GaLore, arXiv 2403.03507, and family).

    every T steps   Q ← basis(G, Q), the moments carried over
    each step       R = QᵀG,  (S, c) = inner(R),  U = lift(G, R, S, Q),  p ← p·(1 − lr·decay) − lr·c·scale·U

One rule with a few slots, each a small value. The papers are values of it:

    GaLore       Projected(rank=r)                                              2403.03507, algorithm 2
    Q-GaLore     … inner=AdamW(storage="int8"), basis_storage="int4",           2407.08296; weights are not quantised
                 lazy=Lazy()
    LDAdam       … refresh_every=1, basis=PowerIteration(iterations=1),         2410.16103; without error feedback
                 transport="rotate"
    APOLLO       … basis=Gaussian(), lift=Rescale(), scale=1                    2412.05270
    APOLLO-Mini  … rank=1, basis=Gaussian(), lift=Rescale(scope="tensor"),      2412.05270
                 scale=128 ** 0.5
    Fira         … lift=Residual()                                              2410.01623

Leading dimensions are a stack of matrices, as in A (heads, rank, in); ``stack=False`` reads a tensor (out, ...) as
one matrix (out, −1), and a plan shows convolutions as such matrices itself. Vectors, and matrices whose projected
side is no longer than the rank, follow the inner rule alone: at scale 1 a large enough rank *is*
``torch.optim.AdamW`` whatever the slots (Adam in a rotated full-rank basis would not be). A gradient that is not
finite leaves the basis as it is.

Deviations from galore-torch: power iteration instead of a full SVD, refreshes spread over the layers, bias
correction and decay as in ``torch.optim.AdamW``, float32 arithmetic throughout, state that is tensors only.
``galore_torch`` has its trajectory.

State of a matrix of sides short ≤ long, with r = min(rank, short): the basis (short·r numbers at side="short",
long·r at "long", both at "both", none for Gaussian); the inner rule's state for R; the clock, 40 bytes; one number
for a limiter; with ``lazy`` 8 + 4·window bytes. With AdamW at side="short": (short + 2·long)·r numbers and 40 + 4
bytes.

Shape legend: G, U (..., rows, cols);  Q (..., rows or cols, r);
R, S (..., r, cols) with a left basis, (..., rows, r) with a right one, (..., r, r) with both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from lowrank.linalg.basis import Basis, PowerIteration, orthonormalise
from lowrank.linalg.subspace import Subspace
from lowrank.optim.geometry import ProjectedSide, basis_shapes, check_side, inside_shape, matrix_of, sides_of
from lowrank.optim.lifts import GaLore, Lift
from lowrank.optim.refresh import (
    Lazy,
    Refresh,
    advance_,
    copy_into_,
    count,
    fit,
    fit_joint,
    is_due,
    new_clock,
    rotation,
    schedule_next_,
    stream,
    together,
)
from lowrank.optim.rules import AdamW, Rule, State, step_
from lowrank.optim.storage import BasisStorage, allocate, basis_code, check_storage, read, wide, write_

Transport = Literal["keep", "rotate", "reset"]


@dataclass(frozen=True, kw_only=True)
class Projected:
    """Run ``inner`` in a subspace of rank ``rank``. Itself a rule, so it nests.

    Args:
        inner: any rule.
        rank: of the subspace; at most min(rows, cols) of it is used.
        basis: ``PowerIteration``, ``SVD`` or ``Gaussian``.
        lift: ``GaLore``, ``Rescale`` (APOLLO) or ``Residual`` (Fira).
        refresh_every: steps between refreshes of the basis.
        scale: multiplies the step of projected matrices (GaLore's scale, Fira's alpha).
        side: which side is projected: the ``short`` one (the paper's; columns of a square), the ``long`` one, ``left``
            (rows), ``right`` (columns), or ``both``.
        transport: what becomes of the moments at a refresh: ``keep`` their coordinates (galore-torch), ``rotate`` them
            into the new basis, the first by C = QₙᵀQₒ and the second by C's squared entries (LDAdam), or ``reset``.
        stagger: spread the refreshes of the layers over the interval, so that no step pays for all of them.
        lazy: refresh ever less often where the subspace stands still (``Lazy``), or None.
        basis_storage: how the basis is kept: ``float32``, ``bfloat16``, ``int8`` or ``int4``.
        stack: whether leading dimensions are a stack of matrices; else a tensor (out, ...) is one matrix (out, −1).
        fallback: whether a matrix that the rank does not compress follows the inner rule alone; else it is projected
            all the same.
        one_basis: the matrices of a stack (heads) share a basis, the best for all of them together; so do those on
            other ranks.

    Raises:
        ValueError: a size that is not a positive whole number, an unknown word, or slots that do not go together.
    """

    inner: Rule = field(default_factory=AdamW)
    rank: int = 128
    basis: Basis = field(default_factory=PowerIteration)
    lift: Lift = field(default_factory=GaLore)
    refresh_every: int = 200
    scale: float = 0.25
    side: ProjectedSide = "short"
    transport: Transport = "keep"
    stagger: bool = True
    lazy: Lazy | None = None
    basis_storage: BasisStorage = "float32"
    stack: bool = True
    fallback: bool = True
    one_basis: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "refresh_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        check_side(self.side)
        if self.transport not in get_args(Transport):
            raise ValueError(f"transport={self.transport!r} is unknown; it is one of {', '.join(get_args(Transport))}")
        check_storage("basis_storage", self.basis_storage, BasisStorage)
        self.lift.check(self.side)
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.one_basis and not self.stack:
            raise ValueError("one_basis=True is for a stack of matrices: use stack=True")
        if not self.basis.orthonormal and (self.transport == "rotate" or self.lazy is not None):
            raise ValueError(
                "transport='rotate' and lazy= compare the old basis with the new one, but "
                f"{self.basis!r} is drawn anew; use transport='keep' and lazy=None"
            )
        if not self.basis.stored and self.basis_storage != "float32":
            raise ValueError(
                f"basis_storage={self.basis_storage!r} has nothing to act on: {self.basis!r} is not stored"
            )
        if self.transport == "rotate" and not hasattr(self.inner, "transport_"):
            raise ValueError(
                f"transport='rotate' needs an inner rule that can rotate its moments, and {type(self.inner).__name__} "
                "cannot; use 'keep' or 'reset'"
            )

    # --- what is projected ---------------------------------------------------------------------------------------

    def rank_for(self, shape: tuple[int, ...]) -> int | None:
        """The rank used for a parameter of this shape, or None where it follows the inner rule alone."""
        if len(shape) < 2:
            return None
        rows, cols = self._matrix_shape(shape)[-2:]
        shortest = min(size for *_, size, _ in basis_shapes((rows, cols), self.side, self.rank).values())
        if self.fallback and self.rank >= shortest:
            return None
        return min(self.rank, rows, cols)

    def inside_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the inner rule sees: that of R, or the parameter's own where it is not projected."""
        if self.rank_for(shape) is None:
            return tuple(shape)
        return inside_shape(self._matrix_shape(shape), self.side, self.rank)

    def resolve(self, like: Tensor, *, stacked: bool) -> Rule:
        """The rule that a parameter like this one follows: this one, or ``inner`` where projecting compresses nothing.

        ``stacked``: whether its leading dimensions are a stack of matrices (as in adapter factors) and not those of a
        convolution, which is read as one matrix.
        """
        rule = self if self.stack == stacked or like.dim() <= 2 else replace(self, stack=stacked)
        return self.inner if rule.rank_for(tuple(like.shape)) is None else rule

    def _matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape) if self.stack or len(shape) == 2 else (shape[0], math.prod(shape[1:]))

    # --- state ---------------------------------------------------------------------------------------------------

    def init(self, like: Tensor) -> State:
        if self.rank_for(like.shape) is None:
            plain = self.inner.init(like)
            return {"plain": plain} if "due" in plain else plain  # nested: not to be taken for a clock of this rule
        whole = like.new_empty((), dtype=wide(like.dtype)).expand(self._matrix_shape(like.shape))  # never read
        state: State = {
            **new_clock(),
            "inner": self.inner.init(self._like_inside(whole)),
            "lift": self.lift.init(whole),
        }
        if self.basis.stored:
            code = basis_code(self.basis_storage)
            shapes = basis_shapes(tuple(whole.shape), self.side, self.rank)
            state["basis"] = {
                side: allocate(whole.new_empty(s), self.basis_storage, code) for side, s in shapes.items()
            }
        return state if self.lazy is None else {**state, **self.lazy.init(self.refresh_every)}

    def _like_inside(self, g: Tensor) -> Tensor:
        """A tensor of the shape of R; its values are not set."""
        return g.new_empty(self.inside_shape(g.shape))

    def place_(self, state: State, index: int) -> None:
        """Note the parameter's ``index``: its phase in the refresh interval and its random streams follow from it."""
        if "due" in state:
            cast(Tensor, state["index"]).fill_(index)
        if hasattr(self.inner, "place_"):
            self.inner.place_(self._inner_state(state), index)

    def observe_(self, param: Tensor, state: State) -> None:
        """Show the parameter to an inner rule that wants to see it (Adafactor's parameter scale)."""
        if hasattr(self.inner, "observe_"):
            matrix = param.reshape(self._matrix_shape(param.shape)) if "due" in state else param
            self.inner.observe_(matrix, self._inner_state(state))

    def _inner_state(self, state: State) -> State:
        return cast(State, state["inner"] if "due" in state else state.get("plain", state))

    # --- one step ------------------------------------------------------------------------------------------------

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        if "due" not in state:
            return self.inner.update(g, self._inner_state(state))
        shape, g = g.shape, self._as_matrix(g)
        subspace = self._subspace(g, state)
        r = subspace.project(g)
        s, gain = self.inner.update(r, self._inner_state(state))
        u = self.lift(g, r, s, subspace, cast(State, state["lift"]))
        advance_(state, "step")
        return u.reshape(shape), gain * self.scale

    def apply_(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], *, lr: float, decay: float
    ) -> None:
        every = list(zip(params, grads, states, strict=True))
        for p, g, state in every:
            if "due" in state:
                g = self._as_matrix(g)
                subspace = self._subspace(g, state)
                self._advance_(p, g, subspace.project(g), subspace, state, lr=lr, decay=decay)
        plain = [(p, g, self._inner_state(state)) for p, g, state in every if "due" not in state]
        if plain:
            ps, gs, ss = (list(column) for column in zip(*plain, strict=True))
            step_(self.inner, ps, gs, ss, lr=lr, decay=decay)

    def _advance_(
        self, p: Tensor, g: Tensor | None, r: Tensor, subspace: Subspace, state: State, *, lr: float, decay: float
    ) -> None:
        """p ← p·(1 − lr·decay) − lr·c·scale·U, without a tensor for U."""
        self.observe_(p, state)
        inner, keep = self._inner_state(state), 1 - lr * decay
        if self.lift.needs_gradient or hasattr(self.inner, "observe_"):
            s, gain = self.inner.update(r, inner)
            alpha = gain * (-lr * self.scale)
        else:
            # Let the inner rule step a zero tensor of R's shape: that gives −lr·c·S, by whatever kernel it has.
            s, alpha = torch.zeros_like(r), self.scale
            step_(self.inner, [s], [r], [inner], lr=lr, decay=0.0)
        with matrix_of(p, self._matrix_shape(p.shape)) as target:
            self.lift.add_(target, g, r, s, subspace, cast(State, state["lift"]), alpha=alpha, beta=keep)
        advance_(state, "step")

    def _as_matrix(self, g: Tensor) -> Tensor:
        return g.reshape(self._matrix_shape(g.shape)).to(wide(g.dtype))

    # --- micro-batches kept as R ---------------------------------------------------------------------------------

    def folds(self, state: State) -> bool:
        """Whether the coming step needs only R = QᵀG of each micro-batch: no refresh is due, the lift needs no G."""
        return "due" in state and not self.lift.needs_gradient and not is_due(state)

    def fold(self, g: Tensor, state: State) -> Tensor:
        """R of one micro-batch's gradient ``g``; the sum over the micro-batches is the step's R."""
        g = self._as_matrix(g)
        return self._present(g, state).project(g)

    def apply_folded_(self, param: Tensor, folded: Tensor, state: State, *, lr: float, decay: float) -> None:
        """The step of ``apply_``, from the sum of the folded micro-batches."""
        subspace = self._present(self._as_matrix(param), state)
        self._advance_(param, None, folded, subspace, state, lr=lr, decay=decay)

    # --- the subspace --------------------------------------------------------------------------------------------

    def _subspace(self, g: Tensor, state: State) -> Subspace:
        return self._refresh(g, state) if is_due(state) else self._present(g, state)

    def _present(self, like: Tensor, state: State) -> Subspace:
        """The present basis for a matrix like this one, read from the state or drawn again."""
        shapes = basis_shapes(tuple(like.shape), self.side, self.rank)
        if not self.basis.stored:
            rank, seed = next(iter(shapes.values()))[-1], stream(state)
            drawn = {side: self.basis.fit(like, side, rank, old=None, seed=seed) for side in shapes}
            return Subspace(left=drawn.get("left"), right=drawn.get("right"))
        kept, code = cast(Any, state["basis"]), basis_code(self.basis_storage)
        found = {side: read(kept[side], code, shape, like.dtype) for side, shape in shapes.items()}
        return Subspace(left=found.get("left"), right=found.get("right"))

    def agreement(self, g: Tensor, state: State) -> Refresh | None:
        """Where the matrices of a stack share a basis that is due: its refresh, to be run (``refresh.together``) before
        the step by all who hold a part of the stack. ``apply_`` runs it alone where nobody has."""
        due = self.one_basis and "due" in state and is_due(state)
        return self._refreshing(self._as_matrix(g), state) if due else None

    def span(self, like: Tensor, state: State) -> Subspace | None:
        """The subspace, orthonormal and one for the whole stack, in which all steps since the last refresh lie; None
        where they do not lie in one."""
        if not self.one_basis or "due" not in state or self.lift.needs_gradient:
            return None
        present = self._present(self._as_matrix(like), state)
        sides = {"left": present.left, "right": present.right}
        found = {side: orthonormalise(q[0].clone())[0] for side, q in sides.items() if q is not None}
        return Subspace(left=found.get("left"), right=found.get("right"))

    def span_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of QᵀD of one matrix of a stack of this shape, where its changes have a ``span``."""
        inside = self.one_basis and not self.lift.needs_gradient and self.rank_for(shape) is not None
        return self.inside_shape(shape)[1:] if inside else None

    def agreed_numbers(self, shape: tuple[int, ...]) -> int:
        """How many numbers an ``agreement`` sums over all who hold a part of a stack of this shape."""
        if not self.one_basis or self.rank_for(shape) is None:
            return 0
        bases = basis_shapes(shape, self.side, self.rank).values()
        return sum(self.basis.joint_numbers(size, rank) for *_, size, rank in bases)

    def restart_(self, state: State, like: Tensor) -> None:
        """Begin anew; a basis that is shared with others stays, and so does its clock."""
        fresh = self.init(like)
        kept = ("inner", "lift") if self.one_basis and "due" in state else tuple(state)
        for name in kept:
            state[name] = fresh[name]

    def _refresh(self, g: Tensor, state: State) -> Subspace:
        return together([self._refreshing(g, state)], lambda told: None)[0]

    def _refreshing(self, g: Tensor, state: State) -> Refresh:
        """A new basis from ``g``; where that fails the old one stays, and is counted."""
        cold, sides = count(state, "refreshes") == 0, sides_of(self.side, *g.shape[-2:])
        old = None if cold else self._present(g, state).clone()
        if self.basis.stored:
            rank = min(self.rank, *g.shape[-2:])
            where: dict[str, Any] = {"old": old, "seed": stream(state)}
            if self.one_basis:
                new, failures = yield from fit_joint(self.basis, g, sides, rank, **where)
            else:
                new, failures = fit(self.basis, g, sides, rank, **where)
            advance_(state, "failures", failures)
            if not self.one_basis and cold and failures == math.prod(g.shape[:-2]):
                cast(Tensor, state["due"]).add_(1)  # the random basis serves for this step; the next tries again
                return new
            for side, kept in cast(Any, state["basis"]).items():
                write_(kept, getattr(new, side), basis_code(self.basis_storage), None)
        advance_(state, "refreshes")
        new = self._present(g, state)  # as stored, so that every step of the interval sees the same one
        if old is not None:
            self._carry_moments_(g, state, old, new)
            if self.lazy is not None:
                self.lazy.note_(state, [getattr(old, s) for s in sides], [getattr(new, s) for s in sides])
        interval = self.refresh_every if self.lazy is None else count(state, "interval")
        schedule_next_(state, interval, stagger=self.stagger)
        return new

    def _carry_moments_(self, g: Tensor, state: State, old: Subspace, new: Subspace) -> None:
        inner = self._inner_state(state)
        if self.transport == "reset":
            copy_into_(inner, self.inner.init(self._like_inside(g)))
            self.place_(state, count(state, "index"))
        elif self.transport == "rotate":
            cast(Any, self.inner).transport_(inner, self._like_inside(g), rotation(old, new))
