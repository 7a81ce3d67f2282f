"""The live progress line on stderr, by tqdm: step, loss, tokens/s, peak memory, time left.

    step 120/400 ━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌  loss 2.513  18.4k tokens/s  peak 612 MB  01:32 left

On a terminal the line is rewritten in place. Elsewhere (a file, a notebook, continuous integration) plain lines appear
now and then: the first step, every tenth of the run or half a minute, and the last.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from lowrank.infra.extras import import_extra

_LINE_SECONDS = 30.0
_TEXT = "{desc}  {remaining} left"


class Progress:
    """Shows how far a run has come.

    Args:
        total: the step at which the run ends.
        start: the step from which it starts (0, or the step it was resumed from).
        quiet: show nothing at all.
        unit: what `rate` counts, such as "tokens" or "images".
        stream, clock: where to write and, for plain lines, what time it is.
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
        self._stream = sys.stderr if stream is None else stream
        self._began, self._shown_step = clock(), start
        self._shown_at: float | None = None
        self._tqdm = None if quiet else import_extra("tqdm", "text").tqdm
        count = f"step {{n:>{len(str(total))}}}/{{total}} "
        self._line, self._bar = f"{count} {_TEXT}", None
        if self._tqdm is not None and self._stream.isatty():
            look: dict[str, Any] = {"bar_format": f"{count}{{bar:25}}  {_TEXT}", "ascii": "╌━", "smoothing": 0}
            self._bar = self._tqdm(total=total, initial=start, file=self._stream, dynamic_ncols=True, **look)

    def update(
        self, step: int, *, loss: float, rate: float | None = None, peak_bytes: int | None = None, extra: str = ""
    ) -> None:
        """Show `step` completed steps, the latest loss, `rate` units a second, and `extra`, the last evaluation say."""
        parts = [f"loss {loss:.4g}"]
        if rate is not None:
            parts.append(f"{short_count(rate)} {self._unit}/s")
        if peak_bytes is not None:
            parts.append(f"peak {short_bytes(peak_bytes)}")
        text = "  ".join([*parts, extra] if extra else parts)
        if self._bar is not None:
            try:
                self._bar.set_description_str(text, refresh=False)
                self._bar.update(step - self._bar.n)
            except OSError:
                self._bar = self._tqdm = None
        elif self._tqdm is not None and self._due(step):
            self._shown_at, self._shown_step = self._clock(), step
            look = {"initial": self._start, "prefix": text, "bar_format": self._line}
            self.note(self._tqdm.format_meter(step, self._total, self._shown_at - self._began, **look))

    def note(self, text: str) -> None:
        """Write a line that stays, above the live one."""
        try:
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            elif self._tqdm is not None:
                print(text, file=self._stream, flush=True)
        except OSError:  # whoever read it has left, or its disk is full: no reason to stop training
            self._bar = self._tqdm = None

    def close(self) -> None:
        """Leave the live line as it is and go to the next."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()

    def _due(self, step: int) -> bool:
        """Whether it is time for another plain line."""
        if self._shown_at is None or step >= self._total:
            return True
        return self._clock() - self._shown_at >= _LINE_SECONDS or step - self._shown_step >= max(1, self._total // 10)


def bar_on_terminal(unit: str = "B", delay: float = 0.5) -> Callable[[int, int | None], None]:
    """For work before the run: a function of (done, total), which shows them on a line of standard error that renews
    itself, if that is a terminal; otherwise silence."""
    if not sys.stderr.isatty():
        return lambda done, total: None
    bar = import_extra("tqdm", "text").tqdm(desc="tokenising", unit=unit, unit_scale=True, delay=delay)

    def show(done: int, total: int | None) -> None:
        bar.total = None if total is None else max(done, total)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def short_count(number: float) -> str:
    """Three digits and a decimal prefix.

    >>> short_count(950), short_count(18_432), short_count(124_083_456), short_count(4.2e15)
    ('950', '18.4k', '124M', '4.2P')
    """
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
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
