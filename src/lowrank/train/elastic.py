"""A run that goes on by itself: which checkpoint a started group goes on from, and who keeps one.

No shared disk is assumed. The first rank of every node keeps the whole run's folder on its own disk: settings, log and
checkpoints, each with the weights, the optimizer's state and the heads of all ranks. So a group may come back with any
one node's disk lost, with other nodes, or with more or fewer of them:

    is_writer    rank 0, and the first rank of each further node that does not see the same folder as one before it
    save_role    what each rank saves of a model that is sharded: its shards, where they can lie in one folder
    newest       the ranks exchange which newest good checkpoint they have; whoever lacks the newest of all gets a copy

Damaged checkpoints are passed over, with a note.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Literal

import torch

from lowrank.distributed.process_group import ProcessGroup, first_on_node
from lowrank.infra import checkpoint
from lowrank.infra.checkpoint import CheckpointError
from lowrank.plan.plan import Plan

PIECE = 1 << 24  # bytes of a file that travel at once

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


def newest(out: Path, ranks: ProcessGroup | None, *, writer: bool) -> tuple[Path | None, list[str]]:
    """(the newest good checkpoint that any node has of the run in ``out``, now on this node too, or None where there
    never was one; what a reader should know of it). Every rank must call it.

    Raises:
        CheckpointError: all that there are are damaged, or a rank does not see what its node's first rank has written.
    """
    root = out / "checkpoints"
    good, notes = checkpoint.newest_good(root)
    if ranks is None:
        _refuse_all_damaged(good is not None, notes)
        return good, _with_source(good, notes)
    everyone = ranks.gather_objects((_key(good), notes))
    keys = [key for key, _ in everyone if key is not None]
    notes = list(dict.fromkeys(note for _, theirs in everyone for note in theirs))
    _refuse_all_damaged(bool(keys), notes)
    if not keys:
        return None, notes
    key = max(keys)
    source = next(rank for rank, (theirs, _) in enumerate(everyone) if theirs == key)
    lacking = [rank for rank, (theirs, _) in enumerate(everyone) if theirs != key]
    folder = root / key[1]
    if lacking:
        _copy(folder, source, ranks, writes=writer and ranks.rank in lacking)
        _refuse_unseen(ranks.gather_objects(folder.is_dir()), folder)
        notes.append(f"rank {source} has given {key[1]} to {', '.join(f'rank {rank}' for rank in lacking)}")
    return folder, _with_source(folder, notes)


def _key(folder: Path | None) -> tuple[int, str, str] | None:
    """By which two checkpoints are compared: the step first, then names and what is in them."""
    if folder is None:
        return None
    return checkpoint.step_of(folder), folder.name, checkpoint.fingerprint(folder)


def _copy(folder: Path, source: int, ranks: ProcessGroup, *, writes: bool) -> None:
    """The checkpoint ``folder`` from rank ``source`` to the ranks that write; a killed process leaves no half of it."""
    mine = _files(folder) if ranks.rank == source else {}
    files = ranks.gather_objects(mine)[source]
    beside = folder.with_name(f".writing-{folder.name}")
    if writes:
        shutil.rmtree(beside, ignore_errors=True)
    for name, size in files.items():
        if writes:
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
        _copy_file(folder / name if ranks.rank == source else beside / name, size, source, ranks, writes=writes)
    if writes:
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or of another course of the run
        checkpoint.finish_(beside, folder)
    ranks.total(0.0)


def _copy_file(path: Path, size: int, source: int, ranks: ProcessGroup, *, writes: bool) -> None:
    file = path.open("rb" if ranks.rank == source else "wb") if writes or ranks.rank == source else None
    try:
        for start in range(0, size, PIECE):
            piece = torch.empty(min(PIECE, size - start), dtype=torch.uint8)
            if file is not None and ranks.rank == source:
                piece = torch.frombuffer(bytearray(file.read(len(piece))), dtype=torch.uint8)
            ranks.broadcast_([piece], source)
            if file is not None and writes:
                file.write(piece.numpy().tobytes())
    finally:
        if file is not None:
            file.close()


def _files(folder: Path) -> dict[str, int]:
    """Sizes of a folder's files by their relative names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def _with_source(folder: Path | None, notes: list[str]) -> list[str]:
    return notes if folder is None else [*notes, f"going on from {folder}"]


def _refuse_all_damaged(found: bool, notes: list[str]) -> None:
    if notes and not found:
        raise CheckpointError(f"{'; '.join(notes)}: no good one is left; remove the run's folder to begin anew")


def _refuse_unseen(seen: list[bool], folder: Path) -> None:
    if not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise CheckpointError(
            f"{folder} is not there for ranks {blind}, which write none: give every rank of a node the same --out, and "
            "start with torchrun, which numbers the ranks of a node"
        )
