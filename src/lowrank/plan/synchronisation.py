"""What happens between two steps: merges, and over several workers the averaging of what they trained apart.

    merge due      W ← mean of merged(W) over the heads of all workers (``adapters.across``); adapters settle.
                   Overlapped, what was sent at the last merge arrives, and this one's is sent
    average due    the rest that trains locally ← its mean over the workers (local SGD, arXiv 1805.09767)
    before both    every worker tells whether its own numbers are finite, and what it has done, where ``Merge.weigh``
                   goes by that. One whose numbers are not is left out, counted and reported; its heads and their state
                   are restarted, and its rest becomes the mean of the others'

A worker is a rank, or several ranks in step (``distributed.workers``).

``consolidated_model`` gives every rank the model that all of them make together, for evaluation and for checkpoints;
there heads and workers weigh the same, whatever they will weigh in the next merge.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank.adapters.compression import add_up_
from lowrank.adapters.dense import DenseAdapter
from lowrank.adapters.head_gather import SplitAdapter, split_adapters, whole_heads
from lowrank.adapters.merge import merge_adapters_
from lowrank.adapters.merge_across_workers import Terms, in_flight, merge_across_, remember_, start_merge
from lowrank.distributed.collectives import Group
from lowrank.distributed.shards import is_sharded, reshard_, to_local
from lowrank.linalg.subspace import Subspace
from lowrank.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from lowrank.plan.plan import Plan


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
        wait_(plan)
    roll = heal_(plan, opt)
    if merging:
        _merge_(plan, opt, roll)
        plan.work.met("merge")
    if averaging or roll.left_out:
        average_rest_(plan, roll, opt.steps if opt is not None else 0)
        plan.work.met("average")


@dataclass(frozen=True)
class Roll:
    """Who takes part in a meeting: the workers left out, and what each weighs in a merge and in an average (None:
    heads, or workers, weigh the same)."""

    left_out: frozenset[int] = frozenset()
    merge: list[float] | None = None
    average: list[float] | None = None


def _merging(plan: Plan, steps: int) -> bool:
    return plan.method.merge is not None and plan.method.merge.due(steps)


def _averaging(plan: Plan, steps: int) -> bool:
    return bool(plan.local) and steps % plan.method.rest_interval == 0


def _merge_(plan: Plan, opt: Optimizer | None, roll: Roll) -> None:
    """Fold the adapters into the weights, without the heads of those left out; then the optimizer forgets."""
    merge, spans = plan.method.merge, {} if opt is None else _spans(plan, opt)
    if roll.merge is not None:
        _total(roll.merge)
    terms = Terms(roll.left_out, roll.merge, spans, plan.intra_worker)
    reshard_(plan.model)
    if merge is not None and merge.overlap:
        remember_(plan.model)
        plan.in_flight = None if plan.workers is None else start_merge(plan.model, plan.workers, merge, terms)
    elif plan.workers is not None and plan.own and merge is not None:
        merge_across_(plan.model, plan.workers, merge, terms)
    else:
        merge_adapters_(plan.model, merge, plan.intra_worker)
    forget = merge.forget if merge else 0.0
    if opt is not None and forget:
        opt.forget([p for adapter in plan.adapters.values() for p in adapter.parameters()], forget)


def wait_(plan: Plan) -> None:
    """Fold in what was sent at the last merge, if that is still under way; of several ranks all must call it."""
    merge = plan.method.merge
    if merge is None or not merge.overlap or not in_flight(plan.model):
        return
    reshard_(plan.model)
    # In one process, and after a resume, nobody is sending what has been remembered.
    arrive = plan.in_flight or start_merge(plan.model, plan.workers, merge, Terms(intra_worker=plan.intra_worker))
    plan.in_flight = None
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
    workers, mine = plan.workers, [*plan.own, *plan.local]
    if workers is None or not mine:
        return Roll()
    bad = 1.0 - torch.stack([to_local(p).isfinite().all() for p in mine]).all().float()[None]
    if plan.work.kind != "equal":
        bad = torch.tensor([float(bad), *plan.work.since.values()], dtype=torch.float64, device=bad.device)
    if plan.intra_worker is not None:  # what is not finite may be in another one's part; and they have worked together
        plan.intra_worker.sum_([bad])
    everyone = workers.gather([bad])[0]
    sick = frozenset(everyone[:, 0].nonzero().flatten().tolist())
    member = "rank" if plan.intra_worker is None else "worker"
    if len(sick) == workers.count:
        raise FloatingPointError(
            f"the trained numbers of every {member} are not finite: resume from the last checkpoint with a lower --lr"
        )
    if sick:
        wait_(plan)  # before heads begin anew that have something under way
    if workers.rank in sick:
        for adapter in split_adapters(plan.model):
            adapter.restart_()
        if opt is not None:
            opt.forget(mine, 1.0)
    for number in sorted(sick):
        plan.left_out.append(number)
        warnings.warn(
            f"{member} {number} is left out of this merge: its numbers are not finite; it begins anew", stacklevel=2
        )
    if plan.work.kind == "equal":
        return Roll(sick)
    everyone[sorted(sick)] = 0.0
    return Roll(sick, everyone[:, 1].tolist(), everyone[:, 2].tolist())


@torch.no_grad()
def average_rest_(plan: Plan, roll: Roll, tick: int = 0) -> None:
    """The rest that trains locally ← its mean over the workers that take part; bitwise the same on all.

    What travels is rounded as ``Merge.exchange`` says: then it is what the rest has changed by since it was last the
    same everywhere (``plan.anchors``), so that rounding is as fine as the change.
    """
    if plan.workers is None:
        return
    reshard_(plan.model)
    rest, (mine, all_of_it) = [to_local(p) for p in plan.local], _part(plan.workers, roll)
    merge = plan.method.merge
    if not plan.anchors or merge is None:
        _average_(plan, rest, mine, all_of_it)
        return
    changes = [p.to(a.dtype) - a for p, a in zip(rest, plan.anchors, strict=True)]
    for change in changes:
        change.mul_(mine / all_of_it) if mine else change.zero_()  # what is not finite counts for nothing
    for group, some in _by_group(plan, changes):
        add_up_(some, group, merge.exchange, tick)
    for change, p, a in zip(changes, rest, plan.anchors, strict=True):
        p.copy_(a.add_(change))


def _part(workers: Group, roll: Roll) -> tuple[float, float]:
    """What this worker's rest counts for in the mean, and what all count for together."""
    if roll.average is None:
        return float(workers.rank not in roll.left_out), workers.count - len(roll.left_out)
    return roll.average[workers.rank], _total(roll.average)


