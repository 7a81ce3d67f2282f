"""Starting ranks on this machine, as ``torchrun`` would: ``python -m tests.ranks.start FOLDER WORLD…``.

Imports take longer than all that the ranks of a test do. So one process makes them and forks the ranks, each with the
environment that ``torchrun`` gives. For ``elastic N WORDS…`` torch's agent, whose command ``torchrun`` is, forks them.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240


def started(*words: str, **settings: str) -> str:
    """What ``python -m tests.ranks.start words`` prints, which ends well; ``settings`` go into the environment."""
    command, environment = [sys.executable, "-m", "tests.ranks.start", *words], {**os.environ, **settings}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def found(folder: Path, world: str) -> list[dict[str, Any]]:
    """What each rank of that world has saved."""
    return [torch.load(path, weights_only=False) for path in sorted(folder.glob(f"{world}-*.pt"))]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def forked(count: int, what: Callable[[], None], **settings: str) -> list[int | None]:
    """The exit statuses of so many ranks that each do this."""
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **settings}

    def rank(number: int) -> None:
        os.environ.update(group, RANK=str(number), LOCAL_RANK=str(number))
        what()

    ranks = [multiprocessing.get_context("fork").Process(target=rank, args=(number,)) for number in range(count)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(SECONDS)
        each.kill()
    return [each.exitcode for each in ranks]


def act(folder: Path, world: str) -> None:
    """In a rank: join the others, do what the table has for this world, and save what was found.

    What an act asserts by itself is told by the test of its name, with the variables at that place.
    """
    from tests.ranks.table import TABLE

    from lowrank.distributed.process_group import joined

    with joined(torch.device("cpu")) as ranks:
        assert ranks is not None
        results: dict[str, Any] = {}
        for row in TABLE:
            if world in row.worlds:
                try:
                    results[row.name] = row.run(ranks, world, folder)
                except (AssertionError, pytest.fail.Exception) as error:
                    told = traceback.TracebackException.from_exception(error, capture_locals=True)
                    results[row.name] = {"failed": "".join(told.format())}
        torch.save(results, folder / f"{world}-{ranks.rank}.pt")


def elastic(ranks: int, words: list[str]) -> None:
    """``lowrank words`` as ``torchrun --nproc-per-node=ranks --max-restarts=3`` runs it, killed as told on the way."""
    from tests.ranks import killed
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    where = {"rdzv_backend": "static", "rdzv_endpoint": f"127.0.0.1:{free_port()}", "rdzv_configs": {"rank": 0}}
    how: dict[str, Any] = {"max_restarts": 3, "monitor_interval": 0.1, "start_method": "fork", "run_id": "run"}
    elastic_launch(LaunchConfig(1, 1, ranks, **how, **where), killed.life)(*words)


def main(place: str, *worlds: str) -> None:
    # what ranks use, before they are forked
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401
    from tests.ranks.table import RANKS

    import lowrank.train.loop  # noqa: F401

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if place == "elastic":
        return elastic(int(worlds[0]), list(worlds[1:]))
    os.environ["LOWRANK_CACHE"] = str(Path(place) / "cache")
    for world in worlds:
        count, expected, settings = RANKS[world]
        exits = forked(count, partial(act, Path(place), world), **settings)
        assert exits == expected, f"the ranks of {world} ended with {exits}"


if __name__ == "__main__":
    main(*sys.argv[1:])
