"""Where prepared data lives, and how a folder appears there whole or not at all.

Data is prepared once into ``$LOWRANK_CACHE`` (default ``~/.cache/lowrank``), never beside the originals. A folder is
written under a temporary name in the same place and renamed when it is complete, so a reader sees all of it or none of
it, and needs no lock: a cache of another user, or on a read-only disk, is read like one's own. A process that is
killed leaves only a temporary folder, which the next one removes. A lock file makes a second process wait for the first
instead of doing the work again; where the file system offers no locks the rename alone keeps the result correct.
"""

import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lowrank.infra.files import sync, user_mode_

try:
    import fcntl
except ImportError:  # Windows: the rename alone keeps the result correct
    fcntl = None  # type: ignore[assignment]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)


def cache_root() -> Path:
    """The folder for prepared data: ``$LOWRANK_CACHE``, or ``~/.cache/lowrank``.

    Raises:
        OSError: there is no home folder, and nothing else is told.
    """
    told = os.environ.get("LOWRANK_CACHE")
    try:
        return Path(told).expanduser() if told else Path.home() / ".cache" / "lowrank"
    except RuntimeError as error:
        raise OSError(
            f"there is no home folder to keep prepared data in ({error}): set LOWRANK_CACHE to a folder that can be "
            "written"
        ) from error


@contextmanager
def locked(final: Path) -> Iterator[bool]:
    """Hold the lock that belongs to the folder ``final`` (``.<name>.lock`` beside it), waiting for whoever holds it.

    Yields True if the lock is held and False where locks are not to be had. The lock goes with the process, however it
    ends; the empty lock file stays, because removing it would let two processes lock two different files of the same
    name.

    Raises:
        OSError: the place cannot be written, or its disk is full; says what to do.
    """
    with _explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield False
            return
        with open(final.parent / f".{final.name}.lock", "w") as file:
            yield _taken(file, final)


def _taken(file: IO[str], final: Path) -> bool:
    """Take the lock, and say so if that means to wait for longer than for somebody who only looks in."""
    end = time.monotonic() + 1.0
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(0.02)
        print(f"waiting for another process that prepares {final}", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    except OSError:
        return False


def remove_leftovers(final: Path) -> None:
    """Delete temporary folders of processes that died while writing ``final``. Only for the holder of the lock."""
    for leftover in final.parent.glob(f".{final.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def published(final: Path) -> Iterator[Path]:
    """A new folder to write into that becomes ``final`` when the block ends well and disappears when it does not.

    A ``final`` that exists by then (another process was faster) is left as it is: both were made from the same
    description.

    Raises:
        OSError: the place cannot be written, or its disk is full; says what to do.
    """
    with _explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
        try:
            yield folder
            for path in folder.rglob("*"):
                if path.is_file():
                    sync(path)  # a rename may otherwise survive a power cut that the contents do not
            user_mode_(folder)
            try:
                os.rename(folder, final)
            except OSError:
                if not final.is_dir():
                    raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _explained(final: Path) -> Iterator[None]:
    """A full disk or a place that may not be written, in words, with the way out."""
    try:
        yield
    except OSError as error:
        place, named = final.parent, Path(str(error.filename))
        ours = place in named.parents or named in (place, *place.parents)
        if not (error.errno in _FULL or (error.errno in _REFUSED and ours)):
            raise
        what = "its disk is full" if error.errno in _FULL else f"it cannot be written ({error.strerror})"
        remedy = "set LOWRANK_CACHE to another folder" if cache_root() in final.parents else "choose another folder"
        raise OSError(
            f"{place} is to hold {final.name}, and {what}; nothing half-written is left there: {remedy}, make room, or "
            "give yourself the right to write"
        ) from error
