"""Files are written whole or not at all; a folder has one writer, and a dead one is no hindrance."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.infra import files
from lowrank.infra.files import FolderInUseError, locked, read_json, write_json


def test_what_was_there_stays_until_the_new_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, math.nan, {"b": -math.inf}]})
    assert read_json(path) == {"a": [1, None, {"b": None}]}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(files.NotWrittenError, match=r"a.json could not be written: the disk is full; what was there"):
        write_json(path, {})
    assert read_json(path)["a"][0] == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_half_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"half\.json is damaged"):
        read_json(tmp_path / "half.json")


def test_one_writer_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / ".lock").read_text())
        assert owner["pid"] == os.getpid()
        with pytest.raises(FolderInUseError, match=rf"process {os.getpid()} on {owner['host']}, since 2"):
            locked(tmp_path / "run").__enter__()
    assert not (tmp_path / "run").exists()


HOLD = "import sys, time; from pathlib import Path; from lowrank.infra.files import locked\n"
HOLD += "with locked(Path(sys.argv[1])):\n    print(flush=True); time.sleep(600)\n"


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(FolderInUseError, match=f"process {holder.pid} on"):
            locked(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("owner", "alive"),
    [
        ({"host": "elsewhere", "pid": 1}, True),
        ({"pid": 2**22 + 1}, False),
        ({"pid": os.getpid(), "began": "0"}, False),  # the number of a dead one, given to another process
        ({"pid": os.getpid()}, True),
        ({}, True),
    ],
)
def test_where_the_system_keeps_no_locks_what_is_written_counts(
    owner: dict[str, object], alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    (tmp_path / ".lock").write_text(json.dumps({"host": files.socket.gethostname(), **owner}))
    if alive:
        with pytest.raises(FolderInUseError, match=r"if it is gone, remove .*\.lock"):
            locked(tmp_path).__enter__()
    else:
        with locked(tmp_path):
            pass
