"""A plan for people: the table of its parameters, what it costs, and how several ranks train it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING

from lowrank.adapters import Adapter
from lowrank.distributed.collectives import share
from lowrank.distributed.workers import ProcessLayout
from lowrank.methods import Method
from lowrank.plan.ledger import megabytes
from lowrank.plan.row import Row

if TYPE_CHECKING:
    from lowrank.plan.plan import Plan


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
    return brief(row.rule) + (f" × lr {row.lr:g}" if row.lr != 1.0 else "")


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
        f"{where}: weights {megabytes(sheet.weights)} + factors {megabytes(sheet.factors)} + kept "
        f"{megabytes(sheet.kept)} + gradients {megabytes(sheet.gradients)} + state {megabytes(sheet.state)} = "
        f"{megabytes(sheet.total)} ({megabytes(sheet.total_per_layer)} with per-layer updates); activations come on top"
    ]


# --- several ranks ---------------------------------------------------------------------------------------------------


def notes_on_ranks(
    method: Method, layout: ProcessLayout, rows: Sequence[Row], adapters: Mapping[str, Adapter]
) -> list[str]:
    """Notes for the reader of a plan: which ranks train what, and when they communicate."""
    if layout.ranks is None:
        return _notes_alone(method, "process")
    size = {a: sum(r.numel for r in rows if r.rule is not None and r.across == a) for a in ("shared", "own", "local")}
    notes, member, count = [str(layout.ranks)], "rank", layout.workers_count
    if layout.intra_worker is not None and not layout.in_step:
        member = "worker"
        notes.append(f"{count} workers train apart, each of {layout.ranks_per_worker} ranks that train in step")
    for heads in sorted({a.all_heads for a in adapters.values() if a.split}):
        if layout.in_step:
            notes.append(f"every rank has all {heads} heads, and splits its rows of the batch between them")
            continue
        counts = [len(share(heads, place, count)) for place in range(count)]
        uneven = "" if len(set(counts)) == 1 else ", not evenly; in the mean every head weighs the same"
        one_by_one, each = "+".join(map(str, counts)), " or ".join(map(str, sorted({*counts})))
        parts = one_by_one if count <= 8 else f"{each} each"
        notes.append(f"{heads} heads are divided {parts} between the {member}s{uneven}")
    if size["own"]:
        every = f"merged every {method.merge.merge_every} steps" if method.merge else "never merged"
        if method.merge and method.merge.fragments > 1:
            every += f" in {method.merge.fragments} fragments, at different steps"
        silent = "nothing of them travels in between"
        if member == "worker":
            silent = "in between their gradients stay inside the worker"
        notes.append(f"{size['own']:,} numbers are this {member}'s own heads, {every}; {silent}")
    if method.merge is not None and method.merge.exchange != "float32" and not layout.in_step:
        notes.append(f"merges and averages travel as {method.merge.exchange}, where that is fewer bytes")
    if method.merge is not None and method.merge.weigh != "equal" and not layout.in_step:
        notes.append(f"in merges and averages {member}s weigh by {method.merge.weigh} since the last")
    if size["local"]:
        default = "the default here, " if method.rest == "auto" else ""
        notes.append(
            f"{size['local']:,} parameters train on each {member} by itself, averaged every {method.rest_interval} "
            f"steps ({default}rest='local')"
        )
    if layout.in_step:
        notes += _notes_alone(method, "worker")
    if size["shared"]:
        notes.append(f"the gradients of {size['shared']:,} parameters are summed over the ranks every step")
    return notes


def _notes_alone(method: Method, one: str) -> list[str]:
    """Options that are for several workers, and change nothing in ``one`` process or worker."""
    notes, merge = [], method.merge
    if method.rest == "local" or method.rest_every is not None:
        notes.append(f"in one {one} the rest is not averaged: rest='local' is 'train'")
    if merge is not None and merge.exchange != "float32":
        notes.append(f"in one {one} nothing is exchanged: exchange={merge.exchange!r} rounds nothing")
    if merge is not None and merge.weigh != "equal":
        notes.append(f"in one {one} all heads weigh the same: weigh={merge.weigh!r} is for several")
    return notes
