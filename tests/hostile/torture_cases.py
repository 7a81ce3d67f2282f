"""Deaths and full disks before operations on files, for one method; `make torture` tries all methods, and every one."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
import torch
from tests.hostile.torture import apart, outcome, quiet, settings, take_up, tortured
from tests.hostile.world import TEXT

from lowrank.cli.app import main
from lowrank.data import prepare
from lowrank.infra.files import FolderInUseError, locked
from lowrank.infra.progress import Progress
from lowrank.train.loop import train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


@pytest.fixture(autouse=True)
def unwarned() -> None:
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("full", [False, True], ids=["killed", "full disk"])
def test_a_run_that_died_ends_as_if_it_had_not(full: bool, tmp_path: Path) -> None:
    """Every eighth operation here; every one by `make torture`."""
    tried, faults = tortured("lte", tmp_path, full=full, stride=8)
    assert not faults
    assert tried >= 8


def test_two_that_resume_at_once_end_as_one(tmp_path: Path) -> None:
    """One of them goes on, the other is refused; or it finds that all is done."""
    run = settings("lora")
    with quiet():
        whole = outcome(take_up(run, tmp_path / "whole"))
        assert apart(lambda: train(settings("lora", stop_at=2), tmp_path / "run", quiet=True)) == 0
        children = []
        for _ in range(2):
            child = os.fork()
            if not child:
                try:
                    train(run, tmp_path / "run", resume=True, quiet=True)
                    os._exit(0)
                except (FolderInUseError, ValueError):
                    os._exit(3)
                except BaseException:
                    os._exit(1)
            children.append(child)
        ended = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert ended == [0, 3]
    found = outcome(tmp_path / "run")
    assert {name: found[name] for name in ("model", "log", "best")} == {n: whole[n] for n in ("model", "log", "best")}


def test_a_dead_owners_lock_is_taken_over(tmp_path: Path) -> None:
    def die() -> None:
        with locked(tmp_path / "run"):
            os._exit(9)

    assert apart(die) == 9
    assert (tmp_path / "run" / ".lock").is_file()
    with quiet():
        assert train(settings("lora"), tmp_path / "run", quiet=True)["steps"] == 4
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root becomes another user")
def test_another_users_cache_is_read(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    tokens = prepare(file)
    for folder in (*tokens.folder.parents, *tmp_path.parents, tmp_path):
        if str(folder).startswith(str(tmp_path_factory.getbasetemp().parent)):
            folder.chmod(0o755)

    def read() -> None:
        os.setuid(65534)
        assert prepare(file) == tokens

    assert apart(read) == 0


class Gone(io.StringIO):
    """A pipe whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_leaves_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(8, stream=Gone())
    progress.update(1, loss=1.0)
    progress.note("said to nobody")
    progress.close()
    monkeypatch.setattr(sys, "stderr", Gone())
    assert train(settings("lora"), tmp_path / "run")["steps"] == 4
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_run_piped_into_head_is_whole(tmp_path: Path) -> None:
    settings("lora").write(tmp_path / "start.json")
    reader, writer = os.pipe()

    def piped() -> None:
        os.close(reader)
        for number in (1, 2):
            os.dup2(writer, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        assert main(["train", str(tmp_path / "start.json"), "--out", str(tmp_path / "run")]) == 0

    child = os.fork()
    if not child:
        try:
            piped()
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(writer)
    assert b"step 1/4" in os.read(reader, 10_000)
    os.close(reader)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "run" / "summary.json").is_file()
