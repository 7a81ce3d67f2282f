"""Checkpoints: safetensors for tensors, JSON for everything else, never pickle.

    root/step-00000200/model.safetensors       tensors by name, as `model.state_dict()` gives them
                       optimizer.safetensors   tensors of the optimizer's state, by path
                       state.json              the tree of that state, the training state, aliases, memory layouts
                       tokenizer/, images.json what the run has learnt of its data, so that the folder stands by itself
                       manifest.json           size and CRC-32 of each file, and whether this was the best: written last
    root/best.json                             the best by validation, for people; what counts are the manifests

Of a model that several ranks hold in shards, `model/` and `optimizer/` take the place of the two files, with one file a
rank, which torch.distributed.checkpoint has written and reads (`distributed.sharded_checkpoint`). Whoever reads sees no
difference.

A checkpoint is written under a temporary name, flushed to the disk and then renamed, so that a folder called `step-…`
is complete: a process killed, or a disk that fills up, in the middle leaves the previous one as it was. Only after the
rename are older ones removed. Dtypes are kept; so are memory layouts, because a matrix stored by columns multiplies
with other roundings than the same matrix stored by rows, and a resumed run is to be bitwise the same.
"""

from __future__ import annotations

import errno
import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank.infra.checkpoint_files import (
    MANIFEST,
    STATE,
    CheckpointError,
    damage,
    manifest,
    measure,
    read_consolidated,
    refuse_newer,
    was_best,
    write_manifest,
    written_by,
)
from lowrank.infra.checkpoint_tensors import PyTree, flatten, pack, unflatten, unpack
from lowrank.infra.files import read_facts, sync, user_mode_, write_json

