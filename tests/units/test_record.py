"""The log survives what happens to processes; progress line, other writers and env.json say what they should."""

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import types

import pytest

from lowrank.infra.environment import environment
from lowrank.infra.log import Log, LogError, TensorBoard, WeightsAndBiases, open_writers, read_log
from lowrank.infra.progress import Progress


def test_log_gives_back_what_was_written_and_null_for_what_json_does_not_know(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        log.write({"step": 1, "loss": 2.5})
        log.write({"step": 1, "val_loss": math.nan, "grad_norm": math.inf, "note": "first"})
    assert read_log(tmp_path / "log.jsonl") == [
        {"step": 1, "loss": 2.5},
        {"step": 1, "val_loss": None, "grad_norm": None, "note": "first"},
    ]


def test_a_new_log_does_not_overwrite_a_run(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        log.write({"step": 1, "loss": 1.0})
    with pytest.raises(FileExistsError, match="already holds the records of a run"):
        Log(tmp_path / "log.jsonl")


def test_resuming_drops_records_beyond_the_step_and_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": float(step)})
        log.write({"step": 4, "val_loss": 9.0})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    with Log(path, after=3) as log:
        log.write({"step": 4, "loss": 4.5})
    assert [(each["step"], each["loss"]) for each in read_log(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5)]
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_log_deleted_under_a_run_begins_anew(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        log.write({"step": 1})
        (tmp_path / "log.jsonl").unlink()
        with pytest.warns(UserWarning, match=r"log.jsonl was deleted .* the records before step 2 are lost"):
            log.write({"step": 2})
        log.write({"step": 3})
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [2, 3]


def test_a_full_disk_leaves_whole_lines_and_says_how_to_go_on(tmp_path):
    class Full(io.FileIO):
        def write(self, line):
            if self.tell():
                super().write(line[:3])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(line)

    with Log(tmp_path / "log.jsonl") as log:
        log._file.close()
        log._file = Full(tmp_path / "log.jsonl", "ab")
        log.write({"step": 1})
        with pytest.raises(LogError, match=r"step 2 into .*: the disk is full; .*make room .*--resume"):
            log.write({"step": 2})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a record: 'nonsense'"):
        read_log(tmp_path / "log.jsonl")


def test_a_killed_process_loses_no_line(tmp_path):
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from lowrank.infra.log import Log\n"
        f"log = Log(Path({str(tmp_path / 'log.jsonl')!r}))\n"
        "for step in range(1, 101): log.write({'step': step, 'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ}, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert [each["step"] for each in read_log(tmp_path / "log.jsonl")] == list(range(1, 101))


def test_missing_packages_are_named_and_the_log_is_untouched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    with pytest.raises(ImportError, match="--wandb needs the package wandb: pip install wandb"):
        open_writers(tmp_path, {}, wandb=True)
    assert not list(tmp_path.iterdir())


def test_wandb_gets_the_settings_and_the_numbers(tmp_path, monkeypatch):
    calls = []

    class FakeRun:
        def log(self, numbers, step):
            calls.append((numbers, step))

        def finish(self):
            calls.append("finished")

    def init(**settings):
        calls.append(settings)
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    writer = WeightsAndBiases(tmp_path / "run", {"lr": 1.0})
    writer.write({"step": 3, "loss": 2.0, "note": "text"})
    writer.close()
    assert calls[0]["config"] == {"lr": 1.0}
    assert calls[0]["resume"] == "never"
    assert calls[1:] == [({"step": 3, "loss": 2.0}, 3), "finished"]


def test_tensorboard_gets_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoard(tmp_path)
    writer.write({"step": 7, "loss": 2.0, "val_loss": None})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 2.0)]
    assert events.Tags()["scalars"] == ["loss"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Time that passes when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_live_line_shows_everything_and_is_rewritten_in_place():
    stream = Terminal()
    bar = Progress(200, stream=stream)
    bar.update(100, loss=2.5, rate=18_400, peak_bytes=612_000_000, extra="val loss 2.4")
    bar.note("saved")
    bar.close()
    first, last = stream.getvalue().rstrip().split("saved")
    assert "\n" not in first
    assert "\n" not in last.strip(), "notes stay above the one live line"
    line = last.rpartition("\r")[2]
    for part in ("step 100/200 ━━━━━━━━━━━━", "loss 2.5", "18.4k tokens/s", "peak 612 MB", "val loss 2.4", " left"):
        assert part in line
    assert stream.getvalue().endswith("\n")


def test_files_get_plain_lines_now_and_then():
    stream, clock = io.StringIO(), Clock()
    bar = Progress(1000, stream=stream, clock=clock)
    for step in range(1, 1001):
        clock.now = step / 1000
        bar.update(step, loss=1.0)
    lines = stream.getvalue().splitlines()
    assert 10 <= len(lines) <= 12
    assert "\r" not in stream.getvalue()
    assert lines[-1].startswith("step 1000/1000")


def test_slow_runs_print_a_line_every_half_minute():
    stream, clock = io.StringIO(), Clock()
    bar = Progress(10_000, stream=stream, clock=clock)
    for step in range(1, 11):
        clock.now += 20.0
        bar.update(step, loss=1.0)
    assert len(stream.getvalue().splitlines()) == 5


def test_time_left_counts_from_where_the_run_was_resumed():
    stream, clock = io.StringIO(), Clock()
    bar = Progress(200, start=100, stream=stream, clock=clock)
    clock.now = 10.0
    bar.update(110, loss=1.0)
    bar.note("saved")
    assert stream.getvalue() == "step 110/200  loss 1  01:30 left\nsaved\n"


def test_quiet_shows_nothing():
    for stream in (io.StringIO(), Terminal()):
        bar = Progress(10, quiet=True, stream=stream)
        bar.update(10, loss=1.0)
        bar.note("text")
        bar.close()
        assert stream.getvalue() == ""


def test_environment_is_json_and_says_what_matters():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"]
    assert found["threads"] >= 1
    assert found["command"] == sys.argv
    assert found["commit"] is None or len(found["commit"].removesuffix("+changes")) == 40
