"""Forecast of the bytes that each of several ranks will send, before the first step; and what DDP would send.

    merge      of each adapted matrix the factors of all heads, or a sum of dense changes, whichever is fewer; of dense
               heads that share a basis, the sum of their changes in it
    basis      that dense heads share, in the first step of its interval
    average    of the rest that trains locally
    gradients  of the shared parameters, every step; between refreshes a projected one sends R = QᵀG
    sharded    FSDP's own, every micro-batch: weights gathered, in blocks twice, and sums of their gradients. A merge
               then gathers each adapted matrix, a refresh the gradient; R is said only where the cut side is projected

All as its collectives count it (a ring), in the numbers' own width, at least four bytes, or rounded at merges and
averages as ``Merge.exchange`` says. A few bytes of control come on top: ``merge_words`` at a merge or an average, and
about fifty bytes at a step of the loop that sums gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowrank.adapters import SplitAdapter
from lowrank.adapters.compression import Compression, rounded_bytes
from lowrank.adapters.fragments import due
from lowrank.adapters.head_gather import split_adapters
from lowrank.adapters.layers import adapted_layers
from lowrank.distributed.collectives import largest_share, ring_gather_bytes, ring_sum_bytes, share
from lowrank.distributed.shards import Shard
from lowrank.optim.normalised import NormalisedMomentum
from lowrank.optim.projected import Projected
from lowrank.optim.rules import Rule
from lowrank.optim.sharded import crosses, on_shard
from lowrank.plan.fsdp import names_in_blocks
from lowrank.plan.plan import Plan
from lowrank.plan.row import Row
from lowrank.plan.synchronisation import fragments_of

MOST_STEPS = 10_000  # in which what merges and averages send together is looked for
# Said at a merge or average: whether one's numbers are finite (and what one has done, where it weighs), whether to stop
FINITE_BYTES, WEIGHED_BYTES, STOP_BYTES = 4, 24, 8


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes that one of ``ranks`` sends: at a merge, for a basis that heads share, at an average of the rest, with the
    gradients of a step (at a refresh and between refreshes), and what DDP would send every step, of the whole model
    and of the adapted matrices. ``merges`` and ``averages``: of each fragment, which travel at different steps.
    ``between_workers``: of what is sent, in the mean over the steps, what goes to other workers, where workers have
    several ranks."""

    ranks: int
    merges: tuple[int, ...]
    merge_every: int | None
    basis: int
    basis_every: int
    averages: tuple[int, ...]
    rest_every: int
    gradients: int
    gradients_between: int
    refresh_every: int
    ddp: int
    ddp_adapted: int
    sharded: int = 0
    between_workers: float = 0.0

    @property
    def merge(self) -> int:
        """Of all fragments."""
        return sum(self.merges)

    @property
    def average(self) -> int:
        """Of all fragments."""
        return sum(self.averages)

    def synchronisation(self, step: int) -> int:
        """What merges and averages send after so many steps."""
        merging = due(step, self.merge_every, len(self.merges)) if self.merge_every else None
        averaging = due(step, self.rest_every, len(self.averages))
        merged = 0 if merging is None else self.merges[merging]
        return merged + (0 if averaging is None else self.averages[averaging])

    @property
    def most(self) -> int:
        """The most that merges and averages send at one step."""
        period = math.lcm(self.merge_every or 1, self.rest_every)
        return max(map(self.synchronisation, range(1, min(period, MOST_STEPS) + 1)))

    @property
    def adapted_per_step(self) -> float:
        """The mean over the steps of what adapted matrices send."""
        merges = self.merge / self.merge_every if self.merge_every else 0.0
        return merges + self.basis / self.basis_every

    @property
    def per_step(self) -> float:
        """The mean over the steps of everything."""
        refreshes = (self.gradients - self.gradients_between) / self.refresh_every
        every_step = self.gradients_between + self.sharded
        return self.adapted_per_step + self.average / self.rest_every + every_step + refreshes


