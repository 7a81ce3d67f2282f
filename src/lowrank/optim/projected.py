"""Low-rank gradients: any update rule, run in a moving subspace of the gradient (GaLore, arXiv 2403.03507, and family).

    every T steps   Q ← basis(G, Q), the moments carried over
    each step       R = QᵀG,  (S, c) = inner(R),  U = lift(G, R, S, Q),  p ← p·(1 − lr·decay) − lr·c·scale·U

One rule with a few slots, each a small value. The papers are values of it:

    GaLore       Projected(rank=r)                                              2403.03507, algorithm 2
    Q-GaLore     … inner=AdamW(storage="int8"), basis_storage="int4",           2407.08296; weights are not quantised
                 lazy=Lazy()
    LDAdam       … refresh_every=1, basis=PowerIteration(iterations=1),         2410.16103, algorithm 1
                 transport="statistics", follow=0.908, scale=1,
                 error_feedback=ErrorFeedback(moments=True)
    APOLLO       … basis=Gaussian(), lift=Rescale(), scale=1                    2412.05270
    APOLLO-Mini  … rank=1, basis=Gaussian(), lift=Rescale(scope="tensor"),      2412.05270
                 scale=128 ** 0.5
    Fira         … lift=Residual()                                              2410.01623
    FRUGAL       … lift=Signed(), transport="reset", scale=1                    2411.07837

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
for a limiter; with ``lazy`` 8 + 4·window bytes; with ``error_feedback`` short·long numbers. With AdamW at
side="short": (short + 2·long)·r numbers and 40 + 4 bytes.

Shape legend: G, U (..., rows, cols);  Q (..., rows or cols, r);
R, S (..., r, cols) with a left basis, (..., rows, r) with a right one, (..., r, r) with both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from lowrank.infra.checks import check_choice, check_integer
from lowrank.linalg.basis import Basis, JointBasis, PowerIteration, Side, orthonormalise
from lowrank.linalg.kernels import chosen, rate, takes
from lowrank.linalg.subspace import Subspace, Subspaces, residual
from lowrank.optim.basis_fit import refreshing, together
from lowrank.optim.lifts import GaLore, Lift
from lowrank.optim.moment_transport import ErrorFeedback, Transport, check_turning
from lowrank.optim.projected_sides import ProjectedSide, basis_shapes, inside_shape, matrices_of
from lowrank.optim.refresh_clock import Lazy, advance_, advance_all_, are_due, is_due, new_clock, streams
from lowrank.optim.rules import AdamW, Refresh, Rule, State, check_rule
from lowrank.optim.stacks import alike, joined
from lowrank.optim.storage import BasisStorage, allocate, basis_code, read, wide


@dataclass(frozen=True, kw_only=True)
class Projected(Rule):
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
        transport: what becomes of the moments at a refresh (``optim.moment_transport``): ``keep`` (galore-torch),
            ``rotate``, ``statistics`` (LDAdam) or ``reset``.
        stagger: spread the refreshes of the layers over the interval, so that no step pays for all of them.
        lazy: refresh ever less often where the subspace stands still (``Lazy``), or None.
        basis_storage: how the basis is kept: ``float32``, ``bfloat16``, ``int8`` or ``int4``.
        stack: whether leading dimensions are a stack of matrices; else a tensor (out, ...) is one matrix (out, −1).
        fallback: whether a matrix that the rank does not compress follows the inner rule alone; else it is projected
            all the same.
        one_basis: the matrices of a stack (heads) share a basis, the best for all of them together; so do those on
            other ranks.
        error_feedback: add what the projection left out to the next gradient (``ErrorFeedback``), or None.
        follow: what the basis is fitted to at a refresh: ρ·(AdamW's first moment, lifted) + (1 − ρ)·G, with ρ this
            number in [0, 1).

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
    error_feedback: ErrorFeedback | None = None
    follow: float = 0.0

    projects = True

    def __repr__(self) -> str:
        """As a dataclass's, without the youngest fields where they do nothing: saved states name their rule so."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        for name in ("error_feedback", "follow"):
            if not shown[name]:
                del shown[name]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __post_init__(self) -> None:
        for name in ("rank", "refresh_every"):
            check_integer(name, getattr(self, name))
        check_choice("side", self.side, ProjectedSide)
        check_choice("transport", self.transport, Transport)
        check_choice("basis_storage", self.basis_storage, BasisStorage)
        check_rule(self.inner, "inner=")
        self.lift.check(self.side)
        self._check_pairs()
        check_turning(self)

    def _check_pairs(self) -> None:
        if self.one_basis and not self.stack:
            raise ValueError("one_basis=True is for a stack of matrices: use stack=True")
        if self.one_basis and not isinstance(self.basis, JointBasis):
            raise ValueError(f"one_basis=True needs a JointBasis, which {self.basis!r} is not")
        if not self.basis.stored and self.basis_storage != "float32":
            raise ValueError(
                f"basis_storage={self.basis_storage!r} has nothing to act on: {self.basis!r} is not stored"
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
        """This rule, or ``inner`` where projecting compresses nothing; a convolution is read as one matrix."""
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
            "inner": self.inner.init(self.like_inside(whole)),
            "lift": self.lift.init(whole),
        }
        if self.basis.stored:
            code = basis_code(self.basis_storage)
            shapes = basis_shapes(tuple(whole.shape), self.side, self.rank)
            state["basis"] = {
                side: allocate(whole.new_empty(s), self.basis_storage, code) for side, s in shapes.items()
            }
        if self.error_feedback is not None:
            state["error"] = torch.zeros(whole.shape, dtype=whole.dtype, device=like.device)
        return state if self.lazy is None else {**state, **self.lazy.init(self.refresh_every)}

    def like_inside(self, g: Tensor) -> Tensor:
        """A tensor of the shape of R; its values are not set."""
        return g.new_empty(self.inside_shape(g.shape))

    def place_(self, state: State, index: int) -> None:
        """Note the parameter's ``index``: its phase in the refresh interval and its random streams follow from it."""
        if "due" in state:
            cast(Tensor, state["index"]).fill_(index)
        self.inner.place_(self.inner_state(state), index)

    def observe_(self, param: Tensor, state: State) -> None:
        if self.inner.observes:
            matrix = param.reshape(self._matrix_shape(param.shape)) if "due" in state else param
            self.inner.observe_(matrix, self.inner_state(state))

    def inner_state(self, state: State) -> State:
        return cast(State, state["inner"] if "due" in state else state.get("plain", state))

    # --- one step ------------------------------------------------------------------------------------------------

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        if "due" not in state:
            return self.inner.update(g, self.inner_state(state))
        shape, g = g.shape, self._as_matrix(g, state)
        subspace = self._subspaces([g], [state])[0]
        r = subspace.project(g)
        self._keep_error_(g, r, subspace, state)
        s, gain = self.inner.update(r, self.inner_state(state))
        s, gain = (s * gain, 1.0) if self.lift.corrected else (s, gain)
        u = self.lift(g, r, s, subspace, cast(State, state["lift"]))
        advance_(state, "step")
        return u.reshape(shape), gain * self.scale

    def apply_(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], *, lr: float, decay: float
    ) -> None:
        projected = [i for i, state in enumerate(states) if "due" in state]
        if self._steps_together:
            stacks = [[projected[i] for i in at] for at in alike([grads[i] for i in projected])]
        else:
            stacks = [[i] for i in projected]
        for at in stacks:
            self._step_alike_(
                [params[i] for i in at], [grads[i] for i in at], [states[i] for i in at], lr=lr, decay=decay
            )
        if len(projected) < len(states):
            at = [i for i, state in enumerate(states) if "due" not in state]
            inner = [self.inner_state(states[i]) for i in at]
            self.inner.apply_([params[i] for i in at], [grads[i] for i in at], inner, lr=lr, decay=decay)

    def fused_(self, param: Tensor, grad: Tensor, state: State, *, lr: float | Tensor, decay: float, seed: int) -> bool:
        inner, plain = self.inner, type(self.lift) is GaLore and self.error_feedback is None and self.side != "both"
        if not (chosen("projected", param) and plain and "due" in state and param.dim() == 2 and takes(param, grad)):
            return False
        if not isinstance(inner, AdamW) or inner.storage != "float32":
            return False
        from lowrank.linalg.kernels.projected import projected_adam_

        like = grad.new_empty((), dtype=torch.float32).expand(grad.shape)  # never read
        q = self._refresh(grad.float(), state) if is_due(state) else self.present(like, state)
        left, moments = q.left is not None, cast(Any, state["inner"])
        projected_adam_(
            param,
            grad,
            cast(Tensor, q.left if left else q.right).contiguous(),
            (moments["exp_avg"], moments["exp_avg_sq"]),
            moments["step"],
            left=left,
            lr=rate(lr, param),
            decay=decay,
            scale=self.scale,
            betas=inner.betas,
            eps=inner.eps,
            seed=seed,
        )
        advance_(state, "step")
        return True

    @property
    def _steps_together(self) -> bool:
        """Whether parameters of one shape are stepped at once."""
        return self.inner.stacks or not (self.lift.needs_gradient or self.inner.observes)

    def _step_alike_(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], *, lr: float, decay: float
    ) -> None:
        """One step of parameters of one shape."""
        gs = grads
        if self.error_feedback is not None or gs[0].dim() != 2 or gs[0].dtype is not wide(gs[0].dtype):
            gs = [self._as_matrix(g, state) for g, state in zip(grads, states, strict=True)]
        subspaces = self._subspaces(gs, states)
        rs = subspaces.project(gs)
        if self.error_feedback is not None:
            for i, (g, r, state) in enumerate(zip(gs, rs, states, strict=True)):
                self._keep_error_(g, r, subspaces[i], state)
        self._advance_(params, gs, rs, subspaces, states, lr=lr, decay=decay)

    def _advance_(
        self,
        params: list[Tensor],
        gs: list[Tensor] | None,
        rs: list[Tensor],
        subspaces: Subspaces,
        states: list[State],
        *,
        lr: float,
        decay: float,
    ) -> None:
        """p ← p·(1 − lr·decay) − lr·c·scale·U, without a tensor for U."""
        every: Any = states
        inner: list[State] = [state["inner"] for state in every]
        keep: Any = 1 - lr * decay  # a tensor where the learning rate is
        alpha: Tensor | float
        if self.lift.needs_gradient or self.inner.observes:
            for p, state in zip(params, states, strict=True):
                self.observe_(p, state)
            s, gain = self.inner.update_joined(joined(rs), inner)
            s, gain = (s * gain, 1.0) if self.lift.corrected else (s, gain)
            alpha = gain * (-lr * self.scale)
        else:
            # Let the inner rule step zeros of R's shape: that gives −lr·c·S, by whatever kernel it has.
            s, alpha = rs[0].new_zeros(len(rs), *rs[0].shape), self.scale
            self.inner.apply_(list(s.unbind()), rs, inner, lr=lr, decay=0.0)
        lifts = [state["lift"] for state in every]
        if isinstance(keep, Tensor):  # and products take numbers of the host
            if decay:
                torch._foreach_mul_(params, keep)
            keep = 1.0
        with matrices_of(params, self._matrix_shape(params[0].shape)) as targets:
            self.lift.add_(targets, gs, rs, s, subspaces, lifts, alpha=alpha, beta=keep)
        advance_all_(states, "step")

    def _as_matrix(self, g: Tensor, state: State) -> Tensor:
        """The gradient as a stack of matrices, and with it what earlier steps left out."""
        if g.dim() != 2:
            g = g.reshape(self._matrix_shape(g.shape))
        if (dtype := wide(g.dtype)) is not g.dtype:
            g = g.to(dtype)
        return g if self.error_feedback is None else g + cast(Tensor, state["error"])

    def _keep_error_(self, g: Tensor, r: Tensor, subspace: Subspace, state: State) -> None:
        if self.error_feedback is not None:
            cast(Tensor, state["error"]).add_(residual(g, r, subspace, share=self.error_feedback.share))

    # --- steps in a CUDA graph -----------------------------------------------------------------------------------

    @property
    def refuses_capture(self) -> str:  # type: ignore[override]
        if self.refresh_every == 1:
            return "refreshes its basis, and so asks the host, at every step"
        return self.inner.refuses_capture if self.basis.stored else "draws its basis anew at every step"

    def is_ordinary(self, state: State) -> bool:
        return not ("due" in state and is_due(state)) and self.inner.is_ordinary(self.inner_state(state))

    def advance_host_(self, state: State) -> None:
        self.inner.advance_host_(self.inner_state(state))
        if "due" in state:
            advance_(state, "step")

    # --- gradients kept as R -------------------------------------------------------------------------------------

    @property
    def keeps_projected(self) -> bool:
        """Whether a step between two refreshes needs R alone: neither the lift nor the error feedback needs G."""
        return not self.lift.needs_gradient and self.error_feedback is None

    def accumulates_projected(self, state: State) -> bool:
        return "due" in state and self.keeps_projected and not is_due(state)

    def project(self, g: Tensor, state: State) -> Tensor:
        """R = QᵀG."""
        g = self._as_matrix(g, state)
        return self.present(g, state).project(g)

    def apply_projected_(self, param: Tensor, projected: Tensor, state: State, *, lr: float, decay: float) -> None:
        subspace = self.present(self._as_matrix(param, state), state)
        self._advance_([param], None, [projected], Subspaces.of([subspace]), [state], lr=lr, decay=decay)

    # --- the subspace --------------------------------------------------------------------------------------------

    def _subspaces(self, gs: list[Tensor], states: list[State]) -> Subspaces:
        """The subspace of the coming step for each of several matrices of one shape, refreshed where that is due."""
        if self.error_feedback is not None:  # it is in the gradients now
            torch._foreach_zero_([cast(Tensor, state["error"]) for state in states])
        due = are_due(states)
        if not any(due):
            return self.present_each(gs[0], states)
        others = [state for state, refresh in zip(states, due, strict=True) if not refresh]
        present = self.present_each(gs[0], others) if others else ()
        at, found = iter(range(len(present))), []
        for g, state, refresh in zip(gs, states, due, strict=True):
            found.append(self._refresh(g, state) if refresh else present[next(at)])
        return Subspaces.of(found)

    def present(self, like: Tensor, state: State) -> Subspace:
        """The present basis for a matrix like this one, read from the state or drawn again."""
        return self.present_each(like, [state])[0]

    def present_each(self, like: Tensor, states: list[State]) -> Subspaces:
        """``present`` for several matrices of the shape of ``like``."""
        found: dict[Side, list[Tensor]] = {}
        every: Any = states
        for side, shape in basis_shapes(tuple(like.shape), self.side, self.rank).items():
            if self.basis.stored:
                found[side] = [state["basis"][side] for state in every]
                if self.basis_storage != "float32" or found[side][0].dtype is not like.dtype:
                    code = basis_code(self.basis_storage)
                    found[side] = [read(q, code, shape, like.dtype) for q in found[side]]
            else:
                found[side] = self.basis.draw_each(like, side, shape[-1], streams(states))
        return Subspaces(left=found.get("left"), right=found.get("right"))

    @property
    def agrees(self) -> bool:  # type: ignore[override]
        return self.one_basis

    def agreement(self, g: Tensor, state: State) -> Refresh | None:
        """To be run by ``refresh.together``; ``apply_`` runs it alone where nobody has."""
        due = self.one_basis and "due" in state and is_due(state)
        return refreshing(self, self._as_matrix(g, state), state) if due else None

    def span(self, like: Tensor, state: State) -> Subspace | None:
        if not self.one_basis or "due" not in state or self.lift.needs_gradient:
            return None
        present = self.present(self._as_matrix(like, state), state)
        sides = {"left": present.left, "right": present.right}
        found = {side: orthonormalise(q[0].clone())[0] for side, q in sides.items() if q is not None}
        return Subspace(left=found.get("left"), right=found.get("right"))

    def span_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        inside = self.one_basis and not self.lift.needs_gradient and self.rank_for(shape) is not None
        return self.inside_shape(shape)[1:] if inside else None

    def agreed_numbers(self, shape: tuple[int, ...]) -> int:
        if not isinstance(self.basis, JointBasis) or not self.one_basis or self.rank_for(shape) is None:
            return 0
        bases = basis_shapes(shape, self.side, self.rank).values()
        return sum(self.basis.joint_numbers(size, rank) for *_, size, rank in bases)

    def restart_(self, state: State, like: Tensor) -> None:
        """Begin anew; a basis that is shared with others stays, and so does its clock."""
        fresh = self.init(like)
        shared = self.one_basis and "due" in state
        state.update({k: value for k, value in fresh.items() if not shared or k in ("inner", "lift", "error")})

    def _refresh(self, g: Tensor, state: State) -> Subspace:
        return together([refreshing(self, g, state)], lambda yielded: None)[0]
