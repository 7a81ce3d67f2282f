"""What happens between two steps: merges, and over several ranks the averaging of what they trained apart.

    merge due      W ← mean of merged(W) over the heads of all ranks (``adapters.across``); adapters settle. Overlapped,
                   what was sent at the last merge arrives, and this one's is sent
    average due    the rest that trains locally ← its mean over the ranks (local SGD, arXiv 1805.09767)
    before both    every rank tells whether its own numbers are finite, and what it has done, where ``Merge.weigh`` goes
                   by that. One whose numbers are not is left out, counted and reported; its heads and their state
                   are restarted, and its rest becomes the mean of the others'

``whole`` gives every rank the model that all of them make together, for evaluation and for checkpoints; there heads and
ranks weigh the same, whatever they will weigh in the next merge.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank.adapters.across import Terms, merge_across_, remember_, send, under_way
from lowrank.adapters.dense import DenseAdapter
from lowrank.adapters.exchange import SplitAdapter, split_adapters, whole_heads
from lowrank.adapters.merge import merge_adapters_
from lowrank.adapters.wire import add_up_
from lowrank.infra.parts import reshard_
from lowrank.infra.ranks import Ranks
from lowrank.linalg.products import Subspace
from lowrank.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from lowrank.plan import Plan


def talks(plan: Plan, steps: int) -> bool:
    """Whether the ranks communicate after ``steps`` completed steps: a merge or an average is due."""
    if plan.ranks is None:
        return False
    return bool(plan.shared) or (bool(plan.own) and _merging(plan, steps)) or _averaging(plan, steps)


def boundary_(plan: Plan, opt: Optimizer, steps: int, *, merge: bool = True) -> None:
    """Do what is due after ``steps`` completed steps; merges only where ``merge``."""
    plan.work.stepped()
    merging, averaging = merge and _merging(plan, steps), _averaging(plan, steps)
    if merging or averaging:
        meet_(plan, opt, merging=merging, averaging=averaging)


def meet_(plan: Plan, opt: Optimizer | None, *, merging: bool, averaging: bool) -> None:
    """Merge, average, or both, now; every rank must call it."""
    if merging:
        arrive_(plan)
    roll = heal_(plan, opt)
    if merging:
        _merge_(plan, opt, roll)
        plan.work.met("merge")
    if averaging or roll.left_out:
        average_rest_(plan, roll, opt.steps if opt is not None else 0)
        plan.work.met("average")


@dataclass(frozen=True)
class Roll:
    """Who takes part in a meeting: the ranks left out, and what each rank weighs in a merge and in an average (None:
    heads, or ranks, weigh the same)."""

    left_out: frozenset[int] = frozenset()
    merge: list[float] | None = None
    average: list[float] | None = None


def _merging(plan: Plan, steps: int) -> bool:
    return plan.method.merge is not None and plan.method.merge.due(steps)


def _averaging(plan: Plan, steps: int) -> bool:
    return bool(plan.local) and steps % plan.method.rest_interval == 0


def _merge_(plan: Plan, opt: Optimizer | None, roll: Roll) -> None:
    """Fold the adapters into the weights, without the heads of ranks that are left out; then the optimizer forgets."""
    merge, spans = plan.method.merge, {} if opt is None else _spans(plan, opt)
    if roll.merge is not None:
        _total(roll.merge)
    terms = Terms(roll.left_out, roll.merge, spans)
    if merge is not None and merge.overlap:
        remember_(plan.model)
        plan.under_way = None if plan.ranks is None else send(plan.model, plan.ranks, merge, terms)
    elif plan.ranks is not None and plan.own and merge is not None:
        merge_across_(plan.model, plan.ranks, merge, terms)
    else:
        reshard_(plan.model)
        merge_adapters_(plan.model, merge, plan.ranks)
    forget = merge.forget if merge else 0.0
    if opt is not None and forget:
        opt.forget([p for adapter in plan.adapters.values() for p in adapter.parameters()], forget)


def arrive_(plan: Plan) -> None:
    """Fold in what was sent at the last merge, if that is still under way; of several ranks all must call it."""
    merge = plan.method.merge
    if merge is None or not merge.overlap or not under_way(plan.model):
        return
    # In one process, and after a resume, nobody is sending what has been remembered.
    arrive = plan.under_way or send(plan.model, plan.ranks, merge)
    plan.under_way = None
    arrive()


def _spans(plan: Plan, opt: Optimizer) -> dict[SplitAdapter, Subspace]:
    """The subspace that the changes of dense heads lie in, where the rule that trains them keeps to one."""
    found = {adapter: opt.span(p) for p, adapter in zip(plan.own, plan.own_adapters, strict=True)}
    return {adapter: span for adapter, span in found.items() if span and isinstance(adapter, DenseAdapter)}


@torch.no_grad()
def heal_(plan: Plan, opt: Optimizer | None) -> Roll:
    """Everyone says whether its own numbers are finite, and what it has done; where they are not, heads and optimizer
    state begin anew.

    Raises:
        FloatingPointError: that is so on every rank.
    """
    ranks, mine = plan.ranks, [*plan.own, *plan.local]
    if ranks is None or not mine:
        return Roll()
    finite = torch.stack([p.isfinite().all() for p in mine]).all().float()[None]
    if plan.work.kind != "equal":
        finite = torch.tensor([float(finite), *plan.work.since.values()], dtype=torch.float64, device=finite.device)
    everyone = ranks.gather([finite])[0]
    sick = frozenset((everyone[:, 0] == 0).nonzero().flatten().tolist())
    if len(sick) == ranks.count:
        raise FloatingPointError(
            "the trained numbers of every rank are not finite: resume from the last checkpoint with a lower --lr"
        )
    if sick:
        arrive_(plan)  # before heads begin anew that have something under way
    if ranks.rank in sick:
        for adapter in split_adapters(plan.model):
            adapter.restart_()
        if opt is not None:
            opt.forget(mine, 1.0)
    for rank in sorted(sick):
        plan.left_out.append(rank)
        warnings.warn(
            f"rank {rank} is left out of this merge: its numbers are not finite; it begins anew", stacklevel=2
        )
    if plan.work.kind == "equal":
        return Roll(sick)
    everyone[sorted(sick)] = 0.0
    return Roll(sick, everyone[:, 1].tolist(), everyone[:, 2].tolist())


@torch.no_grad()
def average_rest_(plan: Plan, roll: Roll, tick: int = 0) -> None:
    """The rest that trains locally ← its mean over the ranks that take part; bitwise the same on all.

    What travels is rounded as ``Merge.exchange`` says: then it is what the rest has changed by since it was last the
    same everywhere (``plan.anchors``), so that rounding is as fine as the change.
    """
    if plan.ranks is None:
        return
    local, (mine, all_of_it) = [p.detach() for p in plan.local], _part(plan.ranks, roll)
    merge = plan.method.merge
    if not plan.anchors or merge is None:
        _average_(local, plan.ranks, mine, all_of_it)
        return
    changes = [p.to(a.dtype) - a for p, a in zip(local, plan.anchors, strict=True)]
    for change in changes:
        change.mul_(mine / all_of_it) if mine else change.zero_()  # what is not finite counts for nothing
    add_up_(changes, plan.ranks, merge.exchange, tick)
    for change, p, a in zip(changes, local, plan.anchors, strict=True):
        p.copy_(a.add_(change))


def _part(ranks: Ranks, roll: Roll) -> tuple[float, float]:
    """What this rank's rest counts for in the mean, and what all count for together."""
    if roll.average is None:
        return float(ranks.rank not in roll.left_out), ranks.count - len(roll.left_out)
    return roll.average[ranks.rank], _total(roll.average)


