"""What a run's files, formats and streams can be trusted with."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.images import class_folders
from tests.runs.tiny import TEXT, tiny

from lowrank.cli.app import main
from lowrank.infra import checkpoint
from lowrank.infra.checkpoint import CheckpointError
from lowrank.infra.log import read_log
from lowrank.interop import export_adapter, read_adapter
from lowrank.run import Run
from lowrank.run.overrides import fingerprint
from lowrank.run.session import restore
from lowrank.train import train

SOURCES = Path(__file__).parents[2] / "src"
WORDS = ["gpt-mini", "--data", str(TEXT), "--data.context", "16", "--model.n_layer", "1", "--model.n_head", "2"]
SMALL = ["--model.n_embd", "16", "--batch-size", "2", "--steps", "4", "--eval-batches", "1", "--device", "cpu"]


# --- no evaluation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--data.val_fraction", "0"], 1), (["--eval-every", "never"], 0)],
    ids=["no val split", "never"],
)
def test_a_run_without_evaluation_trains_and_saves(
    tmp_path: Path, words: list[str], said: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *WORDS, *SMALL, *words, "--out", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().err.count("no val split") == said
    assert not any("val_loss" in record for record in read_log(tmp_path / "x" / "log.jsonl"))
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "x" / "checkpoints")) == 4
    assert restore(tmp_path / "x", device="cpu")[1] == 4
    assert main(["train", "--resume", str(tmp_path / "x"), "--steps", "5", "--quiet"]) == 0
    assert main(["report", str(tmp_path / "x")]) == 0


def test_images_without_a_val_split_are_trained_on_and_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = class_folders(tmp_path / "pictures", 12)
    shape = ["--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.patch_size", "14"]
    words = ["vit-mini", "--data", str(folder), "--data.val_fraction", "0", "--data.size", "28", *shape]
    assert main(["train", *words, "--batch-size", "4", "--steps", "2", "--out", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().err.count("no val split") == 1
    assert "test_auc" in json.loads((tmp_path / "x" / "summary.json").read_text())


# --- formats and dtypes ----------------------------------------------------------------------------------------------


def test_a_newer_adapter_is_refused_with_the_version_that_wrote_it(tmp_path: Path) -> None:
    train(tiny("lora", steps=4), tmp_path / "x", quiet=True)
    export_adapter(tmp_path / "x", tmp_path / "a")
    content = json.loads((tmp_path / "a" / "adapter.json").read_text())
    assert content["version"]
    newer = content | {"format": 99, "version": "7.1"}
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(newer))
    with pytest.raises(ValueError, match=r"is of format 99, written by lowrank 7\.1; .* reads up to format 1"):
        read_adapter(tmp_path / "a")


def test_weights_of_another_dtype_are_not_converted_in_silence(tmp_path: Path) -> None:
    train(tiny(steps=4), tmp_path / "x", quiet=True)
    run = Run.read(tmp_path / "x" / "run.json")
    replace(run, precision="bf16-weights").write(tmp_path / "x" / "run.json")
    with pytest.raises(CheckpointError, match=r"is torch\.bfloat16 in the model, torch\.float32 in checkpoint"):
        restore(tmp_path / "x", device="cpu")


# --- files and strangers ---------------------------------------------------------------------------------------------


def test_nothing_of_ours_runs_code_from_the_hub() -> None:
    """Every call that could is told not to."""
    asked = {"from_pretrained", "load_dataset", "from_config"}
    silent = []
    for path in SOURCES.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in asked:
                names = [word.arg for word in call.keywords]
                if "trust_remote_code" not in names and None not in names:  # ** has it: tested where it is made
                    silent.append(f"{path.name}:{call.lineno}")
    assert not silent


def test_files_that_are_read_later_are_written_whole() -> None:
    """No plain write_text, and no open for writing, but of what is renamed when it is complete."""
    beside = {"files.py", "step_clock.py"}  # the writer itself, and a file of the kernel's
    plain = [
        f"{path.name}:{call.lineno}"
        for path in SOURCES.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "write_text" and path.name not in beside
    ]
    assert not plain


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_every_file_of_a_run_has_the_users_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train(tiny("lora", steps=4), tmp_path / "x", quiet=True)
        export_adapter(tmp_path / "x", tmp_path / "a")
        assert main(["export", str(tmp_path / "x"), str(tmp_path / "plain")]) == 0
    finally:
        os.umask(before)
    wrong = {
        str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777)
        for path in tmp_path.rglob("*")
        if path.stat().st_mode & 0o777 != (0o750 if path.is_dir() else 0o640)
    }
    assert not wrong


def test_another_working_directory_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative --data and --labels, where others of the same names lie, too."""
    monkeypatch.chdir(tmp_path)
    folder = class_folders(tmp_path / "pictures", 12)
    rows = [f"{p.relative_to(folder)},{p.parent.name},{p.stem[:9]}" for p in sorted(folder.rglob("*.png"))]
    Path("table.csv").write_text("\n".join(["path,label,patient", *rows]))
    shape = ["--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.patch_size", "14"]
    words = ["vit-mini", "--data", "pictures", "--labels", "table.csv", "--data.size", "28", *shape, "--device", "cpu"]
    assert main(["train", *words, "--batch-size", "4", "--steps", "2", "--quiet", "--out", "x"]) == 0
    (tmp_path / "away" / "pictures").mkdir(parents=True)
    (tmp_path / "away" / "table.csv").write_text("path,label\n")
    monkeypatch.chdir(tmp_path / "away")
    assert main(["eval", "../x"]) == 0
    given = ["--data", "../pictures", "--labels", "../table.csv"]
    assert main(["train", "--resume", "../x", "--steps", "3", *given, "--quiet"]) == 0
    assert main(["train", "../x/run.json", "--quiet", "--out", "again"]) == 0
    monkeypatch.chdir(tmp_path / "x" / "checkpoints" / "step-00000003")
    assert main(["eval", "."]) == 0
    told = [Run.read(tmp_path / run / "run.json") for run in ("x", "away/again")]
    assert fingerprint(told[0]) == fingerprint(told[1])


# --- memory ----------------------------------------------------------------------------------------------------------

_DECODE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from lowrank.data.images.decode import Reading, read_image
def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = most()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: read_image(Path(sys.argv[1]), Reading()), range(4)))
print(most() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count")
def test_huge_images_on_several_threads_take_the_memory_of_one(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (6000, 6000)).save(tmp_path / "a.png")  # 144 MB in memory
    words = [sys.executable, "-W", "ignore", "-c", _DECODE, str(tmp_path / "a.png")]
    grown = int(subprocess.run(words, capture_output=True, check=True, text=True, timeout=300).stdout)
    assert grown * 1024 < 2 * 4 * 6000 * 6000


# --- readers that leave ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX pipes")
def test_a_reader_that_leaves_does_not_end_a_run(tmp_path: Path) -> None:
    """``2>&1 | head -1``: nobody reads, and the run is trained and saved all the same."""
    words = ["train", *WORDS, *SMALL, "--out", str(tmp_path / "x")]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "lowrank", *words], stdout=writer, stderr=writer, timeout=300)
    os.close(writer)
    assert done.returncode == 0
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["steps"] == 4
