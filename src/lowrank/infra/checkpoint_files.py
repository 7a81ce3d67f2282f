"""A checkpoint's files: measured when they are written, checked byte by byte before they are trusted, and read."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.infra.files import read_facts, sync, write_json

MANIFEST, STATE = "manifest.json", "state.json"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found or trusted; the message says which one is good."""


def measure(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file, read in pieces."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            checksum = zlib.crc32(piece, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def written_by() -> dict[str, Any]:
    """What tells later versions how to read a checkpoint."""
    from lowrank import __version__

    return {"format": FORMAT, "version": __version__}


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, int]], *, best: bool) -> None:
    """What `measure` said of every file, by its name in `folder`, and whether none was better; written last."""
    write_json(folder / MANIFEST, {**written_by(), "best": best, "files": files}, indent=None)
    sync(folder)


def manifest(folder: Path) -> dict[str, dict[str, int]]:
    """The files of a checkpoint by name, as they were when they were written."""
    files: dict[str, dict[str, int]] = json.loads((folder / MANIFEST).read_text())["files"]
    return files


def was_best(folder: Path) -> bool | None:
    """Whether a checkpoint was the best by validation when it was saved; None where its manifest is damaged."""
    described = read_facts(folder / MANIFEST)
    return bool(described.get("best")) if described else None


def refuse_newer(folder: Path, description: Mapping[str, Any] | None = None) -> None:
    """Refuse a checkpoint of a format that is not known yet, by its manifest or what else describes it.

    Raises:
        CheckpointError: naming the version that wrote it.
    """
    described = read_facts(folder / MANIFEST) if description is None else description
    written = described.get("format", FORMAT)
    if not isinstance(written, int):
        raise CheckpointError(f"checkpoint {folder} is damaged: it says that its format is {written!r}")
    if written > FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} is of format {written}, written by lowrank "
            f"{described.get('version', 'of a later version')}; this is lowrank {written_by()['version']}, which reads "
            f"up to format {FORMAT}: use the version that wrote it, or a newer one"
        )


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, or "" if nothing is."""
    try:
        files = manifest(folder)
        for name in (STATE, *files):
            found, wanted = measure(folder / name), files[name]
            if found["bytes"] != wanted["bytes"]:
                return f"{name} has {found['bytes']:,} bytes where {wanted['bytes']:,} were written"
            if found != wanted:
                return f"the content of {name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return ""


# --- shards, which torch.distributed.checkpoint has written, read by one process -------------------------------------


def read_consolidated(folder: Path, device: torch.device | str = "cpu", prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a folder of shards whose names begin so, put together in this process alone."""
    import torch.distributed.checkpoint as dcp

    reader = shard_reader(folder)
    found: dict[str, Any] = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype, device=device)
        for name, stored in stored_tensors(reader).items()
        if name.startswith(prefix)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def shard_reader(folder: Path) -> Any:
    import torch.distributed.checkpoint as dcp

    if not hasattr(dcp, "HuggingFaceStorageReader"):
        raise CheckpointError(
            f"{folder} is written in shards, which torch {torch.__version__} cannot read: use 2.9 or newer"
        )
    return dcp.HuggingFaceStorageReader(str(folder))


def stored_tensors(reader: Any) -> dict[str, Any]:
    """Sizes and dtypes of what a reader finds, by name."""
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    return stored
