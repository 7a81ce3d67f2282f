"""``python -m tests.ranks.killed WORDS…``: the command line in a process that dies by kill -9, of a group that torchrun
starts again.

    LOWRANK_KILLED    what happens in each life, by commas: ``step`` kills rank 1 in a backward pass, ``merge`` rank 1
                      before its factors are sent, ``save`` rank 0 when half of a checkpoint is on its disk, ``damage``
                      spoils the newest checkpoint and kills rank 1, ``wait`` lets it be slow; each at the step after it
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
from lowrank.distributed import sharded_checkpoint as checkpoint_parts
from lowrank.infra import checkpoint
from lowrank.plan import synchronisation
from lowrank.train.loop import _Loop

RANK, LIFE = int(os.environ.get("RANK", "0")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, what: Callable[..., None]) -> None:
    """Have ``what`` called, with the same arguments, before the function of that name."""
    function = getattr(owner, name)

    def both(*args: Any, **options: Any) -> Any:
        what(*args, **options)
        return function(*args, **options)

    setattr(owner, name, both)


def at(step: int, what: Callable[..., None], rank: int = 1) -> None:
    """On one rank, do something in that step, between the forward and the backward pass."""

    def act(loop: _Loop, *_: Any) -> None:
        if loop.step == step and rank == RANK:
            before(torch.Tensor, "backward", what)

    before(_Loop, "_backward", act)


def spoil(*_: Any) -> None:
    newest = checkpoint.latest(Path(sys.argv[sys.argv.index("--out") + 1]) / "checkpoints") / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    die()


def main() -> int:
    kind, _, step = (*os.environ.get("LOWRANK_KILLED", "").split(","), *[""] * 9)[LIFE].partition("@")
    if kind == "step":
        at(int(step), die)
    elif kind == "merge":
        at(int(step), lambda *_: before(synchronisation, "merge_across_workers_", die))
    elif kind == "save":
        at(int(step), lambda *_: before(checkpoint, "measure", die), rank=0)
    elif kind == "part":
        at(int(step), lambda *_: before(checkpoint_parts, "measure", die))
    elif kind == "damage":
        at(int(step), spoil)
    elif kind == "wait":
        before(_Loop, "_one_step", lambda *_: time.sleep(float(step)))
    if born := os.environ.get("LOWRANK_BORN"):
        with Path(born).open("a") as file:
            file.write(f"{LIFE} {RANK} {os.environ.get('WORLD_SIZE', '1')} {os.getpid()}\n")
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
