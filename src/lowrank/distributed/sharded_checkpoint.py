"""Checkpoints of a model that several ranks hold in shards, by torch.distributed.checkpoint: each rank writes its own
shards, and reads what it needs of anybody's.

    step-00000200/model/shard-00001-model-00001-of-00001.safetensors       the shards of the first rank
                  model/shard-00002-…                                      … of the second
                  optimizer/shard-…                                        and so for the optimizer's state
                  state.json  manifest.json                                as in `checkpoint`

The files are torch's HuggingFaceStorageWriter's: safetensors whose headers say which shard of which tensor they hold,
so that any number of ranks, and `dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(folder / "model"))`, can
read them. Tensors that all ranks hold alike are written once, tied ones under the first of their names. Nobody needs
memory for the whole model.

The ranks must see one folder. torch's own messages on the way (which rank writes what) are small and not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.shards import ShardSpec
from lowrank.infra import checkpoint
from lowrank.infra.checkpoint import Attach, Checkpoint, CheckpointError, Kind
from lowrank.infra.checkpoint_files import measure, shard_reader, stored_tensors, write_manifest
from lowrank.infra.checkpoint_tensors import flatten, unpack
from lowrank.infra.files import sync, user_mode_

T = TypeVar("T")
Failed: TypeAlias = Callable[[Exception], CheckpointError]
KINDS: tuple[Kind, ...] = ("model", "optimizer")


# --- writing ---------------------------------------------------------------------------------------------------------


def save_sharded(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    ranks: ProcessGroup,
    writer: bool,
    keep: int = 2,
    best: bool = False,
    attach: Attach | None = None,
) -> None:
    """Write one checkpoint together, as `checkpoint.save` does alone; all ``ranks`` must call it and see ``root``.

    Args:
        tensors, optimizer, meta, attach: as for `checkpoint.save`, the same names on all ranks. A DTensor is what this
            rank has a shard of; a tensor on the device "meta" is one that another rank gives.
        ranks: who hold the model together.
        writer: on one of them, who also writes what is not sharded.

    Raises:
        CheckpointError: on every rank, if one of them could not write; the earlier checkpoints are untouched.
        ValueError: ``keep`` below 1.
    """
    checkpoint.check_keep(keep)
    tree, leaves = flatten({"optimizer": optimizer, "meta": meta})
    model, aliases = _once(tensors)
    temporary = checkpoint.writing(root, step)

    def failed(error: Exception) -> CheckpointError:
        return checkpoint.not_saved(root, step, error)

    def begin() -> None:
        if writer:
            checkpoint.begin_(root, step)

    def finish(files: Mapping[str, Mapping[str, int]]) -> None:
        checkpoint.write_state(temporary, step, {"aliases": aliases, "orders": {}}, {"aliases": {}, "orders": {}}, tree)
        if attach is not None:
            attach(temporary)
        user_mode_(temporary)
        inside = [path for path in temporary.rglob("*") if path.is_file()]
        names = {path.relative_to(temporary).as_posix(): path for path in inside}
        beside = {name: path for name, path in names.items() if name not in files}
        for path in (*(temporary / kind for kind in KINDS), *beside.values()):
            sync(path)
        write_manifest(temporary, {**files, **{name: measure(path) for name, path in beside.items()}}, best=best)
        checkpoint.publish_(temporary, root, step, keep=keep, best=best)

    _all_or_none(begin, ranks, failed)
    for kind, own in zip(KINDS, (model, leaves), strict=True):
        _write(temporary / kind, own, ranks, failed)
    measured = _all_or_none(lambda: _measured(temporary, ranks.rank), ranks, failed)
    files = {name: size for theirs in measured for name, size in theirs.items()}
    _all_or_none(lambda: finish(files) if writer else None, ranks, failed)


def _all_or_none(function: Callable[[], T], ranks: ProcessGroup, failed: Failed) -> list[T]:
    """What each rank has found; what fails on one fails on all."""
    found, error = None, None
    try:
        found = function()
    except (OSError, SafetensorError) as raised:
        error = raised
    fault = None if error is None else (getattr(error, "errno", None), str(error))
    gathered = ranks.gather_objects((found, fault))
    if faults := [each for _, each in gathered if each is not None]:
        raise failed(_as_error(*faults[0])) from error
    return [theirs for theirs, _ in gathered]  # type: ignore[misc]


def _as_error(number: int | None, text: str) -> OSError:
    error = OSError(text)
    error.errno = number
    return error


def _measured(folder: Path, rank: int) -> dict[str, dict[str, int]]:
    """Size and checksum of the files that a rank has written, by their names in the folder."""
    files = [path for kind in KINDS for path in (folder / kind).glob(f"shard-{rank + 1:05d}-*")]
    return {str(path.relative_to(folder)): measure(path) for path in files}


def _once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(each tensor under its first name, the other names of it)."""
    first: dict[int, str] = {}
    aliases = {name: first[id(t)] for name, t in tensors.items() if first.setdefault(id(t), name) != name}
    return {name: t for name, t in tensors.items() if name not in aliases}, aliases


