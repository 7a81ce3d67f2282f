"""A checkpoint's files: written so that they are on the disk, and checked byte by byte before they are trusted."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST, STATE = "manifest.json", "state.json"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found or trusted; the message says which one is good."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside, flush, rename."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w") as file:
        json.dump(content, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measure(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file, read in pieces."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            checksum = zlib.crc32(piece, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    """What `measure` said of every file, by its name in `folder`; written last."""
    write_json(folder / MANIFEST, {"files": files})
    sync(folder)


def manifest(folder: Path) -> dict[str, dict[str, int]]:
    """The files of a checkpoint by name, as they were when they were written."""
    files: dict[str, dict[str, int]] = json.loads((folder / MANIFEST).read_text())["files"]
    return files


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
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return ""
