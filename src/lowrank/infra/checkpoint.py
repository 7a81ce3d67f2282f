"""Checkpoints: safetensors for tensors, JSON for everything else, never pickle.

    root/step-00000200/model.safetensors       tensors by name, as `model.state_dict()` gives them
                       optimizer.safetensors   tensors of the optimizer's nested state, by path
                       state.json              the shape of that nest, the training state, aliases, memory layouts
                       manifest.json           size and CRC-32 of each file: written last
    root/best.json                             which of the folders is the best by validation

A checkpoint is written under a temporary name, flushed to the disk and then renamed, so that a folder called `step-…`
is complete: a process killed, or a disk that fills up, in the middle leaves the previous one as it was. Only after the
rename are older ones removed. Dtypes are kept; so are memory layouts, because a matrix stored by columns multiplies
with other roundings than the same matrix stored by rows, and a resumed run is to be bitwise the same.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank.infra.nest import Nest, flatten, pack, unflatten, unpack

FORMAT = 1
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found or trusted; the message says which one is good."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `load` returns: `tensors` by name, the `optimizer` nest and `meta` as they were given to `save`."""

    step: int
    tensors: dict[str, Tensor]
    optimizer: Nest
    meta: Nest


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
    best: bool = False,
) -> Path:
    """Write one checkpoint beside the others and return its folder.

    Args:
        root: the folder of all checkpoints of the run; made if missing.
        step: completed optimizer steps.
        tensors: the model's state; names that share one tensor (tied weights) are stored once.
        optimizer: nest of dicts (string or integer keys), lists, numbers, strings and tensors.
        meta: the training state, a nest of the same kind (see `random_state`).
        keep: how many of the latest to keep, at least 1; the best one is kept besides.
        best: remember this one as the best so far.

    Raises:
        CheckpointError: the disk is full or refuses; the earlier checkpoints are untouched.
        TypeError: a nest holds something that is neither data nor a tensor; the message gives its path.
        ValueError: `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the latest checkpoint must be kept")
    temporary = root / f".writing-{step:08d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(root)
        temporary.mkdir()
        _write(temporary, step, tensors, optimizer, meta)
        folder = _free_name(root, step)
        finish_(temporary, folder)
        if best:
            _write_json(root / "best.json", {"folder": folder.name, "step": step})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_why_not_saved(root, step, error)) from error
    _prune(root, keep)
    return folder


def load(folder: Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint after checking every byte of it.

    Raises:
        CheckpointError: there is none, or a file is missing, truncated or altered; the newest good one is named.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}{_remedy(folder)}")
    damage = _damage(folder)
    if damage:
        raise CheckpointError(f"checkpoint {folder} is damaged: {damage}{_remedy(folder)}")
    state = json.loads((folder / "state.json").read_text())
    tensors = unpack(load_file(folder / "model.safetensors", device=str(device)), state["model"])
    nest = unpack(load_file(folder / "optimizer.safetensors", device=str(device)), state["nest"])
    whole = unflatten(state["tree"], nest)
    return Checkpoint(step=state["step"], tensors=tensors, optimizer=whole["optimizer"], meta=whole["meta"])


def saved(root: Path) -> list[Path]:
    """Folders of the complete checkpoints under `root`, oldest first."""
    return sorted(root.glob("step-[0-9]*"), key=_age) if root.is_dir() else []


def latest(root: Path) -> Path:
    """Folder of the newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    folders = saved(root)
    if not folders:
        raise CheckpointError(f"there is no checkpoint in {root}: the run stopped before it saved one")
    return folders[-1]


def newest_good(root: Path) -> tuple[Path | None, list[str]]:
    """Folder of the newest checkpoint whose every byte is right, or None; and what is wrong with each newer one."""
    wrong: list[str] = []
    for folder in reversed(saved(root)):
        damage = _damage(folder)
        if not damage:
            return folder, wrong
        wrong.append(f"checkpoint {folder} is damaged: {damage}")
    return None, wrong