Kind = Literal["model", "optimizer"]
BEST = "best.json"
Attach: TypeAlias = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `load` returns: `tensors` by name, `optimizer` and `meta` as they were given to `save`, each read
    when it is first asked for."""

    folder: Path
    state: Mapping[str, Any]  # of state.json
    device: torch.device | str = "cpu"

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return unpack(self._read("model"), self.notes("model"))

    @cached_property
    def optimizer(self) -> PyTree:
        return self._tree("optimizer")

    @cached_property
    def meta(self) -> PyTree:
        return self._tree("meta")

    def names(self, kind: Kind) -> list[str]:
        """The names of its tensors; nothing else is read."""
        single = self.folder / f"{kind}.safetensors"
        files = [single] if single.is_file() else sorted((self.folder / kind).glob("*.safetensors"))
        found: dict[str, None] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys())
        return [*found, *self.notes(kind)["aliases"]]

    def notes(self, kind: Kind) -> Mapping[str, Any]:
        """What safetensors could not store of its tensors (`pack`)."""
        found: Mapping[str, Any] = self.state["model" if kind == "model" else "nest"]
        return found

    def _tree(self, name: Literal["optimizer", "meta"]) -> PyTree:
        leaves = unpack(self._read("optimizer", f"{name}."), self.notes("optimizer"))
        return unflatten(self.state["tree"][name], leaves)

    def _read(self, kind: Kind, prefix: str = "") -> dict[str, Tensor]:
        """Those of its tensors whose names begin so."""
        single = self.folder / f"{kind}.safetensors"
        if not single.is_file():
            return read_consolidated(self.folder / kind, self.device, prefix)
        with safe_open(single, framework="pt", device=str(self.device)) as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
    best: bool = False,
    attach: Attach | None = None,
) -> Path:
    """Write one checkpoint beside the others and return its folder.

    Args:
        root: the folder of all checkpoints of the run; made if missing.
        step: completed optimizer steps.
        tensors: the model's state; names that share one tensor (tied weights) are stored once.
        optimizer: pytree of dicts (string or integer keys), lists, numbers, strings and tensors.
        meta: the training state, a pytree of the same kind (see `random_state`).
        keep: how many of the latest to keep, at least 1; the best one is kept besides.
        best: remember this one as the best so far.
        attach: writes further files, such as a tokenizer, into the folder that it is given.

    Raises:
        CheckpointError: the disk is full or refuses; the earlier checkpoints are untouched.
        TypeError: a pytree holds something that is neither data nor a tensor; the message gives its path.
        ValueError: `keep` below 1.
    """
    check_keep(keep)
    try:
        temporary = begin_(root, step)
        _write(temporary, step, tensors, optimizer, meta, best=best, attach=attach)
        return publish_(temporary, root, step, keep=keep, best=best)
    except (OSError, SafetensorError) as error:
        raise not_saved(root, step, error) from error


def check_keep(keep: int) -> None:
    """Raise ValueError for a number of checkpoints to keep that would keep none."""
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the latest checkpoint must be kept")


def writing(root: Path, step: int) -> Path:
    """The folder in which a checkpoint is written."""
    return root / f".writing-{step:08d}"


def begin_(root: Path, step: int) -> Path:
    """An empty folder for a checkpoint that is being written; what others have left unfinished is removed."""
    root.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(root)
    temporary = writing(root, step)
    temporary.mkdir()
    return temporary


def publish_(temporary: Path, root: Path, step: int, *, keep: int, best: bool) -> Path:
    """Give a complete checkpoint its name, and remove those that are not to be kept; returns its folder."""
    folder = _free_name(root, step)
    finish_(temporary, folder)
    if best:
        write_json(root / BEST, {"folder": folder.name, "step": step}, indent=None)
    prune_(root, keep)
    return folder


def not_saved(root: Path, step: int, error: Exception) -> CheckpointError:
    """The error for a checkpoint that could not be written, of which nothing is left."""
    shutil.rmtree(writing(root, step), ignore_errors=True)
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
    cause, remedy = ("the disk is full", "make room and resume") if full else (str(error), "resume once that is mended")
    earlier = saved(root)
    remains = f"the earlier checkpoint {earlier[-1]} is untouched" if earlier else "no earlier one exists"
    return CheckpointError(f"could not save the checkpoint of step {step} in {root}: {cause}; {remains}; {remedy}")


def load(folder: Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint after checking every byte of it.

    Raises:
        CheckpointError: there is none, or a file is missing, truncated or altered; the newest good one is named.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}{_remedy(folder)}")
    refuse_newer(folder)
    if wrong := damage(folder):
        raise CheckpointError(f"checkpoint {folder} is damaged: {wrong}{_remedy(folder)}")
    state = _state(folder)
    refuse_newer(folder, state)
    return Checkpoint(folder=folder, state=state, device=device)


def _state(folder: Path) -> dict[str, Any]:
    """What `state.json` holds, which has everything that a checkpoint says."""
    try:
        state = json.loads((folder / STATE).read_text())
        sound = all(isinstance(state[name], dict) for name in ("model", "nest", "tree")) and int(state["step"]) >= 0
        sound = sound and {"optimizer", "meta"} <= state["tree"].keys()
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(f"checkpoint {folder} is damaged: {STATE} does not say what was saved{_remedy(folder)}")
    return state


def saved(root: Path) -> list[Path]:
    """Folders of the complete checkpoints under `root`, oldest first."""
    return sorted((path for path in _beside(root) if _is_ours(path)), key=_age)


def foreign(root: Path) -> list[Path]:
    """What lies under `root` and is called like a checkpoint, but is none of ours: a copy, a link, a file. Ignored."""
    return [path for path in _beside(root) if path.name.startswith("step-") and not _is_ours(path)]


def passed_over(root: Path) -> list[str]:
    """What a reader should know of what is called like a checkpoint and not used, and of a best one that is gone."""
    notes = [f"{path} is no checkpoint of this run, and is left alone" for path in foreign(root)]
    recorded = _recorded_best(root)
    if recorded is None or recorded.exists():
        return notes
    if any(_age(folder) > _age(recorded) and was_best(folder) for folder in saved(root)):
        return notes  # a process died before it recorded that one
    return [*notes, f"{recorded}, which was the best, is gone: another takes its place"]


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
        refuse_newer(folder)
        found = damage(folder)
        if not found:
            return folder, wrong
        wrong.append(f"checkpoint {folder} is damaged: {found}")
    return None, wrong


def fingerprint(folder: Path) -> str:
    """Of a checkpoint's model, as its manifest says: the same for the same weights, without reading them."""
    model = {name: size for name, size in manifest(folder).items() if name.startswith("model")}
    return f"{folder.name} {model}"


def best(root: Path) -> Path | None:
    """Folder of the checkpoint that was best by validation, or None where none was marked.

    Raises:
        CheckpointError: one that may have been it is damaged, so that an earlier one would be taken in its place.
    """
    for folder in reversed(_newest_of_each_step(root)):
        marked = was_best(folder)
        if marked is None:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {damage(folder)}, so that it cannot be known whether it was the best"
                f"{_remedy(folder)}; or give the folder of the checkpoint that is meant"
            )
        if marked:
            return folder
    recorded = _recorded_best(root)
    return recorded if recorded is not None and recorded.is_dir() else None


def _recorded_best(root: Path) -> Path | None:
    """What `best.json` names: the only mark in runs that were written before 0.2."""
    folder = root / str(read_facts(root / BEST).get("folder"))
    return folder if _is_named_like_ours(folder) else None