def _total(weights: Sequence[float]) -> float:
    if not sum(weights):
        raise ValueError(
            "the ranks weigh by what they have done since they last met, and none has done anything: a loop of your "
            "own says how many tokens a step has learnt from, plan.work.saw(n), before opt.step()"
        )
    return sum(weights)


def _average_(tensors: Sequence[Tensor], ranks: Ranks, mine: float, all_of_it: float) -> None:
    for tensor in tensors:
        tensor.mul_(mine) if mine else tensor.zero_()
    ranks.sum_(tensors)
    for tensor in tensors:
        tensor.div_(all_of_it)


@contextmanager
def whole(plan: Plan, opt: Optimizer | None = None) -> Iterator[None]:
    """A context in which the model is what all ranks make together: all heads, the mean of the rest.

    In one process it is so anyway, and nothing is done.
    """
    if plan.ranks is None or not (plan.own_adapters or plan.local):
        try:
            yield
        finally:
            if plan.parts:
                reshard_(plan.model)
        return
    roll = heal_(plan, opt)
    if roll.left_out:
        average_rest_(plan, roll)
        plan.work.met("average")
    own = [p.data for p in plan.local]
    with whole_heads(plan.model, plan.ranks):
        try:
            for p in plan.local:
                p.data = p.data.clone()
            _average_([p.data for p in plan.local], plan.ranks, 1.0, plan.ranks.count)
            yield
        finally:
            for p, data in zip(plan.local, own, strict=True):
                p.data = data
