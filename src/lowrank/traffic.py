"""Forecast of the bytes that each of several ranks will send, before the first step; and what DDP would send.

    merge      of each adapted matrix the factors of all heads, or a sum of dense changes, whichever is fewer
    average    of the rest that trains locally
    gradients  of the shared parameters, every step; between refreshes a projected one sends R = QᵀG

All as ``infra.ranks`` counts it (a ring), in the numbers' own width, at least four bytes. A few bytes of control come
on top: ``merge_words`` at a merge or an average, and about fifty bytes at a step of the loop that sums gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank.adapters import Adapter, LoRAAdapter
from lowrank.adapters.lora import factors_are_fewer
from lowrank.binding import Row
from lowrank.infra.ranks import largest_share, ring_gather_bytes, ring_sum_bytes
from lowrank.optim.projected import Projected
from lowrank.plan import Plan

FINITE_BYTES, STOP_BYTES = 4, 8  # said at a merge or average: whether one's numbers are finite, whether to stop


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes that one of ``ranks`` sends.

    At a merge, at an average of the rest, with the gradients of a step (at a refresh and between refreshes), and what
    DDP would send every step, of the whole model and of the adapted matrices.
    """

    ranks: int
    merge: int
    merge_every: int | None
    average: int
    rest_every: int
    gradients: int
    gradients_between: int
    refresh_every: int
    ddp: int
    ddp_adapted: int

    @property
    def adapted_per_step(self) -> float:
        """The mean over the steps of what adapted matrices send."""
        return self.merge / self.merge_every if self.merge_every else 0.0

    @property
    def per_step(self) -> float:
        """The mean over the steps of everything."""
        refreshes = (self.gradients - self.gradients_between) / self.refresh_every
        return self.adapted_per_step + self.average / self.rest_every + self.gradients_between + refreshes


def forecast(plan: Plan, ranks: int, *, whole: bool = False) -> Forecast:
    """The traffic of a plan's method on ``ranks`` ranks; its model may lie on any device, also meta.

    ``whole``: no gradient is sent projected, since global-norm clipping needs them whole.
    """
    trained = [row for row in plan.rows if row.rule is not None]
    shared = [row for row in trained if row.across == "shared"]
    rules = {row.rule.refresh_every for row in shared if isinstance(row.rule, Projected)}
    plain = [row for row in plan.rows if not row.is_factor]
    split = [adapter for adapter in plan.adapters.values() if adapter.split]
    under = sum(row.numel * _width(row.dtype) for row in plain if row.why == "under an adapter")
    return Forecast(
        ranks=ranks,
        merge=sum(_merge_bytes(adapter, ranks) for adapter in split),
        merge_every=plan.method.merge.merge_every if plan.method.merge is not None and split else None,
        average=ring_sum_bytes(sum(map(_bytes, (r for r in trained if r.across == "local"))), ranks),
        rest_every=plan.method.rest_interval,
        gradients=ring_sum_bytes(sum(map(_bytes, shared)), ranks),
        gradients_between=ring_sum_bytes(sum(map(_bytes if whole else _bytes_between, shared)), ranks),
        refresh_every=min(rules, default=1),
        ddp=ring_sum_bytes(sum(map(_bytes, plain)), ranks),
        ddp_adapted=ring_sum_bytes(under, ranks),
    )


def merge_words(ranks: int, *, loop: bool = True) -> int:
    """Bytes of control at a merge or an average; of the loop as well, which asks whether to stop."""
    return ring_gather_bytes(FINITE_BYTES, ranks) + (ring_sum_bytes(STOP_BYTES, ranks) if loop else 0)


def _merge_bytes(adapter: Adapter, ranks: int) -> int:
    if isinstance(adapter, LoRAAdapter):
        rank, inputs, outputs = adapter.config.rank, adapter.A.shape[2], adapter.B.shape[1]
        width = adapter.A.dtype.itemsize
        if factors_are_fewer(adapter.all_heads, rank, (outputs, inputs), ranks):
            factors = largest_share(adapter.all_heads, ranks) * rank * (inputs + outputs)
            return ring_gather_bytes(factors * width, ranks)
        return ring_sum_bytes(outputs * inputs * width, ranks)
    dense = next(adapter.parameters())
    return ring_sum_bytes(dense[0].numel() * dense.dtype.itemsize, ranks)


def _width(dtype: torch.dtype) -> int:
    return max(4, dtype.itemsize)


def _bytes(row: Row) -> int:
    return row.numel * _width(row.dtype)


def _bytes_between(row: Row) -> int:
    """Bytes sent for one parameter's gradient at a step between two refreshes."""
    if isinstance(row.rule, Projected) and not row.rule.lift.needs_gradient:
        return torch.Size(row.rule.inside_shape(row.shape)).numel() * _width(row.dtype)
    return _bytes(row)
