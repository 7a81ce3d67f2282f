"""``python -m benchmarks.gpu``: its dry run on a CPU passes every section, and what fails takes nothing with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu.__main__ import SECTIONS, main
from benchmarks.gpu.bench import Bench, check
from benchmarks.gpu.correctness import checks
from benchmarks.gpu.page import Results, reached, table
from benchmarks.gpu.processes import run_section

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_the_dry_run_passes_every_section(tmp_path: Path) -> None:
    """As a user types it, without what is not promised to be there."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout
    sections = json.loads((tmp_path / "out" / "gpu.json").read_text())["sections"]
    assert list(sections) == list(SECTIONS)
    for name, section in sections.items():
        assert section["status"] == "done"
        assert section["items"], name
        left_out = [item for item, found in section["items"].items() if "failed" in found or "skipped" in found]
        assert not set(left_out) - {"galore-torch"}, name  # which need not be installed
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "A dry run" in page
    assert "| rule galore |" in page


def test_without_cuda_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__.cuda_is_there", lambda: False)
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- processes: stand-ins that do what a broken device does ----------------------------------------------------------


class Inline:
    """A context whose processes are plain forks: the section is a function of this test."""

    def __init__(self, work: Any):
        self.work = work

    def Pipe(self, duplex: bool) -> Any:
        import multiprocessing

        return multiprocessing.get_context("fork").Pipe(duplex=duplex)

    def Process(self, target: Any, args: Any) -> Any:
        import multiprocessing

        def body(report: Any) -> None:
            os.setsid()
            self.work(report)

        return multiprocessing.get_context("fork").Process(target=body, args=(args[-1],))


def dies(report: Any) -> None:
    report.send(("item", "first", {"seconds": 1.0}))
    os._exit(9)


def hangs(report: Any) -> None:
    report.send(("item", "first", {"seconds": 1.0}))
    time.sleep(60)


def ends(report: Any) -> None:
    report.send(("done", ""))


@pytest.mark.parametrize(
    ("work", "status", "why"),
    [(dies, "failed", "exit code 9"), (hangs, "stopped", "killed 0 s after its 0 s"), (ends, "done", None)],
)
@pytest.mark.filterwarnings("ignore:This process")
def test_a_section_that_dies_or_hangs_is_recorded(work: Any, status: str, why: str | None, tmp_path: Path) -> None:
    results = Results(tmp_path, {"device": "cpu", "tiny": True})
    run_section(Inline(work), "memory", {"seconds": 0.4}, results, grace=0.1)
    section = json.loads((tmp_path / "gpu.json").read_text())["sections"]["memory"]
    assert section["status"] == status
    assert why is None or why in section["why"]
    assert bool(results.failures()) == (status != "done")
    if status != "done":
        assert section["items"] == {"first": {"seconds": 1.0}}  # what it had measured counts


# --- items ---------------------------------------------------------------------------------------------------------


def items_of(bench_seconds: float, *measures: Any, **options: Any) -> list[Any]:
    sent: list[Any] = []
    bench = Bench(CPU, bench_seconds, lambda name, value: sent.append(value), tiny=True)
    for measure in measures:
        bench.item("item", measure, **options)
    return sent


def test_an_item_that_fails_or_runs_out_of_memory_or_time_leaves_the_next() -> None:
    def fails() -> None:
        raise ValueError("first line\nsecond line")

    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    good = {"seconds": 1.0}
    assert items_of(600.0, fails, too_large, lambda: good) == [
        {"failed": "ValueError: first line"},
        {"failed": "out of memory"},
        good,
    ]
    assert items_of(600.0, lambda: time.sleep(30), lambda: good, limit=0.1) == [
        {"skipped": "interrupted after 0 s"},
        good,
    ]
    assert "needs about 0 s, and 0 s were left" in items_of(-1.0, lambda: good)[0]["skipped"]
    assert "needs about 9 s" in items_of(0.5, lambda: good, needs=9.0)[0]["skipped"]


def test_a_page_shows_errors_and_goals(tmp_path: Path) -> None:
    results = Results(tmp_path, {"device": "cuda", "tiny": False})
    results.begin("correctness")
    results.add("correctness", "good", check(1e-6, 1e-3))
    results.add("correctness", "bad", check(float("nan"), 1e-3))
    results.add("correctness", "large", {"failed": "out of memory"})
    results.end("correctness", "done", 1.0, "")
    assert len(results.failures()) == 1
    page = (tmp_path / "gpu.md").read_text()
    assert "1 of 2 checks passed; 1 failures" in page
    assert "| bad | nan | 0.001 | NO |  |" in page
    assert "| large |  |  |  | out of memory |" in page
    known = {"memory": {"7b galore_8bit, per layer, 1 × 256": {"peak_gib": 21.5, "state_bytes_a_parameter": 2.0}}}
    assert [goal[1:] for goal in reached(known)] == [(21.5, 22.0), (2.0, 5.0)]
    assert list(table({})) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", checks(torch.device("cuda")) if torch.cuda.is_available() else ["none"])
def test_the_device_computes_what_float64_does(name: str) -> None:
    found = checks(torch.device("cuda", 0))[name]()
    assert found["ok"], found
