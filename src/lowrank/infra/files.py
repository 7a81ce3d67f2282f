"""Files that somebody reads later: written as a whole or not at all; and the lock of a folder that one process writes.

A file is written under a name beside its own, flushed to the disk and renamed: a process killed, or a disk that fills
up, leaves what was there before.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: what is written into the lock is all that is gone by
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


class FolderInUseError(OSError):
    """Another process writes the folder; the message says which."""


class NotWrittenError(OSError):
    """A file that could not be written; what was there before still is."""

    def __init__(self, path: Path, error: OSError):
        full = error.errno == errno.ENOSPC
        cause, remedy = ("the disk is full", "make room") if full else (str(error), "mend that")
        super().__init__(
            f"{path} could not be written: {cause}; what was there before is untouched: {remedy} and do it again "
            "(a run is resumed)"
        )
        self.errno = error.errno


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8 to ``path``, whole or not at all.

    Raises:
        NotWrittenError: the disk is full, or refuses.
    """
    beside = path.with_name(f".{path.name}.writing")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise NotWrittenError(path, error) from error


def write_csv(path: Path, header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Write a table as CSV, whole or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_text_atomically(path, text.getvalue())


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """Write ``content`` as JSON, whole or not at all; numbers that are not finite become null."""
    text = json.dumps(finite(content), indent=indent, allow_nan=False)
    write_text_atomically(path, text if indent is None else f"{text}\n")


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no JSON: {error}") from error


def read_facts(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none, or it is damaged."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def finite(content: Any) -> Any:
    """JSON's data with null in the place of NaN and infinities, which are none of it.

    >>> finite({"loss": float("nan"), "steps": [1, 2.5]})
    {'loss': None, 'steps': [1, 2.5]}
    """
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def refuse_filled(out: Path) -> None:
    """Refuse to write into a folder that is not empty, or is a file."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} {'is not empty' if out.is_dir() else 'is a file'}: choose another folder")


def user_mode_(folder: Path) -> None:
    """Give a folder and what is in it the modes that the user's umask asks for: safetensors and ``mkdtemp`` make
    private ones, which would hide a shared run, or a shared cache, from its other users."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        with suppress(PermissionError):  # another user's
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Meanwhile this process alone writes ``folder``, which is made; an empty one is removed afterwards.

    The operating system lets a dead owner's lock go. Where it keeps none, or a child of the dead one still holds it,
    what the owner has written into it decides: host, process, when that began.

    Raises:
        FolderInUseError: another process holds it.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _take(path)
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}
        owner["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        with suppress(OSError):  # the folder may be gone
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                path.unlink()
        os.close(descriptor)
        with suppress(OSError):
            for each in made:  # as long as they are empty
                each.rmdir()


def _take(path: Path) -> int:
    """A descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _is_held(descriptor)
            owner = read_facts(path)
            if held and _is_alive(owner):
                raise FolderInUseError(
                    f"{path.parent} is being written by process {owner.get('pid', '?')} on {owner.get('host', '?')}, "
                    f"since {owner.get('time', '?')}: wait for it or end it, or choose another --out (if it is gone, "
                    f"remove {path})"
                )
            if held:
                path.unlink(missing_ok=True)
            elif os.fstat(descriptor).st_ino == path.stat().st_ino:  # nobody has removed it in the meantime
                kept, descriptor = descriptor, -1
                return kept
        except FileNotFoundError:
            pass
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _is_held(descriptor: int) -> bool:
    """Whether another process holds the lock, as far as the operating system knows; otherwise this one does now."""
    if fcntl is None:
        return os.fstat(descriptor).st_size > 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return os.fstat(descriptor).st_size > 0
    return False


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the owner of a lock may be alive: of another host nobody knows here."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return owner.get("began") in (None, _began(owner["pid"]))


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's ticks, by which it is told from a later one of its number; Linux only."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None
