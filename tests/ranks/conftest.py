"""One group of ranks for all tests: starting processes is what takes time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.launch import RANKS, launch


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank has found."""
    results = launch("tests.ranks.worker", str(folder), ranks=RANKS, LOWRANK_CACHE=str(folder / "cache"))
    assert [code for code, _ in results] == [0] * RANKS, "\n".join(error for _, error in results)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(RANKS)]
