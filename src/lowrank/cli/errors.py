"""What is said of an error: how one that the user can mend looks, and one that should not have been."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence

from lowrank import __version__


def short(text: str, most: int = 4000) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def mendable(error: Exception) -> str | None:
    """What to say of an error whose cause is input, the machine or a package that is missing; None of any other."""
    import csv
    import zipfile
    import zlib

    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in text:
        return (
            f"out of memory ({text.splitlines()[0]}): use a smaller --batch-size with a larger --grad-accum, a shorter "
            "context, --precision bf16 or --per-layer; what was saved is whole, --resume goes on from there"
        )
    if "mixed torch.Tensor and DTensor" in text:
        return (
            "the model reads a weight past its layer, which is in shards there: call the layer, or take --engine ddp "
            f"({text.splitlines()[0]})"
        )
    if type(error) is RuntimeError and _is_ours(error):
        return text
    if isinstance(error, OSError):
        return _of_the_system(error) or text
    if isinstance(error, (ValueError, ImportError, ArithmeticError)):
        return text
    damaged = (EOFError, re.error, csv.Error, zipfile.BadZipFile, zlib.error)
    if isinstance(error, damaged) or type(error).__name__ == "SafetensorError":
        return f"a file or pattern cannot be read ({type(error).__name__}: {text})"
    from lowrank.infra.checkpoint import CheckpointError  # and torch with it

    return text if isinstance(error, CheckpointError) else None


def _is_ours(error: Exception) -> bool:
    """Whether our own code raised it, which then has words for what a model does."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lowrank.")


def _of_the_system(error: OSError) -> str | None:
    """An error of the operating system, which has no words but its own, with the file and what helps."""
    if type(error).__module__ != "builtins" or error.filename is None or str(error)[:7] != "[Errno ":
        return None
    name = os.fsdecode(error.filename)
    remedies = {
        errno.ENOSPC: "make room, or choose another disk",
        errno.EDQUOT: "make room, or choose another disk",
        errno.EACCES: "give yourself the right to it, or choose another",
        errno.EROFS: "choose another place",
        errno.ENOENT: "make the folder first, or look at the name",
        errno.EEXIST: "choose another name",
        errno.ENOTDIR: "a folder is wanted where a file is: choose another name",
        errno.EISDIR: "a file is wanted, and this is a folder: choose another name",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
    }
    remedy = remedies.get(error.errno or 0)
    return f"{name if len(name) < 200 else name[:60] + '…'}: {error.strerror}" + (f"; {remedy}" if remedy else "")


def reported(words: Sequence[str], error: Exception) -> str:
    """Words for an error that should not have been; all about it is in a file."""
    import platform
    import shlex
    import tempfile
    import traceback

    versions = f"lowrank {__version__}, Python {platform.python_version()}, {platform.platform()}"
    trace = "".join(traceback.format_exception(error))
    short = f"this should not have happened: {type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="lowrank-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"{versions}\nlowrank {shlex.join(words)}\n\n{trace}")
    except OSError:
        return f"{short}\n{trace}"
    return f"{short}\nWhat is known about it is in {file.name}: please report it with that file"
