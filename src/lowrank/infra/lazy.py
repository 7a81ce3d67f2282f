"""Attributes of a package that are imported when they are first touched, so that ``import lowrank`` and help are quick.

A package lists its names once, as imports under ``if TYPE_CHECKING:``, where editors and type checkers read them;
``__getattr__ = attributes(__name__, __file__)`` reads the same lines from the source.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def attributes(package: str, file: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``package``, whose source is ``file``."""

    @functools.cache
    def places() -> dict[str, str]:
        found: dict[str, str] = {}
        for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                imports = [each for each in node.body if isinstance(each, ast.ImportFrom)]
                found |= {alias.name: str(each.module) for each in imports for alias in each.names}
        return found

    def touched(name: str) -> Any:
        if name not in places():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        place = places()[name]
        value = importlib.import_module(f"{package}.{name}" if place == package else place)
        value = value if place == package else getattr(value, name)
        setattr(sys.modules[package], name, value)
        return value

    return touched