def _write(folder: Path, tensors: Mapping[str, Tensor], ranks: ProcessGroup, failed: Failed) -> None:
    import torch.distributed.checkpoint as dcp

    own = {name: t.detach().contiguous() for name, t in tensors.items() if t.device.type != "meta"}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    _together(lambda: dcp.save(own, storage_writer=writer, process_group=ranks.process_group), ranks, failed)


def _together(function: Callable[[], object], ranks: ProcessGroup, failed: Failed) -> None:
    """Run a function of torch.distributed.checkpoint; its exception is no ``Exception``."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        ranks.collective("a checkpoint", function, 0)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values() if isinstance(cause, Exception)]
        first = next((cause for cause in causes if isinstance(cause, OSError)), causes[0] if causes else None)
        raise failed(first or RuntimeError(str(error))) from error


# --- reading ---------------------------------------------------------------------------------------------------------


def read_sharded(
    saved: Checkpoint, kind: Kind, names: Sequence[str], specs: Mapping[str, ShardSpec], ranks: ProcessGroup
) -> dict[str, Tensor]:
    """Tensors of a checkpoint, sharded or not: of those in ``specs`` this rank's shards, the others in full. All
    ``ranks`` must call it with the same names.

    Raises:
        ValueError: a tensor that is to be sharded has another shape in the checkpoint; the message names it.
        CheckpointError: it cannot be read.
    """
    import torch.distributed.checkpoint as dcp

    inside = saved.folder / kind
    reader = shard_reader(inside if inside.is_dir() else saved.folder)
    notes, stored = saved.notes(kind), stored_tensors(reader)
    first = {name: notes["aliases"].get(name, name) for name in names}  # under which it is stored
    spec_of = {first[name]: spec for name, spec in specs.items()}
    targets: dict[str, Any] = {}
    shards: dict[str, Tensor] = {}
    for name in dict.fromkeys(first.values()):
        size, dtype, spec = stored[name].size, stored[name].properties.dtype, spec_of.get(name)
        if spec is None or name in notes["orders"]:  # stored with its dimensions in another order
            targets[name] = torch.empty(size, dtype=dtype)
            continue
        if tuple(size) != spec.shape:
            raise ValueError(f"{name} is {tuple(size)} in the checkpoint, {spec.shape} in the model")
        shards[name] = torch.empty(spec.local_shape, dtype=dtype, device=ranks.device)
        targets[name] = spec.as_dtensor(shards[name])
    _together(
        lambda: dcp.load(targets, storage_reader=reader, process_group=ranks.process_group),
        ranks,
        lambda error: CheckpointError(f"checkpoint {saved.folder} cannot be read: {error}"),
    )
    found = unpack({name: t for name, t in targets.items() if name not in shards}, notes)
    for name in spec_of.keys() - shards:
        spec = spec_of[name]
        shards[name] = spec.shard.narrow(found[name], spec.dim)
    return {name: shards[first[name]] if first[name] in shards else found[first[name]] for name in names}
