"""What a section is given: a device, a deadline, and a way to report each thing that it has measured as soon as it has.

An item is one measurement. It may fail, run out of memory or out of time by itself: that is recorded in its place, what
it held is freed, and the next goes on. On a GPU times are those of CUDA events around work that is queued on an idle
device, so that a step whose host is slower than its kernels shows the host's time; the host's own is beside it.
"""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class OutOfTime(Exception):
    """A measurement was interrupted."""


class Poisoned(RuntimeError):
    """The CUDA context is lost: nothing more can run in this process."""


class Bench:
    """A section's view of the run. ``known`` holds the items of the sections before it, by section and name."""

    def __init__(
        self,
        device: torch.device,
        seconds: float,
        send: Callable[[str, Any], None],
        *,
        tiny: bool = False,
        text: Path | None = None,
        known: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.device, self.tiny, self.text, self.known = device, tiny, text, known or {}
        self._send, self._end = send, time.monotonic() + seconds

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds until this section should be done."""
        return self._end - time.monotonic()

    def item(self, name: str, measure: Callable[[], Any], *, needs: float = 0.0, limit: float | None = None) -> Any:
        """Measure and report; what came of it, or None where it failed or there was no time.

        Args:
            needs: seconds that must be left, or it is not begun.
            limit: seconds after which it is interrupted (as soon as Python runs again); default: what is left.
        """
        if self.left < max(needs, 0.1):
            self._send(name, {"skipped": f"needs about {needs:.0f} s, and {max(self.left, 0):.0f} s were left"})
            return None
        result: Any = None
        try:
            with time_limit(self.left if limit is None else min(limit, self.left)):
                result = measure()
        except OutOfTime as over:
            self._send(name, {"skipped": str(over)})
        except Exception as error:
            self._send(name, {"failed": message_of(error)})
        else:
            self._send(name, result)
        self.free()
        return result

    def free(self) -> None:
        """Give back what the last measurement held, and begin to count memory anew."""
        gc.collect()
        if self.cuda:
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise Poisoned(f"the device no longer answers: {message_of(error)}") from None
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    # --- memory --------------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Bytes that could be allocated now; on a CPU, plenty."""
        return torch.cuda.mem_get_info()[0] if self.cuda else 1 << 40

    def held_bytes(self) -> int | None:
        return torch.cuda.memory_allocated() if self.cuda else None

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.cuda else None

    def begin_peak(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    # --- time ----------------------------------------------------------------------------------------------------

    def synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def once(self, run: Callable[[], object]) -> tuple[float, float]:
        """(seconds until the device is done, seconds until the call returns) of one run on an idle device."""
        self.synchronise()
        if not self.cuda:
            began = time.perf_counter()
            run()
            return (time.perf_counter() - began,) * 2
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began = time.perf_counter()
        first.record()
        run()
        last.record()
        host = time.perf_counter() - began
        last.synchronize()
        return first.elapsed_time(last) / 1e3, host

    def in_turns(
        self, runs: Mapping[str, Callable[[], object]], *, rounds: int = 20, warmup: int = 3, seconds: float = 5.0
    ) -> dict[str, list[tuple[float, float]]]:
        """``once`` of every alternative in every round, one after the other; fewer rounds where ``seconds`` are up."""
        if self.tiny:
            rounds, warmup = 2, 1
        for _ in range(warmup):
            for run in runs.values():
                run()
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        end = time.monotonic() + min(seconds, max(self.left, 0.5))
        for done in range(rounds):
            for name, run in runs.items():
                found[name].append(self.once(run))
            if time.monotonic() > end and done >= 2:
                break
        return found

    def timed(self, run: Callable[[], object], **options: Any) -> dict[str, float]:
        """Medians of one alternative: ``seconds`` and ``host_seconds``."""
        return medians(self.in_turns({"": run}, **options)[""])


def medians(rounds: list[tuple[float, float]]) -> dict[str, float]:
    return {
        "seconds": statistics.median(device for device, _ in rounds),
        "host_seconds": statistics.median(host for _, host in rounds),
    }


def ratio(found: Mapping[str, list[tuple[float, float]]], name: str, base: str) -> float:
    """The median over the rounds of the device's time for ``name`` divided by that for ``base``."""
    return statistics.median(a / b for (a, _), (b, _) in zip(found[name], found[base], strict=True))


def message_of(error: BaseException) -> str:
    """Kind and first line of an error; where memory ran out, just that."""
    if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block after so many seconds, in the main thread, as soon as Python runs there."""

    def over(*_: object) -> None:
        raise OutOfTime(f"interrupted after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(error: float, allowed: float, **more: Any) -> dict[str, Any]:
    """The record of a comparison: ``ok`` where the relative error is allowed (and is a number)."""
    return {"relative_error": error, "allowed": allowed, "ok": bool(error <= allowed), **more}
