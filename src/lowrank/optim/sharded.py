"""Rules on parameters of which every rank holds a shard (FSDP2): what each rule sees, and what of its state is here.

    element-wise   (AdamW, SGD) a number's step depends on that number alone: the rule runs on the shard, its state is
                   the shard's
    projected      R = Qᵀ G P and the step U come from the part of G here. Q is whole on every rank; R and its moments
                   are cut as G is along the side that is not projected, and then nothing travels. If the side that is
                   cut is the projected one, R is summed over the ranks and whole on each (``rank`` of the other side)
                   At a refresh of a basis that follows the gradient, G is gathered and every rank fits the same basis
    normalised     (Muon) momentum is the shard's; it is gathered every step, and every rank takes its shard of the
                   whole direction
    others         (Adafactor's means) need the whole parameter: refused

Stacks of matrices and matrices are cut along rows or columns; a tensor read as one matrix (out, …) along its first
dimension. ``consolidated_state`` and ``local_state`` go from shards to what one process would have, and back. int8
moments are kept in blocks of the shard: where those are not blocks of the whole, they are coded anew on the way, half a
code off.

Shapes as in ``projected``; with m rows of which mₗ are here, G (mₗ, cols).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from torch import Tensor

from lowrank.distributed.shards import Shard, ShardSpec
from lowrank.linalg.subspace import Subspace, Subspaces
from lowrank.optim.normalised import NormalisedMomentum
from lowrank.optim.pairs import OneFactor
from lowrank.optim.projected import Projected
from lowrank.optim.projected_sides import inside_shape, sides_of
from lowrank.optim.rules import Move, Rule, State
from lowrank.optim.state import leaves


def on_shard(rule: Rule, shard: Shard | None, name: str) -> Rule:
    """The rule as it acts on this rank's shard of a parameter; itself where the parameter is whole.

    Raises:
        ValueError: it cannot; the message names the parameter, the rule and the remedy.
    """
    if shard is None or rule.element_wise:
        return rule
    if isinstance(rule, NormalisedMomentum):
        return NormalisedShard(rule=rule, shard=shard) if len(shard.shape) > 1 else on_shard(rule.vectors, shard, name)
    if not isinstance(rule, Projected):
        kind = type(rule.pair if isinstance(rule, OneFactor) else rule).__name__
        raise ValueError(
            f"{kind} on {name} needs the whole gradient, and each rank has a shard of it: use AdamW, "
            "SGD or Muon, AdamW and SGD alone or projected (galore, galore_8bit, apollo, fira), or --engine ddp"
        )
    if rule.rank_for(shard.shape) is None:
        return on_shard(rule.inner, shard, name)
    if rule.one_basis:
        raise ValueError(
            f"{name} is sharded, and a basis that the matrices of a stack share needs all of each: {rule!r}"
        )
    on_shard(rule.inner, shard, name)
    if not rule.inner.element_wise or rule.error_feedback is not None:
        raise ValueError(
            f"{name} is sharded, and {rule!r} needs more of it than moments of R: use an inner rule whose steps are "
            "number by number (AdamW, SGD: one that does not project or normalise) and error_feedback=None, or "
            "--engine ddp"
        )
    dims = range(len(shard.shape) - 2, len(shard.shape)) if rule.stack or len(shard.shape) == 2 else range(1)
    if shard.dim not in dims:
        raise ValueError(
            f"{name} {shard.shape} is cut along dimension {shard.dim}, no side of the matrix that is projected: "
            "shard with lowrank.plan.fsdp.shard_(plan), which chooses one"
        )
    return ProjectedShard(**{f.name: getattr(rule, f.name) for f in fields(Projected)}, shard=shard)


def crosses(rule: Rule, shard: Shard, name: str) -> bool:
    """Whether the rule projects the side along which the parameter is cut, so that R is a sum over the ranks."""
    here = on_shard(rule, shard, name)
    return isinstance(here, ProjectedShard) and here.crosses


@dataclass(frozen=True, kw_only=True)
class NormalisedShard(Rule):
    """A rule that normalises its momentum, on a shard: gathers the momentum at every step. Final."""

    rule: NormalisedMomentum
    shard: Shard = field(repr=False, compare=False)

    def init(self, like: Tensor) -> State:
        return self.rule.init(like)

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        direction, gain = self.rule.normalised(self.shard.gather(self.rule.momentum_(g, state)))
        return self.shard.narrow(direction), gain

    def transport_(self, state: State, like: Tensor, move: Move) -> None:
        self.rule.transport_(state, like, move)


@dataclass(frozen=True, kw_only=True)
class ProjectedShard(Projected):
    """``Projected`` on a shard: shapes are those of the whole, products those of the shard. Final."""

    shard: Shard = field(repr=False, compare=False)

    @property
    def _whole_shape(self) -> tuple[int, ...]:
        return self._matrix_shape(self.shard.shape)

    @property
    def _dim(self) -> int:
        """Of the matrix, the dimension that is cut: −2 for rows, −1 for columns."""
        return self.shard.dim - len(self.shard.shape) if len(self.shard.shape) == len(self._whole_shape) else -2

    @property
    def crosses(self) -> bool:
        """Whether the side that is cut is projected, so that R is a sum over the ranks."""
        cut = "left" if self._dim == -2 else "right"
        return cut in sides_of(self.side, *self._whole_shape[-2:])

    def _stand_in(self, like: Tensor) -> Tensor:
        """A tensor of the whole's shape without memory; its values mean nothing."""
        return like.new_empty(()).expand(self.shard.shape)

    def init(self, like: Tensor) -> State:
        """The state of the shard that is ``like`` this one."""
        return super().init(self._stand_in(like))

    def inside_shape_here(self) -> tuple[int, ...]:
        """The shape of what this rank has of R."""
        shape = list(inside_shape(self._whole_shape, self.side, self.rank))
        if not self.crosses:
            shape[self._dim] = self.shard.local_shape[self.shard.dim]
        return tuple(shape)

    def like_inside(self, g: Tensor) -> Tensor:
        return g.new_empty(self.inside_shape_here())

    def present_each(self, like: Tensor, states: list[State]) -> Subspaces:
        if tuple(like.shape) == self._whole_shape:
            return super().present_each(like, states)
        whole = super().present_each(self._stand_in(like).reshape(self._whole_shape), states)
        return Subspaces.of([self._cut(whole[i]) for i in range(len(states))])

    def _refresh(self, g: Tensor, state: State) -> Subspace:
        """Of a basis that is drawn at random nothing need be gathered."""
        whole = self.shard.gather(g, self._dim) if self.basis.stored else self._stand_in(g).reshape(self._whole_shape)
        return self._cut(super()._refresh(whole, state))

    def _cut(self, whole: Subspace) -> Subspace:
        """The subspace as the shard here sees it."""
        sides: dict[str, Any] = {"left": whole.left, "right": whole.right}
        cut = "left" if self._dim == -2 else "right"
        if sides[cut] is not None:
            sides[cut] = self.shard.narrow(sides[cut], -2)
        return replace(whole, **sides, total=self.shard.total, crosses=self.crosses)


