"""The ledger: what a plan costs in memory before the first step, in bytes, exactly.

    weights     every parameter and buffer of the model, adapters included, tied ones once; of quantised ones the codes,
                scales and tables
    gradients   of every trained parameter; with per-layer updates, the largest one
    state       what the rules keep, counted from ``rule.init`` on tensors without storage
    kept        copies that adapters hold beside their factors (LTE's merged factors), the outer optimizer's momentum,
                and over several ranks the local rest as it last was everywhere, where its changes travel rounded

Of a sharded model (``plan.fsdp.shard_``) everything is what this rank holds. Activations depend on batch and context
and are not in it, nor is the one block whose weights are whole while it is computed; a run's log has the measured peak.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lowrank.adapters.layers import quantised_layers
from lowrank.linalg.quantised_linear import held
from lowrank.optim.rules import Rule
from lowrank.optim.sharded import on_shard
from lowrank.optim.state import leaves

if TYPE_CHECKING:
    from lowrank.plan.plan import Plan
    from lowrank.plan.row import Row


@dataclass(frozen=True)
class Ledger:
    """Bytes by what holds them."""

    weights: int
    factors: int
    kept: int
    gradients: int
    largest_gradient: int
    state: int

    @property
    def total(self) -> int:
        return self.weights + self.factors + self.kept + self.gradients + self.state

    @property
    def total_per_layer(self) -> int:
        """The total with per-layer updates, where one parameter's gradient exists at a time."""
        return self.total - self.gradients + self.largest_gradient


def ledger(plan: Plan) -> Ledger:
    """The ledger of a plan. Gradients have their parameter's dtype, states the dtypes that their rules give them."""
    adapters = {id(adapter): adapter for adapter in plan.adapters.values()}.values()
    kept = {id(b): b for adapter in adapters for b in adapter.buffers()}
    buffers = [b for b in plan.model.buffers() if id(b) not in kept]
    rows = [_held(row, plan) for row in plan.rows]
    quantised = quantised_layers(plan.model)
    codes = {f"{name}.weight" for name in quantised}
    packed = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for m in quantised.values() for t in held(m)}
    factor = [row for row in rows if row.is_factor]
    plain = [row for row in rows if not row.is_factor and row.name not in codes]
    gradients = [_bytes(row) for row in rows if row.rule is not None]
    return Ledger(
        weights=sum(map(_bytes, plain)) + sum(packed.values()) + sum(b.nbytes for b in buffers),
        factors=sum(map(_bytes, factor)),
        kept=sum(b.nbytes for b in kept.values()) + _reference_bytes(plan),
        gradients=sum(gradients),
        largest_gradient=max(gradients, default=0),
        state=sum(state_bytes(row.rule, row.shape, row.dtype) for row in rows if row.rule is not None),
    )


def _held(row: Row, plan: Plan) -> Row:
    """The row of what this process holds of the parameter."""
    part = plan.shards.get(row.name)
    if part is None:
        return row
    rule = None if row.rule is None else on_shard(row.rule, part, row.name)
    return replace(row, shape=part.local_shape, rule=rule)


def _reference_bytes(plan: Plan) -> int:
    merge = plan.method.merge
    if plan.ranks is None or merge is None or merge.exchange == "float32":
        return 0
    return sum(row.numel * max(4, row.dtype.itemsize) for row in plan.rows if row.rule and row.across == "local")


def state_bytes(rule: Rule, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of ``rule``'s state for one parameter, without allocating any."""
    return sum(t.nbytes for _, t in leaves(rule.init(torch.empty(shape, dtype=dtype, device="meta"))))


def _bytes(row: Row) -> int:
    return row.numel * row.dtype.itemsize


def megabytes(count: int) -> str:
    """Bytes for people, in decimal units.

    >>> megabytes(1_234), megabytes(123_456_789), megabytes(2_340_000_000)
    ('1.2 kB', '123.5 MB', '2.34 GB')
    """
    if count < 1_000_000:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1_000_000_000 else f"{count / 1e9:.2f} GB"
