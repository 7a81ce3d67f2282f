"""The folder of a run: which ranks write it, its lock, and what describes the run in it.

No shared disk is assumed. The first rank of every node writes the whole run's folder on its own disk: settings, log and
checkpoints, each with the weights, the optimizer's state and the heads of all ranks.

    is_writer      rank 0, and the first rank of each further node that does not see the same folder as one before it
    save_role      what each rank saves of a model that is sharded: its shards, where they can lie in one folder
    lock_folder    two runs never write one folder
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lowrank.distributed.process_group import ProcessGroup, first_on_node
from lowrank.infra.environment import environment
from lowrank.infra.files import FolderInUseError, locked, read_facts, write_json
from lowrank.infra.step_clock import seconds_of
from lowrank.plan.plan import Plan
from lowrank.run.session import Session
from lowrank.run.validation import refuse_occupied

SUMMARY = "summary.json"

# What a rank gets of what is to be saved: all of it; its shards; nothing, but it helps those who do; or nothing.
SaveRole = Literal["full", "sharded", "assist", "none"]


def is_writer(out: Path, ranks: ProcessGroup | None) -> bool:
    """Whether this process writes the run's folder ``out``. Every rank must call it.

    Nodes that share a disk are found out by files that each first rank leaves there for a moment.
    """
    if ranks is None:
        return True
    first = ranks.gather_objects(first_on_node())
    if sum(first) < 2:
        return ranks.rank == 0
    seen = _in_our_folder(out, ranks, sign=first_on_node())
    return first_on_node() and min(seen) == ranks.rank


def save_role(out: Path, plan: Plan, *, writer: bool) -> SaveRole:
    """What this rank gets of what is to be saved; ``writer``: whether it writes. Every rank must call it.

    The ranks that hold a model in shards write them side by side where one of them writes and all see its folder.
    All checkpoints of a step are written alike, so that ranks can tell that they are the same.
    """
    if not plan.shards or plan.intra_worker is None or plan.ranks is None:
        return "full" if writer else "assist"
    writing = plan.ranks.gather_objects(writer)
    writers = [rank for rank in plan.intra_worker.numbers if writing[rank]]
    seen = _in_our_folder(out, plan.ranks, sign=writer)
    together = all(plan.ranks.gather_objects(not writers or (len(writers) == 1 and writers[0] in seen)))
    if not writers:
        return "none"
    if together:
        return "sharded"
    return "full" if writer else "assist"


def _in_our_folder(out: Path, ranks: ProcessGroup, *, sign: bool) -> set[int]:
    """Which of the ranks that leave a sign in ``out`` for a moment have the folder that this rank has by that name."""
    run = ranks.gather_objects(uuid.uuid4().hex)[0]
    signs = [out / f".here-{run}-{rank}" for rank in range(ranks.count)]
    if sign:
        out.mkdir(parents=True, exist_ok=True)
        signs[ranks.rank].touch()
    ranks.total(0.0)
    seen = {rank for rank, path in enumerate(signs) if path.exists()}
    ranks.total(0.0)
    signs[ranks.rank].unlink(missing_ok=True)
    return seen


@contextmanager
def lock_folder(out: Path, ranks: ProcessGroup | None, *, writer: bool, new: bool) -> Iterator[None]:
    """Meanwhile the run's folder is written by these ranks alone; what is refused to one is refused to all."""
    refused: OSError | None = None
    with ExitStack() as held:
        try:
            if writer:
                held.enter_context(locked(out))
                if new:
                    refuse_occupied(out)
        except (FolderInUseError, FileExistsError) as error:
            refused = error
        if refused is not None and ranks is None:
            raise refused
        mine = None if refused is None else (isinstance(refused, FolderInUseError), str(refused))
        for each in [] if ranks is None else ranks.gather_objects(mine):
            if each is not None:
                in_use, text = each
                raise (FolderInUseError if in_use else FileExistsError)(text)
        yield


def describe(session: Session, out: Path) -> None:
    """What the run is and what it runs on, into its folder."""
    out.mkdir(parents=True, exist_ok=True)
    run = session.run
    data = replace(run.data.placed(), fingerprint=session.data.fingerprint)
    if not getattr(session.data, "origin", True):  # a name, whatever lies here under it
        data = replace(data, places={name: place for name, place in data.places.items() if name != "source"})
    replace(run, data=data, model=run.model.placed()).write(out / "run.json")
    session.data.write_facts(out)
    if session.base is not None:
        session.base.write(out)
    write_json(out / "env.json", environment())


def summarised(session: Session, found: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of a run: what was ``found`` of it, and what its steps cost by the ``records`` of its log."""
    run, plan, rate = session.run, session.plan, f"{session.task.unit}_per_second"
    return {
        "recipe": run.recipe,
        "method": run.method.name,
        "seed": run.seed,
        **found,
        "parameters_trained": plan.parameters_trained,
        "parameters_total": plan.parameters_total,
        "state_bytes": plan.state_bytes,
        "kept_bytes": plan.kept_bytes,
        **{name: median(r[name] for r in records) if records else None for name in ("step_seconds", rate)},
        "peak_bytes": max((r["peak_bytes"] for r in records), default=None),
        "seconds": seconds_of(records),
    }


def is_complete(out: Path, end: int) -> bool:
    """Whether the folder has the summary of a run that came to the step ``end`` by itself."""
    summary = read_facts(out / SUMMARY)
    return summary.get("steps") == end and not summary.get("interrupted", True)
