"""Each group of ranks is started once, whatever tests ask for it, and in whichever of several test processes."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from tests.ranks.start import started


def place(base: pytest.TempPathFactory, *worlds: str) -> Path:
    """The folder in which the ranks of these worlds have left what they found."""
    shared = base.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all test processes
    folder = shared / "-".join(("ranks", *worlds))
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            started(str(folder), *worlds)
            (folder / "done").touch()
    assert (folder / "done").exists(), "these ranks were started before, and did not end well"
    return folder


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory, "two", "late", "killed")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory, "start", "sharded")


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory, "mesh")
