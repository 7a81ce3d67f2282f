"""Fixtures for every test: one thread, a cache of its own, and real data where the checkout has some beside it."""

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a network

# The same examples every time, and no limit on an example's time: a busy machine is no failure.
hypothesis.settings.register_profile("lowrank", deadline=None, derandomize=True)
hypothesis.settings.load_profile("lowrank")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny shapes are slower on many threads, and tests may run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository; tests that need it are skipped where there is none."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a file below the test's folder and return its path."""

    def written(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return written