def _total(weights: Sequence[float]) -> float:
    if not sum(weights):
        raise ValueError(
            "the ranks weigh by what they have done since they last met, and none has done anything: a loop of your "
            "own says how many tokens a step has learnt from, plan.work.saw(n), before opt.step()"
        )
    return sum(weights)


def _average_(plan: Plan, rest: Sequence[Tensor], mine: float, all_of_it: float) -> None:
    for tensor in rest:
        tensor.mul_(mine) if mine else tensor.zero_()
    for group, some in _by_group(plan, rest):
        group.sum_(some)
    for tensor in rest:
        tensor.div_(all_of_it)


def _by_group(plan: Plan, rest: Sequence[Tensor]) -> Iterator[tuple[Group, list[Tensor]]]:
    """With whom this rank adds up which of the tensors of ``plan.local``: shards with its cross-worker group, who hold
    the same shards of other workers' parameters; what the ranks of a worker hold alike with all workers."""
    in_parts = [is_sharded(p) for p in plan.local]
    for group, parts in ((plan.workers, False), (plan.layout.cross_worker, True)):
        some = [tensor for tensor, is_part in zip(rest, in_parts, strict=True) if is_part == parts]
        if some and group is not None:
            yield group, some


@contextmanager
def consolidated_model(plan: Plan, opt: Optimizer | None = None) -> Iterator[None]:
    """A context in which the model is what all ranks make together: all heads, the mean of the rest.

    In one process it is so anyway, and nothing is done.
    """
    if plan.workers is None or not (plan.own_adapters or plan.local):
        try:
            yield
        finally:
            reshard_(plan.model)
        return
    roll = heal_(plan, opt)
    if roll.left_out:
        average_rest_(plan, roll)
        plan.work.met("average")
    reshard_(plan.model)
    rest = [to_local(p) for p in plan.local]
    own = [tensor.clone() for tensor in rest]
    with whole_heads(plan.model, plan.workers):
        try:
            with torch.no_grad():
                _average_(plan, rest, 1.0, plan.workers.count)
            yield
        finally:
            reshard_(plan.model)
            with torch.no_grad():
                for tensor, before in zip(rest, own, strict=True):
                    tensor.copy_(before)


whole = consolidated_model  # its name before 0.2