def check_dtypes(held: Mapping[str, Tensor], state: Mapping[str, Tensor], saved: Checkpoint) -> None:
    """Refuse a model's tensors of other dtypes: torch would convert in silence, and that is another model.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    for name, tensor in state.items():
        if name in held and held[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"{name} is {held[name].dtype} in the model, {tensor.dtype} in checkpoint {saved.folder}: use the "
                "--precision and the --model.dtype that it was trained with"
            )


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is one checkpoint, wherever it lies."""
    return (folder / MANIFEST).is_file()


def discard_after(root: Path, step: int) -> None:
    """Remove the checkpoints beyond `step`: a run that goes on from there will write its own."""
    recorded = _recorded_best(root)
    if recorded is not None and step_of(recorded) > step:
        (root / BEST).unlink()
    for folder in saved(root):
        if step_of(folder) > step:
            _remove(folder)


def finish_(unfinished: Path, folder: Path) -> None:
    """Give a complete checkpoint its name: before, it is none; after, it is on the disk."""
    unfinished.rename(folder)
    sync(folder.parent)


def step_of(folder: Path) -> int:
    """Completed steps at which a checkpoint was saved, by its name."""
    return _age(folder)[0]


def _write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    best: bool,
    attach: Attach | None = None,
) -> None:
    """Fill `folder`, the manifest last, every file flushed to the disk."""
    if attach is not None:
        attach(folder)
    tree, leaves = flatten({"optimizer": optimizer, "meta": meta})
    model, model_notes = pack(tensors)
    packed, notes = pack(leaves)
    save_file(model, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, folder / "optimizer.safetensors", metadata={"format": "pt"})
    write_state(folder, step, model_notes, notes, tree)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        sync(path)
    user_mode_(folder)
    write_manifest(folder, {path.relative_to(folder).as_posix(): measure(path) for path in paths}, best=best)


def write_state(folder: Path, step: int, model: Mapping[str, Any], optimizer: Mapping[str, Any], tree: Any) -> None:
    """What is not a tensor: the step, what `pack` says of the model's and the optimizer's tensors, their tree."""
    content = {**written_by(), "step": step, "model": model, "nest": optimizer, "tree": tree}
    write_json(folder / STATE, content, indent=None)


def _remedy(folder: Path) -> str:
    """Names the newest good checkpoint beside `folder`, and how to go on from it."""
    folders = saved(folder.parent)
    good = next((other for other in reversed(folders) if other != folder and not damage(other)), None)
    if good is None:
        return f"; there is no good one in {folder.parent}"
    if folders[-1] == folder:
        return f"; the previous good one is {good}: delete the damaged folder to go on from there"
    return f"; a good one is {good}"


def _age(folder: Path) -> tuple[int, int]:
    """(step, revision) of `step-00000200` or `step-00000200-2`."""
    step, _, revision = folder.name.removeprefix("step-").partition("-")
    return int(step), int(revision or 1)


def _free_name(root: Path, step: int) -> Path:
    """A step saved a second time gets a name of its own, so that at no moment there is neither the old nor the new."""
    first = root / f"step-{step:08d}"
    names = itertools.chain([first], (first.with_name(f"{first.name}-{revision}") for revision in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _beside(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []


def _is_ours(path: Path) -> bool:
    return _is_named_like_ours(path) and path.is_dir() and not path.is_symlink()


def _is_named_like_ours(path: Path) -> bool:
    return re.fullmatch(r"step-\d{8,}(-\d+)?", path.name) is not None


def _remove(folder: Path) -> None:
    """Remove a checkpoint; of a process that dies meanwhile nothing is left that is called like one."""
    shutil.rmtree(folder.rename(folder.with_name(f".writing-{folder.name}-removed")))


def _remove_unfinished(root: Path) -> None:
    for folder in root.glob(".writing-*"):
        shutil.rmtree(folder)


def prune_(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` steps, and the best until the oldest of these, to which their best metric
    belongs; of one step only the newest revision stays."""
    _remove_unfinished(root)
    (root / f".{BEST}.writing").unlink(missing_ok=True)  # of a process that died
    newest = _newest_of_each_step(root)
    until = [folder for folder in newest if _age(folder) <= _age(newest[-keep:][0]) and was_best(folder)]
    unknown = [folder for folder in newest if was_best(folder) is None]  # damaged: it may have been the best
    kept = {*newest[-keep:], *unknown, until[-1] if until else _recorded_best(root)}
    for folder in saved(root):
        if folder not in kept:
            _remove(folder)


def _newest_of_each_step(root: Path) -> list[Path]:
    return list({_age(folder)[0]: folder for folder in saved(root)}.values())
