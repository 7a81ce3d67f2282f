"""What a run costs: seconds a step, and peak memory (the allocator's on a GPU, the process's resident set on a CPU)."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class StepClock:
    """Mean seconds a step, and of waiting for data, since the last reading; what happens in ``paused()`` is left out.

    A GPU works behind the process's back: read only after waiting for it, and every step's work is in the mean.
    """

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._began, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def tick(self, waited: float) -> None:
        """A step is done, of which ``waited`` seconds went by until its data were there."""
        self._waited, self._steps = self._waited + waited, self._steps + 1

    def read(self) -> tuple[float, float]:
        """(seconds, seconds of waiting) a step, and start anew."""
        found = (time.perf_counter() - self._began) / self._steps, self._waited / self._steps
        self._restart()
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time is not counted."""
        stopped = time.perf_counter()
        yield
        self._began += time.perf_counter() - stopped


def reset_peak(device: torch.device) -> None:
    """Start a new peak. On a CPU this needs Linux; elsewhere the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        with suppress(OSError):  # not permitted everywhere: then the peak of the process is what can be had
            _CLEAR.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The highest use since ``reset_peak``, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def seconds_of(records: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of training, evaluations and checkpoints apart: each record holds the mean of the steps before it."""
    steps = [0, *(record["step"] for record in records)]
    return sum(r["step_seconds"] * (r["step"] - before) for before, r in zip(steps, records, strict=False))