# --- shards and wholes of a state -------------------------------------------------------------------------------------


def consolidated_state(rule: Rule, shard: Shard, state: State, like: Tensor) -> State:
    """What one process would hold for the whole parameter; ``like`` is the shard here. Every rank must call it.

    Args:
        rule: as the plan has it. state: this rank's, of ``on_shard(rule, …)``.
    """
    return _converted(rule, shard, state, like, to_whole=True)


def local_state(rule: Rule, shard: Shard, whole: State, like: Tensor) -> State:
    """Of the state of a whole parameter what this rank holds."""
    return _converted(rule, shard, whole, like, to_whole=False)


def shard_specs(rule: Rule, shard: Shard, state: State, like: Tensor) -> dict[str, ShardSpec] | None:
    """How tensors of this rank's state are cut, by their dotted paths; those that are whole are not in it.

    None for a state in 8 bits, whose blocks are of the shard: no cut of the whole's.
    """
    here = on_shard(rule, shard, "the parameter")
    if not isinstance(here, ProjectedShard):
        moment, cut, moments = tuple(like.shape), ShardSpec(shard, shard.dim, shard.shape), leaves(state)
    elif here.crosses:
        return {}
    else:
        inside = inside_shape(here._whole_shape, here.side, here.rank)
        moment, cut = here.inside_shape_here(), ShardSpec(shard, len(inside) + here._dim, inside)
        moments = leaves(cast(State, state["inner"]), "inner.")
    found = dict(moments)
    if any(path.endswith(".codes") for path in found):
        return None
    return {path: cut for path, tensor in found.items() if tuple(tensor.shape) == moment}


def _converted(rule: Rule, shard: Shard, source: State, like: Tensor, *, to_whole: bool) -> State:
    here = on_shard(rule, shard, "the parameter")
    change = shard.gather if to_whole else shard.narrow
    if not isinstance(here, ProjectedShard):
        whole_like = like.new_empty(()).expand(shard.shape)
        before, after = (like, whole_like) if to_whole else (whole_like, like)
        return _moments_changed(here, source, before, after, lambda m: change(m, None))
    if here.crosses:
        return source
    stand_in = here._stand_in(like)
    whole_inside = stand_in.new_empty(()).expand(inside_shape(here._whole_shape, here.side, here.rank))
    before, after = here.like_inside(like), whole_inside
    before, after = (before, after) if to_whole else (after, before)
    dim = len(whole_inside.shape) + here._dim
    inner = _moments_changed(here.inner, cast(State, source["inner"]), before, after, lambda m: change(m, dim))
    return {**source, "inner": inner}


def _moments_changed(
    rule: Rule, source: State, before: Tensor, after: Tensor, change: Callable[[Tensor], Tensor]
) -> State:
    """The state of an element-wise rule for a tensor like ``after``, from that for one like ``before``."""
    moments: list[Tensor] = []

    def collect(moment: Tensor, power: int) -> Tensor:
        moments.append(moment.clone())
        return moment

    rule.transport_(source, before, collect)
    changed = iter([change(moment) for moment in moments])
    target = rule.init(after)
    rule.transport_(target, after, lambda moment, power: next(changed))
    for key, value in source.items():
        if isinstance(value, Tensor) and not value.dim():
            cast(Tensor, target[key]).copy_(value)
    return target
