"""The table: each row a command line of somebody's, and what has to come of it. All in one process."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.hostile import rows_data, rows_images, rows_options, rows_runs
from tests.hostile.world import Row, World, command, lay_out, seen, working_in

from lowrank.cli.app import main

ROWS = {
    f"{kind}: {row.name}": row
    for kind, rows in {
        "data": rows_data.ROWS,
        "images": rows_images.ROWS,
        "runs": rows_runs.RUNS,
        "checkpoints": rows_runs.CHECKPOINTS,
        "adapters": rows_runs.ADAPTERS,
        "options": rows_options.OPTIONS,
        "models": rows_options.MODELS,
        "names": rows_options.NAMED,
    }.items()
    for row in rows
}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LOWRANK_CACHE", str(root / "cache"))
        torch.set_num_threads(1)
        yield World(root=root / "given")


def test_there_are_enough() -> None:
    assert len(ROWS) >= 150
    assert len({row.name for row in ROWS.values()}) > 0.9 * len(ROWS)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ROWS)
def test_row(
    name: str,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row: Row = ROWS[name]
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # nobody waits for a network that is not there
    with working_in(tmp_path):
        lay_out(row.given, world)
        before, shared = seen(tmp_path), seen(world.root)
        capsys.readouterr()
        status = main(command(row.words, world))
        told = capsys.readouterr()
        after = seen(tmp_path)
    assert status == row.status, told.err
    for words in row.says:
        assert words in told.err
    for words in row.shows:
        assert words in told.out
    assert "Traceback" not in told.err + told.out
    assert not any(ord(c) < 32 and c not in "\n\t\r" for c in told.err), "it steers the terminal"
    if status:
        assert told.err.count("lowrank: ") >= 1 or "left out" in told.err
    changed = {path for path in {**before, **after} if before.get(path) != after.get(path)}
    changed = {Path(path).relative_to(tmp_path).as_posix() for path in changed}
    assert not {path for path in changed if not any(fnmatch.fnmatch(path, glob) for glob in row.writes)}
    assert seen(world.root) == shared
