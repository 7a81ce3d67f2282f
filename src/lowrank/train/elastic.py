"""A run that goes on by itself: which checkpoint a started group goes on from.

No shared disk is assumed: every node has the whole run in a folder of its own (``folder``). So a group may come back
with any one node's disk lost, with other nodes, or with more or fewer of them: the ranks exchange which newest good
checkpoint they have, and whoever lacks the newest of all gets a copy. Damaged checkpoints are passed over, with a note.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lowrank.distributed.process_group import ProcessGroup
from lowrank.infra import checkpoint
from lowrank.infra.checkpoint import CheckpointError

PIECE = 1 << 24  # bytes of a file that travel at once


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
