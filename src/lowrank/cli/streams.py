"""The streams of a command: closed ones swallow what is written, characters that a terminal does not have are written
out, and a reader that leaves (``2>&1 | head``) does not end a training run.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Outliving:
    """A stream whose reader may leave: what is written afterwards goes nowhere."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def ready_streams(*, trains: bool) -> Iterator[None]:
    """Standard output and error, fit for a command; ``trains``: it goes on although nobody reads its output, either."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in before.items():
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if trains or name == "stderr":
                setattr(sys, name, Outliving(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            if stream is not None:
                setattr(sys, name, stream)
