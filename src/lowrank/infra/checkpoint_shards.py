"""Folders that torch.distributed.checkpoint has written in shards, read by one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.infra.checkpoint_files import CheckpointError


def read_whole(folder: Path, device: torch.device | str = "cpu", prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a folder of parts whose names begin so, put together in this process alone."""
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
            f"{folder} is written in parts, which torch {torch.__version__} cannot read: use 2.9 or newer"
        )
    return dcp.HuggingFaceStorageReader(str(folder))


def stored_tensors(reader: Any) -> dict[str, Any]:
    """Sizes and dtypes of what a reader finds, by name."""
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    return stored
