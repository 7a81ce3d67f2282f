"""What becomes of gradients before a rule sees them: summed over ranks, clipped, read as what is here of a sharded one.

A rule that ``folds`` needs R = QᵀG alone for its coming step; R then takes the gradient's place, between micro-batches
and on the way to other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.distributed.collectives import Group
from lowrank.distributed.shards import Shard, to_local
from lowrank.optim.refresh import Refresh, together
from lowrank.optim.rules import Rule, wide

Fold = Callable[[nn.Parameter, Tensor], Tensor | None]
Finish = Callable[[dict[nn.Parameter, Tensor]], None]


def dense(g: Tensor | None) -> Tensor:
    """The gradient, or the part of it here.

    Raises:
        RuntimeError: it is sparse.
    """
    assert g is not None
    if g.is_sparse:
        raise RuntimeError("sparse gradients are not supported: make the embedding with sparse=False")
    return to_local(g)


def clipped(g: Tensor, limit: float, part: Shard | None) -> Tensor:
    """The gradient, float32 or wider, scaled so that its norm is at most ``limit``; of a ``part`` the whole's norm."""
    g = g.to(wide(g.dtype))
    norm = torch.linalg.vector_norm(g)
    if part is not None:
        norm = part.total(norm.square()).sqrt()
    return g * (limit / (norm + 1e-6)).clamp(max=1.0)


def start_sum(group: Group, params: Sequence[nn.Parameter], fold: Fold) -> Finish:
    """Start to sum the gradients of parameters over a group, whose members all must call it, and go on; the function
    returned waits, and takes the dict for what was folded.

    A gradient that ``fold`` makes small is summed so: ``grad`` is then None, and the sum goes into the dict. A
    parameter without a gradient on some ranks counts as zero there, and without one on all stays without.
    """
    present = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    sent: list[Tensor] = []
    small: dict[nn.Parameter, Tensor] = {}
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        g = dense(p.grad)
        if (folded := fold(p, g)) is not None:
            small[p], p.grad = folded, None
        sent.append(small.get(p, g))
    arrive = group.start_sum([present, *sent])

    def finish(held: dict[nn.Parameter, Tensor]) -> None:
        arrive()
        for p, holders in zip(params, present.tolist(), strict=True):
            if not holders:
                p.grad = None
            elif p in small:
                held[p] = small[p]

    return finish


def sum_gradients_(summed: Mapping[nn.Parameter, Group], fold: Fold, held: dict[nn.Parameter, Tensor]) -> None:
    """``start_sum``, waited for, of each parameter over the group that ``summed`` gives for it."""
    for group in dict.fromkeys(summed.values()):
        start_sum(group, [p for p, over in summed.items() if over is group], fold)(held)


def agree_bases_(
    params: Iterable[nn.Parameter],
    rules: Mapping[nn.Parameter, Rule],
    states: Mapping[Any, Any],
    agreed: Mapping[nn.Parameter, Group],
) -> None:
    """Refresh the bases that heads share and that are due; with those whom ``agreed`` names, where others have heads of
    the same parameter."""
    due: dict[Group | None, list[Refresh]] = {}
    for p in params:
        agreement, others = getattr(rules[p], "agreement", None), agreed.get(p)
        if agreement is None or (others is None and p.grad is None):
            continue
        g = torch.zeros_like(p) if p.grad is None else dense(p.grad)
        if (refresh := agreement(g, states[p])) is not None:
            due.setdefault(others, []).append(refresh)
    for others, refreshes in due.items():
        together(refreshes, (lambda told: None) if others is None else others.sum_)
