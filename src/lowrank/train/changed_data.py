"""Whether a run's data is what it was trained on. Every checkpoint holds the data's fingerprint, of each rank's own
data under ``--own-data``; a path says nothing, as its files may be others by now, or others on another machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowrank.distributed.process_group import ProcessGroup, RanksDisagree
from lowrank.infra.checkpoint import Checkpoint
from lowrank.run.run import Run

ALLOW = "--allow-changed-data says that it is meant"


class ChangedDataError(ValueError):
    """A run is to go on with data that it was not trained on."""


def check_data(
    run: Run,
    now: str,
    saved: Checkpoint | None,
    ranks: ProcessGroup | None,
    *,
    worker: int = 0,
    allowed: bool = False,
    beside: bool = False,
) -> list[str]:
    """What a reader should know of changed data; every rank must call it.

    Args:
        run: which names the data; one from a ``run.json`` says what that run was trained on.
        now: the fingerprint of the data as it is; empty where it has none.
        saved: what is gone on from; None for a new run, which may be on any data.
        ranks: who train it together.
        worker: of this rank; under ``--own-data`` only the ranks of one worker have the same.
        allowed: whether other data is meant.
        beside: a new run is to stand in a table beside others, of whose data ``run`` has the fingerprint.

    Raises:
        ChangedDataError: on every rank, where one goes on with other data.
        RanksDisagree: ranks that are to have the same data hold different data under one path.
    """
    before = run.data.fingerprint if saved is None else trained_on(run, saved, ranks)
    changed = before if before and now and before != now else ""
    mine = (changed, now, worker, _path(run))
    found = [mine] if ranks is None else ranks.gather_objects(mine)
    notes = []
    for rank, (was, is_now, _, path) in enumerate(found):
        if was and saved is None and beside and not allowed:
            raise ChangedDataError(
                f"{path} has changed (content {is_now[:8]}) since the runs beside this one learnt from it ({was[:8]}), "
                "with which it cannot stand in one table: give --out NEW, or put the data back"
            )
        if was and saved is None:
            notes.append(f"note: {path} (content {is_now[:8]}) is not what that run.json was trained on ({was[:8]})")
        elif was:
            who = f"rank {rank}: " if run.own_data else ""
            text = f"{who}{path} is not what the run was trained on (content {is_now[:8]}, it was {was[:8]})"
            if not allowed:
                raise ChangedDataError(f"{text}: give it that data, or begin a new run with another --out; {ALLOW}")
            notes.append(f"note: {text}")
    return [*dict.fromkeys(notes), *_between_ranks(run, found, allowed=allowed)]


def trained_on(run: Run, saved: Checkpoint, ranks: ProcessGroup | None) -> str:
    """The fingerprint that a checkpoint holds of this rank's data; empty where it does not say."""
    of_ranks: list[str] = saved.meta.get("data_of_ranks") or []
    if run.own_data:
        rank, count = (0, 1) if ranks is None else (ranks.rank, ranks.count)
        return of_ranks[rank] if len(of_ranks) == count else ""
    return of_ranks[0] if of_ranks else str(saved.meta.get("learnt", {}).get("fingerprint", ""))


def _between_ranks(run: Run, found: Sequence[tuple[str, str, int, str]], *, allowed: bool) -> list[str]:
    first: dict[tuple[int, str], tuple[int, str]] = {}  # other paths are refused as such
    for rank, (_, now, worker, path) in enumerate(found):
        other, theirs = first.setdefault((worker if run.own_data else 0, path), (rank, now))
        if theirs != now:
            text = f"rank {rank} has other content in {path} ({now[:8]}) than rank {other} ({theirs[:8]})"
            if not allowed:
                raise RanksDisagree(
                    f"the ranks were not started alike: {text}. Give all of them the same data, or --own-data where "
                    f"each is to have its own; {ALLOW}"
                )
            return [f"note: {text}"]
    return []


def _path(run: Run) -> str:
    source: Any = run.data.args.get("source")
    return f"--data {run.data.name if source is None else source}"
