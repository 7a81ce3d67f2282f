"""A user's own functions, written ``file.py:name``: a method, model, data or task beside those of the catalogue.

A run remembers such a file with its digest (``Run.files``). A run's folder may come from anybody, so that a file which
only a ``run.json`` names is never executed: the person names it on the command line (which ``trust``s it) or says
``--trust-files``. Signatures are read from the source and need no trust.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.infra.convert import nearest
from lowrank.infra.signatures import Signature, read, source_of

_TRUSTED: set[str] = set()
_EVERY = "*"


def is_own(name: str) -> bool:
    """Whether a name is one of a file's functions.

    >>> is_own("examples/new_optimizer.py:method"), is_own("lora")
    (True, False)
    """
    file, colon, _ = name.rpartition(":")
    return bool(colon) and file.endswith(".py")


def short(name: str) -> str:
    """For tables and folders: without the folders that the file lies in."""
    return Path(name).name if is_own(name) else name


def given(name: str) -> tuple[str, str, str]:
    """(the name with the file's whole path, the file, its digest) of what the person has named, which is trusted.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or nothing of that name in it.
    """
    file, _, function = name.rpartition(":")
    path = Path(file).expanduser().resolve()
    signature(f"{path}:{function}")
    _TRUSTED.add(str(path))
    return f"{path}:{function}", str(path), digest(path)


def trust_every_file() -> None:
    """From here on a file that a run.json names is executed too, if it is still the same (``--trust-files``)."""
    _TRUSTED.add(_EVERY)


def trust_nothing() -> None:
    """Forget what was trusted: a command's trust ends with it."""
    _TRUSTED.clear()


def digest(file: Path) -> str:
    """SHA-256, in hexadecimal; empty where there is no such file."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def identity(name: str, files: Mapping[str, str]) -> str:
    """The name with the file's digest in place of its path: the same wherever the file lies."""
    file, _, function = name.rpartition(":")
    return f"{function} of {files[file][:16]}" if is_own(name) and file in files else name


def signature(name: str) -> Signature:
    """The signature of a file's function, read and not run.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or nothing of that name in it (the nearest is named).
    """
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {file}, asked for its function {function}")
    known = [name for name, node in source_of(path).names.items() if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    if function not in known:
        raise ValueError(f"{file} has no function {function!r}{nearest(function, known)}")
    return read(path, function)


def load(kind: str, name: str, files: Mapping[str, str]) -> Any:
    """The function itself, its file executed.

    Args:
        kind: of the option that names it, such as "method".
        name: with the file's whole path.
        files: the digests that the run has written down.

    Raises:
        PermissionError: nobody who started this process has named the file.
        ValueError: it is not the file that the run was made with.
    """
    file, _, function = name.rpartition(":")
    if not _TRUSTED & {file, _EVERY}:
        raise PermissionError(
            f"the run names the file {file}, which would be executed: name it yourself where the command takes "
            f"it (--{kind} {name}), or say --trust-files if you trust whoever made the run"
        )
    now = digest(Path(file))
    if file in files and files[file] != now:
        gone = "is gone" if not now else f"has changed since (SHA-256 {files[file][:12]} -> {now[:12]})"
        raise ValueError(f"the run was made with the file {file}, which {gone}: bring that version back, or train anew")
    signature(name)
    return getattr(_module(file, now), function)


@functools.cache
def _module(file: str, mark: str) -> Any:
    """The file as a module, under a name of its own: dataclasses and pickle look themselves up by it."""
    name = f"{Path(file).stem}_{mark[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec, "a .py file always has a loader"
    assert spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
