"""Kill points: a run dies before each operation on a file that it makes, and is taken up again.

    python -m tests.hostile.torture [METHOD …]      all methods where none is named (`make torture`)

One recorder stands before every operation that changes what a disk holds: opening for writing, renaming, replacing,
removing, flushing, making folders. It counts them in an undisturbed run, and then, run by run, dies before the first,
the second, and so on, or has the disk full there. What is taken up afterwards must end with the same weights, the same
optimizer state, the same log and the same best checkpoint, bit by bit.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from tests.runs.tiny import SMALL, tiny

from lowrank.infra import checkpoint, checkpoint_files
from lowrank.infra.files import LOCK
from lowrank.infra.log import read_log
from lowrank.methods import METHODS
from lowrank.report.variants import execute, parse_variant, planned
from lowrank.train.loop import train

_TIMED = {"seconds", "step_seconds", "wait_seconds", "tokens_per_second", "peak_bytes"}  # differ from run to run


class Recorder:
    """Counts operations on files below a folder; before one of them the process ends at once, or the disk is full."""

    def __init__(self, root: Path, fatal: int | None = None, full: bool = False):
        self.root, self.fatal, self.full = str(root), fatal, full
        self.made: list[str] = []

    def before(self, name: str, path: Any) -> None:
        if not self._ours(path):
            return
        self.made.append(f"{name} {path}")
        if len(self.made) - 1 != self.fatal:
            return
        if not self.full:
            os._exit(9)  # nothing is cleaned up, no buffer is written: as by kill -9
        if name in ("open", "fsync", "mkdir", "tensors"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def _ours(self, path: Any) -> bool:
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return False
        return str(os.fspath(path)).startswith(self.root)

    @contextmanager
    def installed(self) -> Iterator[Recorder]:
        """Stand before every operation meanwhile."""
        kept: list[tuple[Any, str, Any]] = []

        def stand_before(owner: Any, name: str, known_as: str, applies: Callable[..., bool]) -> None:
            original = getattr(owner, name)

            def recorded(path: Any, *more: Any, **options: Any) -> Any:
                if applies(*more, **options):
                    self.before(known_as, path)
                return original(path, *more, **options)

            kept.append((owner, name, original))
            setattr(owner, name, recorded)

        def writes(mode: Any = "r", *more: Any, **options: Any) -> bool:
            return isinstance(mode, str) and bool(set(mode) & set("wax+"))

        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync", "truncate", "ftruncate"):
            stand_before(os, name, name, lambda *more, **options: True)
        for owner in (builtins, io):
            stand_before(owner, "open", "open", writes)
        stand_before(os, "open", "open", lambda flags=0, *more, **options: bool(flags & (os.O_WRONLY | os.O_RDWR)))
        save = safetensors.torch.save_file

        def save_file(tensors: Any, path: Any, *more: Any, **options: Any) -> None:
            self.before("tensors", path)
            save(tensors, path, *more, **options)

        for module in (checkpoint, safetensors.torch):
            kept.append((module, "save_file", module.save_file))
            module.save_file = save_file  # type: ignore[attr-defined]
        try:
            yield self
        finally:
            for owner, name, original in reversed(kept):
                setattr(owner, name, original)


def outcome(out: Path) -> dict[str, Any]:
    """All that a run has come to, but what clocks say."""
    root = out / "checkpoints"
    saved = checkpoint.load(checkpoint.latest(root))
    state = {f"model.{name}": t for name, t in saved.tensors.items()}
    found = {name: t.view(torch.uint8).numpy().tobytes() if t.numel() else b"" for name, t in _flat(state).items()}
    optimizer, meta = repr(saved.optimizer), {n: repr(v) for n, v in saved.meta.items() if n != "learnt"}
    records = [{n: v for n, v in r.items() if n not in _TIMED} for r in read_log(out / "log.jsonl")]
    summary = json.loads((out / "summary.json").read_text())
    best = checkpoint.best(root)
    return {
        "model": found,
        "optimizer": optimizer,
        "meta": meta,
        "log": records,
        "summary": {name: value for name, value in summary.items() if name not in _TIMED},
        "best": best and checkpoint_files.measure(best / "model.safetensors"),
        "kept": [path.name for path in checkpoint.saved(root)],
        "left over": sorted(path.name for path in out.rglob(".*") if path.name != LOCK),  # a dead owner's does no harm
    }


def _flat(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().contiguous().reshape(-1) for name, t in state.items()}


def settings(method: str, **changes: object) -> Any:
    """Four steps with an evaluation and a checkpoint every second, of which one is kept beside the best."""
    every = {f"method__{name.partition('.')[2]}": 2 for name in SMALL.get(method, {}) if name.endswith("_every")}
    return tiny(method, steps=4, eval_every=2, checkpoint_every=2, keep=1, eval_batches=1, **every, **changes)


def take_up(run: Any, folder: Path) -> Path:
    """What a person does: the same comparison again; returns the folder of the finished run."""
    random.seed(0)  # generators that a run does not seed itself, and checkpoints keep
    np.random.seed(0)
    (each,) = planned(run, [parse_variant(run.method.name)])
    (done,) = execute(
        [each], folder, lambda run, out, resume: train(run, out, resume=resume, quiet=True), say=lambda text: None
    )
    if done.error is not None:
        raise RuntimeError(done.error)
    return done.folder


def apart(what: Callable[[], Any]) -> int:
    """Do something in a process of its own; returns how that ended: 0, 1 (an error) or 9 (killed)."""
    child = os.fork()
    if not child:
        try:
            what()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def struck(run: Any, root: Path, number: int, *, full: bool) -> None:
    with Recorder(root, fatal=number, full=full).installed():
        take_up(run, root)


def tortured(method: str, folder: Path, *, full: bool = False, stride: int = 1) -> tuple[int, list[str]]:
    """How often a run of a method died (or met a full disk), and what then was not as in an undisturbed one."""
    run = settings(method)
    with quiet(), Recorder(folder / "whole").installed() as recorder:
        whole = outcome(take_up(run, folder / "whole"))
    faults, points = [], range(0, len(recorder.made), stride)
    for number in points:
        root = folder / str(number)
        with quiet():
            ended = apart(partial(struck, run, root, number, full=full))
            try:
                found = outcome(take_up(run, root))
                differs = [name for name in whole if found[name] != whole[name]]
                if not full and ended != 9:
                    differs.append(f"it was not killed, but ended with {ended}")
            except Exception as error:
                differs = [f"{type(error).__name__}: {error}"]
        if differs:
            before = recorder.made[number].replace(str(folder / "whole"), "")
            faults.append(f"{method}: before operation {number} ({before}): {'; '.join(differs)}")
        shutil.rmtree(root, ignore_errors=True)
    return len(points), faults


@contextmanager
def quiet() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def tell(methods: list[str]) -> int:
    """Every method, killed and with a full disk, and what came of it."""
    torch.set_num_threads(1)
    wrong = 0
    for method in methods or METHODS:
        for full in (False, True):
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                tried, faults = tortured(method, Path(folder), full=full)
            how = "full disks" if full else "deaths"
            print(f"{method}: {tried} {how}, {len(faults)} faults, {time.monotonic() - began:.0f} s", flush=True)
            for fault in faults:
                print(f"  {fault}", flush=True)
            wrong += len(faults)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(tell(sys.argv[1:]))
