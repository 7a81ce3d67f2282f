"""``python -m tests.ranks.killed WORDS…``: the command line in a process that dies by kill -9, of a group that its
launcher starts again.

    LOWRANK_KILLED    what happens in each life, by commas, each at the step after it: ``step`` kills rank 1 in a
                      backward pass, ``merge`` before its factors are sent, ``part`` when half of its part of a save
                      is on its disk, ``save`` rank 0 when half of the whole is; ``wait`` slows all by its seconds
    LOWRANK_BORN      a file: one line per process, "life rank ranks pid"
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowrank.cli import app as cli
from lowrank.distributed import sharded_checkpoint
from lowrank.infra import checkpoint
from lowrank.plan import synchronisation
from lowrank.train.loop import _Loop


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, what: Callable[..., None]) -> None:
    """Have ``what`` called, with the same arguments, before the function of that name."""
    function = getattr(owner, name)

    def both(*args: Any, **options: Any) -> Any:
        what(*args, **options)
        return function(*args, **options)

    setattr(owner, name, both)


KILLS: dict[str, tuple[int, Any, str]] = {  # the rank that dies, before which function
    "step": (1, torch.Tensor, "backward"),
    "merge": (1, synchronisation, "merge_across_workers_"),
    "save": (0, checkpoint, "measure"),
    "part": (1, sharded_checkpoint, "measure"),
}


def life(*words: str) -> None:
    rank, number = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    kind, _, at = (*os.environ["LOWRANK_KILLED"].split(","), *[""] * 9)[number].partition("@")

    def between_passes(loop: _Loop, *_: Any) -> None:
        victim, owner, name = KILLS[kind]
        if loop.step == int(at) and rank == victim:
            before(owner, name, die)

    if kind == "wait":
        before(_Loop, "_one_step", lambda *_: time.sleep(float(at)))
    elif kind:
        before(_Loop, "_backward", between_passes)
    with Path(os.environ["LOWRANK_BORN"]).open("a") as file:
        file.write(f"{number} {rank} {os.environ['WORLD_SIZE']} {os.getpid()}\n")
    if status := cli.main([*words]):
        sys.exit(status)


if __name__ == "__main__":
    life(*sys.argv[1:])
