"""Starting several ranks of a module on this machine, as ``torchrun`` would, and waiting for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowrank.distributed.process_group import ProcessGroup, joined
from lowrank.infra import checkpoint
from lowrank.infra.log import read_log

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2


def launch(
    module: str, *arguments: str, ranks: int = RANKS, timeout: float = 120, **settings: str
) -> list[tuple[int, str]]:
    """(exit status, stderr) of each rank of ``python -m module arguments``; ``settings`` go into the environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank), **settings},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in started]
        return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]
    finally:
        for process in started:
            process.kill()
            process.wait()


def run_well(module: str, folder: Path, *words: str, ranks: int) -> None:
    """``python -m module folder words`` on so many ranks, all of which end well."""
    results = launch(module, str(folder), *words, ranks=ranks, LOWRANK_CACHE=str(folder / "cache"))
    assert [code for code, _ in results] == [0] * ranks, "\n".join(error for _, error in results)


def outcome(module: str, folder: Path, saved_as: str, *, ranks: int) -> list[dict[str, Any]]:
    """What each rank of the module has found, which it saves in the folder under that name."""
    run_well(module, folder, ranks=ranks)
    return [torch.load(folder / f"{saved_as}-{rank}.pt", weights_only=False) for rank in range(ranks)]


def as_rank(folder: Path, save_as: str, found: Callable[[ProcessGroup], dict[str, Any] | None]) -> None:
    """In a started process: join the others, and save what this rank has found for ``outcome``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with joined(torch.device("cpu")) as ranks:
        assert ranks is not None
        torch.save(found(ranks), folder / f"{save_as}-{ranks.rank}.pt")


def message_of(function: Callable[[], object]) -> str:
    """What it is refused with; empty where it is not."""
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def assert_same(one: Any, other: Any) -> None:
    """Two nests of tensors, bitwise and in their dtypes."""
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Of two runs the last."""
    mine, theirs = (checkpoint.load(checkpoint.latest(run / "checkpoints")) for run in (one, other))
    assert mine.step == theirs.step
    assert_same(mine.tensors, theirs.tensors)
    assert_same(mine.optimizer["state"], theirs.optimizer["state"])


def assert_close_logs(one: Path, other: Path, rel: float) -> list[list[dict[str, Any]]]:
    """The same steps, with losses and norms as near as that; returns both runs' records."""
    logs = [read_log(run / "log.jsonl") for run in (one, other)]
    for mine, theirs in zip(*logs, strict=True):
        assert theirs["step"] == mine["step"]
        for name in {"loss", "val_loss", "grad_norm"} & mine.keys():
            assert abs(theirs[name] - mine[name]) <= rel * abs(mine[name])
    return logs
