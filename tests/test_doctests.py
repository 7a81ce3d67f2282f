"""The examples in docstrings say what is so."""

import doctest
import importlib
from pathlib import Path

import pytest

import lowrank

PACKAGE = Path(lowrank.__file__).parent
MODULES = sorted(
    ".".join(("lowrank", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0
