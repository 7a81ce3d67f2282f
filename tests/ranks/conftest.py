"""One group of ranks for all tests: starting processes is what takes time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.ranks.launch import RANKS, outcome


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank has found."""
    return outcome("tests.ranks.worker", folder, "rank", ranks=RANKS)