def fingerprint(folder: Path) -> str:
    """Of a checkpoint's model, as its manifest says: the same for the same weights, without reading them."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return f"{folder.name} {files['model.safetensors']}"


def best(root: Path) -> Path | None:
    """Folder of the checkpoint that was best by validation, or None where none was marked."""
    pointer = root / "best.json"
    if not pointer.is_file():
        return None
    folder = root / json.loads(pointer.read_text())["folder"]
    return folder if folder.is_dir() else None


def discard_after(root: Path, step: int) -> None:
    """Remove the checkpoints beyond `step`: a run that goes on from there will write its own."""
    for folder in saved(root):
        if _age(folder)[0] > step:
            shutil.rmtree(folder)


def finish_(unfinished: Path, folder: Path) -> None:
    """Give a complete checkpoint its name: before, it is none; after, it is on the disk."""
    unfinished.rename(folder)
    _sync(folder.parent)


def step_of(folder: Path) -> int:
    """Completed steps at which a checkpoint was saved, by its name."""
    return _age(folder)[0]


def _write(
    folder: Path, step: int, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Fill `folder`, the manifest last, every file flushed to the disk."""
    tree, leaves = flatten({"optimizer": optimizer, "meta": meta})
    model, model_notes = pack(tensors)
    nest, nest_notes = pack(leaves)
    save_file(model, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(nest, folder / "optimizer.safetensors", metadata={"format": "pt"})
    state = {"format": FORMAT, "step": step, "model": model_notes, "nest": nest_notes, "tree": tree}
    _write_json(folder / "state.json", state)
    for name in _FILES[:2]:
        _sync(folder / name)
    _write_json(folder / "manifest.json", {"files": {name: _measure(folder / name) for name in _FILES}})
    _sync(folder)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside, flush, rename."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w") as file:
        json.dump(content, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measure(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file, read in pieces."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            checksum = zlib.crc32(piece, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, or "" if nothing is."""
    try:
        expected = json.loads((folder / "manifest.json").read_text())["files"]
        for name in _FILES:
            found, wanted = _measure(folder / name), expected[name]
            if found["bytes"] != wanted["bytes"]:
                return f"{name} has {found['bytes']:,} bytes where {wanted['bytes']:,} were written"
            if found != wanted:
                return f"the content of {name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return "manifest.json cannot be read"
    return ""


def _remedy(folder: Path) -> str:
    """Names the newest good checkpoint beside `folder`, and how to go on from it."""
    folders = saved(folder.parent)
    good = next((other for other in reversed(folders) if other != folder and not _damage(other)), None)
    if good is None:
        return f"; there is no good one in {folder.parent}"
    if folders[-1] == folder:
        return f"; the previous good one is {good}: delete the damaged folder to go on from there"
    return f"; a good one is {good}"


def _why_not_saved(root: Path, step: int, error: Exception) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
    cause = "the disk is full" if full else str(error)
    earlier = saved(root)
    remains = f"the earlier checkpoint {earlier[-1]} is untouched" if earlier else "no earlier one exists"
    remedy = "make room and resume" if full else "resume once that is mended"
    return f"could not save the checkpoint of step {step} in {root}: {cause}; {remains}; {remedy}"


def _age(folder: Path) -> tuple[int, int]:
    """(step, revision) of `step-00000200` or `step-00000200-2`."""
    step, _, revision = folder.name.removeprefix("step-").partition("-")
    return int(step), int(revision or 1)


def _free_name(root: Path, step: int) -> Path:
    """A step saved a second time gets a name of its own, so that at no moment there is neither the old nor the new."""
    names = _names(root, step)
    return next(name for name in names if not name.exists())


def _names(root: Path, step: int) -> Iterator[Path]:
    yield root / f"step-{step:08d}"
    revision = 2
    while True:
        yield root / f"step-{step:08d}-{revision}"
        revision += 1


def _remove_unfinished(root: Path) -> None:
    for folder in root.glob(".writing-*"):
        shutil.rmtree(folder)


def _prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` steps and the best; of one step only the newest revision stays."""
    newest = {_age(folder)[0]: folder for folder in saved(root)}
    kept = {*list(newest.values())[-keep:], best(root)}
    for folder in saved(root):
        if folder not in kept:
            shutil.rmtree(folder)
