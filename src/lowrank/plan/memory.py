"""The ledger: what a plan costs in memory before the first step, in bytes, exactly.

    weights     every parameter and buffer of the model, adapters included, tied ones once
    gradients   of every trained parameter; with per-layer updates, the largest one
    state       what the rules keep, counted from ``rule.init`` on tensors without storage
    kept        copies that adapters hold beside their factors (LTE's merged factors), the outer optimizer's momentum,
                and over several ranks the local rest as it last was everywhere, where its changes travel rounded

Of a sharded model (``sharding.shard_``) everything is what this rank holds. Activations depend on batch and context
and are not in it, nor is the one block whose weights are whole while it is computed; a run's log has the measured peak.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank.optim.rules import Rule, State
from lowrank.optim.sharded import on_part

if TYPE_CHECKING:
    from lowrank.plan.assignment import Row
    from lowrank.plan.plan import Plan


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
    factor = [row for row in rows if row.is_factor]
    plain = [row for row in rows if not row.is_factor]
    gradients = [_bytes(row) for row in rows if row.rule is not None]
    return Ledger(
        weights=sum(map(_bytes, plain)) + sum(b.numel() * b.element_size() for b in buffers),
        factors=sum(map(_bytes, factor)),
        kept=sum(b.numel() * b.element_size() for b in kept.values()) + _anchor_bytes(plan),
        gradients=sum(gradients),
        largest_gradient=max(gradients, default=0),
        state=sum(state_bytes(row.rule, row.shape, row.dtype) for row in rows if row.rule is not None),
    )


def _held(row: Row, plan: Plan) -> Row:
    """The row of what this process holds of the parameter."""
    part = plan.shards.get(row.name)
    if part is None:
        return row
    rule = None if row.rule is None else on_part(row.rule, part, row.name)
    return replace(row, shape=part.local_shape, rule=rule)


def _anchor_bytes(plan: Plan) -> int:
    merge = plan.method.merge
    if plan.ranks is None or merge is None or merge.exchange == "float32":
        return 0
    return sum(row.numel * max(4, row.dtype.itemsize) for row in plan.rows if row.rule and row.across == "local")


def state_bytes(rule: Rule, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of ``rule``'s state for one parameter, without allocating any."""
    return sum(
        t.numel() * t.element_size() for t in _tensors(rule.init(torch.empty(shape, dtype=dtype, device="meta")))
    )


def _tensors(state: State) -> Iterable[Tensor]:
    for value in state.values():
        if isinstance(value, Tensor):
            yield value
        else:
            yield from _tensors(value)


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


# --- the plan as a table ---------------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """The plan for people: one line for each kind of parameter, blocks of the same kind folded into one with ``×n``."""
    lines = [("parameter", "shape", "count", "trained by", "why")]
    folded: dict[tuple[str, ...], list[Row]] = {}
    for row in plan.rows:
        name = re.sub(r"\.\d+\.", ".*.", row.name)
        folded.setdefault((name, str(row.shape), _rule_text(row), row.why), []).append(row)
    for (name, _, rule, why), rows in folded.items():
        times = f" ×{len(rows)}" if len(rows) > 1 else ""
        shape = " × ".join(map(str, rows[0].shape)) or "scalar"
        lines.append((name + times, shape, f"{sum(row.numel for row in rows):,}", rule, why))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join([_headline(plan), "", *text, "", *_adapter_lines(plan), *plan.notes, *_ledger_lines(plan)])


def _rule_text(row: Row) -> str:
    if row.use is None:
        return "frozen"
    return brief(row.rule) + (f" × lr {row.use.lr:g}" if row.use.lr != 1.0 else "")


def brief(value: object) -> str:
    """A frozen dataclass as text, with only the fields that differ from their defaults.

    >>> from lowrank.optim.rules import AdamW
    >>> brief(AdamW()), brief(AdamW(eps=1e-6))
    ('AdamW', 'AdamW(eps=1e-06)')
    """
    if not is_dataclass(value) or isinstance(value, type):
        return str(value)
    shown = []
    for f in fields(value):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if getattr(value, f.name) != default:
            shown.append(f"{f.name}={brief(getattr(value, f.name))}")
    return type(value).__name__ + (f"({', '.join(shown)})" if shown else "")


def _headline(plan: Plan) -> str:
    total, trained = plan.parameters_total, plan.parameters_trained
    share = f"{trained / 1e6:.3f} M of {total / 1e6:.3f} M parameters train ({trained / total:.2%})"
    return f"method {plan.method.name}: {share}"


def _adapter_lines(plan: Plan) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for name, adapter in plan.adapters.items():
        kinds.setdefault(brief(adapter.config or type(adapter).__name__), []).append(name)
    lines = [f"{len(names)} layers with {kind}" for kind, names in kinds.items()]
    if plan.method.merge is not None:
        lines.append(brief(plan.method.merge))
    return lines


def _ledger_lines(plan: Plan) -> list[str]:
    sheet = plan.ledger
    where = "memory of this rank" if plan.shards else "memory"
    return [
        f"{where}: weights {megabytes(sheet.weights)} + factors {megabytes(sheet.factors)}"
        f" + kept {megabytes(sheet.kept)}"
        f" + gradients {megabytes(sheet.gradients)} + state {megabytes(sheet.state)} = {megabytes(sheet.total)}"
        f" ({megabytes(sheet.total_per_layer)} with per-layer updates); activations come on top"
    ]