@dataclass(frozen=True)
class _Mesh:
    """So many workers of so many ranks: what travels where (``distributed.workers``), but for the padding of shares."""

    workers: int
    intra_worker: int

    def sums(self, size: int) -> _Sent:
        """Of what the ranks of a worker have alike, summed over the workers."""
        carried = -(-size // self.intra_worker)
        return _Sent(ring_sum_bytes(carried, self.workers), ring_gather_bytes(carried, self.intra_worker))

    def world(self, size: int) -> _Sent:
        """A sum over all ranks."""
        if self.workers == 1:
            return _Sent(0, ring_sum_bytes(size, self.intra_worker))
        return _Sent(0, ring_sum_bytes(size, self.intra_worker)) + self.sums(size)

    def gatherings(self, size: int) -> _Sent:
        """Of ``size`` bytes that the ranks of a worker have alike, those of all workers."""
        carried = -(-size // self.intra_worker)
        return _Sent(
            ring_gather_bytes(carried, self.workers), ring_gather_bytes(self.workers * carried, self.intra_worker)
        )

    def exchanged(self, exchange: Compression, shape: tuple[int, ...], width: int) -> _Sent:
        """A sum of such tensors, rounded where that is fewer bytes."""
        plain, rounded = math.prod(shape) * width, rounded_bytes(exchange, shape, width)
        less = exchange != "float32" and ring_gather_bytes(rounded, self.workers) < ring_sum_bytes(plain, self.workers)
        return self.gatherings(rounded) if less else self.sums(plain)


@dataclass(frozen=True)
class _Sent:
    """Bytes that one rank sends to other workers, and to the ranks of its own."""

    between: int = 0
    within: int = 0

    @property
    def total(self) -> int:
        return self.between + self.within

    def __add__(self, other: _Sent) -> _Sent:
        return _Sent(self.between + other.between, self.within + other.within)


def forecast(plan: Plan, ranks: int, *, whole: bool = False, micro_batches: int = 1) -> Forecast:
    """The traffic of a plan's method on ``ranks`` ranks; its model may lie on any device, also meta.

    ``whole``: no gradient is sent projected, since global-norm clipping needs them whole. ``micro_batches``: in a step.
    """
    mesh = _mesh(plan, ranks)
    trained = [row for row in plan.rows if row.rule is not None]
    pieces = {
        row.name: _piece(row, plan.shards[row.name], mesh.intra_worker) for row in trained if row.name in plan.shards
    }
    shared = [row for row in trained if row.across == "shared" and row.name not in pieces]
    rules = {row.rule.refresh_every for row in shared if isinstance(row.rule, Projected)}
    plain = [row for row in plan.rows if not row.is_factor]
    parameters = dict(plan.model.named_parameters())
    rule_of = {id(parameters[row.name]): row.rule for row in trained}
    split = [] if plan.layout.in_step else split_adapters(plan.model)
    fragments = 1 if plan.method.merge is None else plan.method.merge.fragments
    groups = fragments_of(split, fragments) if split else [[]] * fragments
    own, rest = ([row for row in trained if row.across == across] for across in ("own", "local"))
    under = sum(row.numel * _width(row.dtype) for row in plain if row.why == "under an adapter")
    merge, exchange = plan.method.merge, plan.method.merge.exchange if plan.method.merge is not None else "float32"

    merging = [
        sum((_merge(a, rule_of[id(next(a.parameters()))], mesh, exchange) for a in group), _Sent()) for group in groups
    ]
    basis = mesh.sums(sum(row.rule.agreed_numbers(row.shape) * _width(row.dtype) for row in own if row.rule))
    held = [(row if row.name not in pieces else replace(row, shape=(pieces[row.name],)), row.name) for row in rest]
    average = [
        _average([_rows(row, f, fragments) for row, name in held if name not in pieces], mesh, exchange)
        + _average([_rows(row, f, fragments) for row, name in held if name in pieces], _Mesh(mesh.workers, 1), exchange)
        for f in range(fragments)
    ]
    in_worker = ring_sum_bytes(sum(_bytes(row) for row in (*own, *rest) if row.name not in pieces), mesh.intra_worker)
    gradients = mesh.world(sum(map(_bytes, shared)))
    between = mesh.world(sum(map(_bytes if whole else _bytes_between, shared)))
    found = Forecast(
        ranks=ranks,
        merges=tuple(each.total for each in merging),
        merge_every=merge.merge_every if merge is not None and split else None,
        basis=basis.total,
        basis_every=min((r.rule.refresh_every for r in own if isinstance(r.rule, Projected)), default=1),
        averages=tuple(each.total for each in average),
        rest_every=plan.method.rest_interval,
        gradients=gradients.total + in_worker,
        gradients_between=between.total + in_worker,
        refresh_every=min(rules, default=1),
        ddp=ring_sum_bytes(sum(map(_bytes, plain)), ranks),
        ddp_adapted=ring_sum_bytes(under, ranks),
    )
    far = replace(
        found,
        merges=tuple(each.between for each in merging),
        basis=basis.between,
        averages=tuple(each.between for each in average),
        gradients=gradients.between,
        gradients_between=between.between,
    )
    found = replace(found, between_workers=far.per_step)
    return _with_shards(found, plan, mesh, micro_batches, whole=whole) if plan.shards else found


def _mesh(plan: Plan, ranks: int) -> _Mesh:
    """How the ranks are divided; where the plan knows of one process, every rank would be a worker."""
    if plan.layout.in_step:
        return _Mesh(1, ranks)
    intra_worker = plan.layout.ranks_per_worker
    return _Mesh(ranks // intra_worker, intra_worker)


def _with_shards(found: Forecast, plan: Plan, mesh: _Mesh, micro_batches: int, *, whole: bool) -> Forecast:
    """The forecast with what is said of sharded parameters."""
    inside, intra_worker = names_in_blocks(plan.model), mesh.intra_worker
    rows = [(row, plan.shards[row.name]) for row in plan.rows if row.name in plan.shards]
    pieces = {row.name: _piece(row, part, intra_worker) for row, part in rows}
    gathered = sum(pieces[row.name] * row.dtype.itemsize * (1 + (row.name in inside)) for row, _ in rows)
    summed = sum(pieces[row.name] * _width(row.dtype) for row, _ in rows if row.rule is not None)
    projected = [(row, row.rule, part) for row, part in rows if isinstance(row.rule, Projected)]
    refreshed = sum(pieces[row.name] * _width(row.dtype) for row, rule, _ in projected if rule.basis.stored)
    crossing = sum(
        torch.Size(rule.inside_shape(row.shape)).numel() * _width(row.dtype)
        for row, rule, part in projected
        if crosses(rule, part, row.name)
    )
    merge = plan.method.merge
    under = {row.name: pieces[row.name] * row.dtype.itemsize for row, _ in rows if row.why == "under an adapter"}
    matrices = _matrices(plan, under)
    merges = tuple(m + ring_gather_bytes(size, intra_worker) for m, size in zip(found.merges, matrices, strict=True))
    shared = [row for row, _ in rows if row.across == "shared" and row.rule is not None]
    to_peers = ring_sum_bytes(sum(pieces[row.name] * _width(row.dtype) for row in shared), mesh.workers)
    as_parts = sum(_part_between(row, plan.shards[row.name], pieces[row.name]) for row in shared)
    small = to_peers if whole else ring_sum_bytes(as_parts, mesh.workers)
    normalised = [row.name for row, _ in rows if isinstance(row.rule, NormalisedMomentum)]
    widths = {row.name: _width(row.dtype) for row, _ in rows}
    across = ring_sum_bytes(crossing, intra_worker)
    across += ring_gather_bytes(sum(pieces[name] * widths[name] for name in normalised), intra_worker)
    return replace(
        found,
        merges=(0,) if merge is None else merges,
        merge_every=None if merge is None else merge.merge_every,
        gradients=found.gradients + to_peers + across + ring_gather_bytes(refreshed, intra_worker),
        gradients_between=found.gradients_between + small + across,
        refresh_every=min((rule.refresh_every for _, rule, _ in projected), default=found.refresh_every),
        sharded=ring_gather_bytes(gathered + summed, intra_worker) * micro_batches,
        between_workers=found.between_workers + small,
    )


def _matrices(plan: Plan, under: Mapping[str, int]) -> list[int]:
    """Of each fragment the bytes of the matrices ``under`` adapters, by name, that have an adapter in it."""
    merge = plan.method.merge
    if merge is None or merge.fragments == 1:
        return [sum(under.values())]
    layers = [(f"{name}.weight", layer.adapters.values()) for name, layer in adapted_layers(plan.model)]
    groups = [{id(a) for a in group} for group in fragments_of(split_adapters(plan.model), merge.fragments)]
    return [sum(under.get(n, 0) for n, some in layers if any(id(a) in group for a in some)) for group in groups]


def _rows(row: Row, fragment: int, fragments: int) -> Row:
    """Of a parameter of the rest what a fragment has."""
    if fragments == 1:
        return row
    first, *others = row.shape or (1,)
    return replace(row, shape=(len(share(first, fragment, fragments)), *others))


def _piece(row: Row, part: Shard, ranks: int) -> int:
    """Numbers that each rank holds of the parameter, the padding of uneven rows included."""
    size = row.shape[part.dim]
    return row.numel // size * largest_share(size, ranks)


def merge_words(plan: Plan, ranks: int, *, loop: bool = True) -> int:
    """Bytes of control at a merge or an average: finite or not, and what the rank has done where that weighs; of the
    loop as well, which asks whether to stop."""
    weighed = plan.method.merge is not None and plan.method.merge.weigh != "equal"
    return ring_gather_bytes(WEIGHED_BYTES if weighed else FINITE_BYTES, ranks) + (
        ring_sum_bytes(STOP_BYTES, ranks) if loop else 0
    )


def _merge(adapter: SplitAdapter, rule: Rule | None, mesh: _Mesh, exchange: Compression) -> _Sent:
    packed, p = adapter.packed_bytes(mesh.workers, exchange), next(adapter.parameters())
    if packed is not None:
        return mesh.gatherings(packed)
    inside = rule.span_shape(tuple(p.shape)) if adapter.merges_in_subspace and isinstance(rule, Projected) else None
    return mesh.exchanged(exchange, inside or adapter.shape, p.dtype.itemsize)


def _average(rows: list[Row], mesh: _Mesh, exchange: Compression) -> _Sent:
    if exchange == "float32":
        return mesh.sums(sum(map(_bytes, rows)))
    return sum((mesh.exchanged(exchange, row.shape, _width(row.dtype)) for row in rows), _Sent())


def _width(dtype: torch.dtype) -> int:
    return max(4, dtype.itemsize)


def _bytes(row: Row) -> int:
    return row.numel * _width(row.dtype)


def _bytes_between(row: Row) -> int:
    """Bytes sent for one parameter's gradient at a step between two refreshes."""
    if isinstance(row.rule, Projected) and row.rule.keeps_projected:
        return torch.Size(row.rule.inside_shape(row.shape)).numel() * _width(row.dtype)
    return _bytes(row)


def _part_between(row: Row, part: Shard, piece: int) -> int:
    """The same for the part of it here."""
    if isinstance(row.rule, Projected) and row.rule.keeps_projected:
        rule: Any = on_shard(row.rule, part, row.name)
        return math.prod(rule.inside_shape_here()) * _width(row.dtype)
    return piece * _width(row.dtype)
