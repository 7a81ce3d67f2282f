"""The doctor for a script: it runs in a child process, as it is, until its first step is over, and is then stopped.

In the child (``python -m lowrank.doctor.script``) the watch is on from the start. What torch has no hook for (clipping,
GradScaler, the making of optimizers and of DistributedDataParallel) is wrapped there, and only there. The step is over
when the model is called for the next one, when an optimizer steps again, or when the script ends.
"""

from __future__ import annotations

import atexit
import functools
import json
import linecache
import numbers
import os
import re
import runpy
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from lowrank.doctor.faults import Fault, examine
from lowrank.doctor.watch import Clip, Watch
from lowrank.infra.files import write_text_atomically
from lowrank.infra.text import printable

_OURS = tuple({str(Path(lowrank.__file__).parent), *(sysconfig.get_paths()[p] for p in ("stdlib", "purelib"))})


@dataclass(frozen=True)
class Examination:
    """``faults`` of a script, notes included; or ``why`` its first step was not reached, and the end of what it
    printed."""

    faults: list[Fault]
    why: str | None = None
    output: str = ""


def examine_script(script: Path, arguments: Sequence[str] = (), *, seconds: float = 60.0) -> Examination:
    """Run a training script until its first step is over, at most ``seconds``, and say what is silently wrong.

    It runs in a child process, in the present directory, with these arguments, and does whatever it does until then:
    files that it writes before its first step are written.

    Raises:
        ValueError: no such file, or no time.
    """
    if not script.is_file():
        raise ValueError(f"{script} is not a file: give a Python script that trains")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds {seconds:g} must be above 0")
    with tempfile.TemporaryDirectory() as folder:
        found, printed = Path(folder) / "found.json", Path(folder) / "printed.txt"
        command = [sys.executable, "-m", "lowrank.doctor.script", str(found), str(script), *arguments]
        paths = [str(Path(lowrank.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        why = "it ended before the first step of an optimizer of torch's kind after a backward pass"
        with printed.open("wb") as output:
            try:
                ended = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                    timeout=seconds, check=False,
                )  # fmt: skip
                if ended.returncode == -signal.SIGKILL:
                    why = (
                        "it was killed from outside, by the system if memory ran out: give it a smaller model or batch"
                    )
            except subprocess.TimeoutExpired:
                why = f"its first step was not over after {seconds:g} seconds: give it more (--seconds), or less to do"
        said = printable(printed.read_text(encoding="utf-8", errors="replace").strip())[-2000:]
        if found.is_file():
            return Examination([Fault(**each) for each in json.loads(found.read_text(encoding="utf-8"))])
    return Examination([], why, said)


def _main(found: Path, script: str, arguments: list[str]) -> None:
    """In the child: run the script as ``python script arguments`` would, watched."""
    with Watch() as watch:
        session = _Session(watch, found, script)
        watch.before_forward = session.after_step
        watch.before_step = session.before_step
        _wrap(session)
        atexit.register(session.end)  # a script that takes one step and ends
        sys.argv = [script, *arguments]
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")


@dataclass
class _Session:
    """Knows when the step is over, and which line of the script is running."""

    watch: Watch
    found: Path
    script: str

    def after_step(self) -> None:
        self.here("forward")
        if self.watch.stepped:
            self.end()

    def before_step(self) -> None:
        if self.here("step") and not self.watch.settings:
            self.watch.settings = dict(_settings(sys._getframe()))
        inside = torch._C._current_graph_task_id() != -1
        if not inside and self.watch.optimizers and id(self.watch.optimizers[-1]) in self.watch.stepped:
            self.end()

    def here(self, event: str) -> str | None:
        """Note the line of the script that is running under ``event``."""
        if (frame := next(_frames(sys._getframe()), None)) is None:
            return None
        self.watch.lines[event] = _line(frame.f_code.co_filename, frame.f_lineno)
        return self.watch.lines[event]

    def end(self) -> None:
        """Write what was found, and stop: nothing of the script runs any further."""
        if self.watch.stepped and self.watch.parameters:
            self.watch.settle()
            self._find_lines()
            write_text_atomically(self.found, json.dumps([asdict(fault) for fault in examine(self.watch)]))
            sys.stdout.flush()
            os._exit(0)

    def _find_lines(self) -> None:
        """Lines that no call leads to: where scales are set, and where parameters are frozen."""
        for module in {type(m): m for _, m in self.watch.modules()}.values():
            home = type(module).__module__
            file = self.script if home == "__main__" else getattr(sys.modules.get(home), "__file__", None) or ""
            if line := _matching(file, r"scal\w*\s*=|scal\w*\[.*\]\s*="):
                self.watch.lines[f"scale of {type(module).__name__}"] = line
        if line := _matching(self.script, r"requires_grad(_\(\s*|\s*=\s*)False"):
            self.watch.lines["freezing"] = line


def _wrap(session: _Session) -> None:
    """Have what torch gives no hook for tell the session; in this process alone."""
    watch, scaled = session.watch, set[int]()

    def telling(holder: Any, name: str, tell: Callable[[Any], object], once: bool = False) -> None:
        """Have ``holder.name`` call ``tell`` with its first argument (an iterator as a list, where ``once``)."""
        original = getattr(holder, name, None)
        if original is None:
            return  # a version of torch without it

        @functools.wraps(original)
        def wrapped(first: Any, *args: Any, **kwargs: Any) -> Any:
            first = list(first) if once and not isinstance(first, Tensor) else first
            tell(first)
            return original(first, *args, **kwargs)

        setattr(holder, name, wrapped)

    def clips(given: Any) -> None:
        having = [t for t in ([given] if isinstance(given, Tensor) else given) if t.grad is not None]
        watch.clips.append(Clip(len(having), bool(scaled), session.here("clip")))

    for module in (nn.utils, nn.utils.clip_grad):
        for name in ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_"):
            telling(module, name, clips, once=True)
    telling(torch.optim.Optimizer, "__init__", lambda optimizer: session.here("optimizer"))
    telling(nn.parallel.DistributedDataParallel, "__init__", lambda ddp: session.here("ddp"))
    telling(torch.autograd, "backward", lambda tensors: session.here("backward"))
    telling(torch.amp.GradScaler, "scale", lambda s: scaled.add(id(s)) if s.is_enabled() else None)
    telling(torch.amp.GradScaler, "unscale_", lambda s: scaled.discard(id(s)))


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of somebody's script, not of Python, a library, or this package; the innermost first."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(("<", *_OURS)) and "site-packages" not in name:
            yield frame
        frame = frame.f_back


def _line(file: str, number: int) -> str:
    name = os.path.relpath(file) if not os.path.relpath(file).startswith("..") else file
    return f"{name}:{number}: {linecache.getline(file, number).strip()}"


def _matching(file: str, pattern: str) -> str | None:
    """The first line of a script that matches; None for a library's."""
    if not file or "site-packages" in file or file.startswith(_OURS):
        return None
    lines = linecache.getlines(file)
    return next((_line(file, i) for i, line in enumerate(lines, 1) if re.search(pattern, line)), None)


def _settings(frame: FrameType) -> Iterator[tuple[str, float]]:
    """The numbers that the script's variables hold, those of a namespace, dataclass or dictionary included."""
    for each in _frames(frame):
        for name, value in [*each.f_globals.items(), *each.f_locals.items()]:
            if _is_number(value):
                yield name, float(value)
            elif not name.startswith("_"):
                yield from ((key, float(v)) for key, v in _fields(value).items() if _is_number(v))


def _fields(value: Any) -> Mapping[str, Any]:
    held = value if isinstance(value, dict) else vars(value) if _is_settings(value) else {}
    return {key: v for key, v in held.items() if isinstance(key, str)}


def _is_settings(value: Any) -> bool:
    kinds = ("Namespace", "SimpleNamespace")
    return (is_dataclass(value) and not isinstance(value, type)) or type(value).__name__ in kinds


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
