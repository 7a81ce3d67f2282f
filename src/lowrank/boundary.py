"""What happens between two steps: merges, and over several ranks the averaging of what they trained apart.

    merge due      W ← mean of merged(W) over the heads of all ranks (``adapters.exchange``); adapters settle
    average due    the rest that trains locally ← its mean over the ranks (local SGD, arXiv 1805.09767)
    before both    every rank tells whether its own numbers are finite. One whose are not is left out, counted and
                   reported; its heads and their state are restarted, and its rest becomes the mean of the others'

``whole`` gives every rank the model that all of them make together, for evaluation and for checkpoints.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank.adapters.exchange import merge_across_, split_adapters, whole_heads
from lowrank.adapters.merge import merge_adapters_
from lowrank.infra.ranks import Ranks
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
    merging, averaging = merge and _merging(plan, steps), _averaging(plan, steps)
    if merging or averaging:
        meet_(plan, opt, merging=merging, averaging=averaging)


def meet_(plan: Plan, opt: Optimizer | None, *, merging: bool, averaging: bool) -> None:
    """Merge, average, or both, now; every rank must call it."""
    left_out = heal_(plan, opt)
    if merging:
        _merge_(plan, opt, left_out)
    if averaging or left_out:
        average_rest_(plan, left_out)


def _merging(plan: Plan, steps: int) -> bool:
    return plan.method.merge is not None and plan.method.merge.due(steps)


def _averaging(plan: Plan, steps: int) -> bool:
    return bool(plan.local) and steps % plan.method.rest_interval == 0


def _merge_(plan: Plan, opt: Optimizer | None, left_out: Collection[int] = ()) -> None:
    """Fold the adapters into the weights, without the heads of ranks that are left out; then the optimizer forgets."""
    if plan.ranks is not None and plan.own:
        merge_across_(plan.model, plan.ranks, left_out)
    else:
        merge_adapters_(plan.model)
    forget = plan.method.merge.forget if plan.method.merge else 0.0
    if opt is not None and forget:
        opt.forget([p for adapter in plan.adapters.values() for p in adapter.parameters()], forget)


@torch.no_grad()
def heal_(plan: Plan, opt: Optimizer | None) -> frozenset[int]:
    """The ranks whose own numbers are not finite; on those, heads and their optimizer state are restarted.

    Raises:
        FloatingPointError: no rank's numbers are finite.
    """
    ranks, mine = plan.ranks, [*plan.own, *plan.local]
    if ranks is None or not mine:
        return frozenset()
    finite = torch.stack([p.isfinite().all() for p in mine]).all().float()
    sick = frozenset((ranks.gather([finite[None]])[0].flatten() == 0).nonzero().flatten().tolist())
    if len(sick) == ranks.count:
        raise FloatingPointError(
            "the trained numbers of every rank are not finite: resume from the last checkpoint with a lower --lr"
        )
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
    return sick


@torch.no_grad()
def average_rest_(plan: Plan, left_out: Collection[int] = ()) -> None:
    """The rest that trains locally ← its mean over the ranks that are not left out; bitwise the same on all."""
    if plan.ranks is not None:
        _average_([p.detach() for p in plan.local], plan.ranks, left_out)


def _average_(tensors: Sequence[Tensor], ranks: Ranks, left_out: Collection[int]) -> None:
    if ranks.rank in left_out:
        for tensor in tensors:
            tensor.zero_()
    ranks.sum_(tensors)
    for tensor in tensors:
        tensor.div_(ranks.count - len(left_out))


@contextmanager
def whole(plan: Plan, opt: Optimizer | None = None) -> Iterator[None]:
    """A context in which the model is what all ranks make together: all heads, the mean of the rest.

    In one process it is so anyway, and nothing is done.
    """
    if plan.ranks is None or not (plan.own_adapters or plan.local):
        yield
        return
    left_out = heal_(plan, opt)
    if left_out:
        average_rest_(plan, left_out)
    own = [p.data for p in plan.local]
    with whole_heads(plan.model, plan.ranks):
        try:
            for p in plan.local:
                p.data = p.data.clone()
            _average_([p.data for p in plan.local], plan.ranks, ())
            yield
        finally:
            for p, data in zip(plan.local, own, strict=True):
                p.data = data
