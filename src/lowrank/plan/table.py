"""What the reader of a plan should know of several ranks: who trains what, and when they communicate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lowrank.adapters import Adapter
from lowrank.distributed.collectives import share
from lowrank.distributed.workers import ProcessLayout
from lowrank.methods import Method

if TYPE_CHECKING:
    from lowrank.plan.assignment import Row


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
        notes.append(f"{heads} heads are divided {'+'.join(map(str, counts))} between the {member}s{uneven}")
    if size["own"]:
        every = f"merged every {method.merge.merge_every} steps" if method.merge else "never merged"
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
