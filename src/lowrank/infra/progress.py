"""The live progress line on stderr: step, loss, tokens/s, time left, peak memory.

    step  120/400 ━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌  loss 2.513  18.4k tokens/s  1:32 left  peak 612 MB

On a terminal the line is rewritten in place, at most ten times a second. Elsewhere (a file, a notebook, continuous
integration) plain lines appear occasionally: the first step, every tenth of the run or half a minute, and the last.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

_WIDTH = 25
_REDRAW_SECONDS, _LINE_SECONDS = 0.1, 30.0


class Progress:
    """Shows how far a run has come.

    Args:
        total: the step at which the run ends.
        start: the step from which it starts (0, or the step it was resumed from).
        quiet: show nothing at all.
        unit: what `rate` counts, such as "tokens" or "images".
        stream, clock: where to write and what time it is; the defaults are stderr and a monotonic clock.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        quiet: bool = False,
        unit: str = "tokens",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._start, self._unit, self._clock = total, start, unit, clock
        self._quiet = quiet
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._began = clock()
        self._shown_at: float | None = None
        self._shown_step = start
        self._line = ""

    def update(
        self, step: int, *, loss: float, rate: float | None = None, peak_bytes: int | None = None, extra: str = ""
    ) -> None:
        """Show `step` completed steps.

        Args:
            step: completed steps.
            loss: the latest training loss.
            rate: units (tokens, images) per second.
            peak_bytes: the highest memory use so far.
            extra: further text, such as the latest evaluation.
        """
        if self._quiet or not self._due(step):
            return
        self._shown_at, self._shown_step = self._clock(), step
        parts = [f"loss {loss:.4g}"]
        if rate is not None:
            parts.append(f"{short_count(rate)} {self._unit}/s")
        parts.append(f"{short_time(self._seconds_left(step))} left")
        if peak_bytes is not None:
            parts.append(f"peak {short_bytes(peak_bytes)}")
        if extra:
            parts.append(extra)
        self._show(step, "  ".join(parts))

    def note(self, text: str) -> None:
        """Write a line that stays, above the live one."""
        if self._quiet:
            return
        self._stream.write(f"\r\x1b[K{text}\n{self._line}" if self._line else f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the live line as it is and go to the next."""
        if self._line:
            self._stream.write("\n")
            self._stream.flush()
            self._line = ""

    def _due(self, step: int) -> bool:
        if self._shown_at is None or step >= self._total:
            return True
        waited = self._clock() - self._shown_at
        if self._live:
            return waited >= _REDRAW_SECONDS
        return waited >= _LINE_SECONDS or step - self._shown_step >= max(1, self._total // 10)

    def _seconds_left(self, step: int) -> float:
        done = step - self._start
        return (self._clock() - self._began) / done * (self._total - step) if done > 0 else 0.0

    def _show(self, step: int, text: str) -> None:
        count = f"step {step:>{len(str(self._total))}}/{self._total}"
        if not self._live:
            self._stream.write(f"{count}  {text}\n")
            self._stream.flush()
            return
        filled = min(_WIDTH, _WIDTH * step // max(1, self._total))
        line = f"{count} {'━' * filled}{'╌' * (_WIDTH - filled)}  {text}"
        self._line = f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K"
        self._stream.write(self._line)
        self._stream.flush()


def short_time(seconds: float) -> str:
    """Minutes and seconds, with hours where needed.

    >>> short_time(92), short_time(3_725)
    ('1:32', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short_count(number: float) -> str:
    """Three digits and a decimal prefix.

    >>> short_count(950), short_count(18_432), short_count(124_083_456)
    ('950', '18.4k', '124M')
    """
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{prefix}"
    return f"{number:.3g}"


def short_bytes(number: float) -> str:
    """Decimal units of memory.

    >>> short_bytes(612_300_000), short_bytes(1_536)
    ('612 MB', '1.54 kB')
    """
    text = short_count(number)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"
