"""A user's own method, data and task as file.py:name: trained, remembered by digest, and never executed unasked."""

from pathlib import Path

import pytest

from lowrank.cli import main
from lowrank.infra.log import read_log
from lowrank.recipes.gpt import gpt_mini
from lowrank.run.overrides import fingerprint, override
from lowrank.run.run import Run

SUMS = Path(__file__).resolve().parents[2] / "examples" / "new_dataset.py"
TINY = [
    *["--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--batch-size", "4", "--eval-every", "3"],
    *["--eval-batches", "2", "--device", "cpu", "--quiet"],
]
METHOD = """
from pathlib import Path
from lowrank.methods import full, lora
from lowrank.methods.method import Method
from lowrank.evaluate.text_task import TextTask
with Path({mark!r}).open("a") as mark:
    mark.write("x")
def method(*, rank: int = 2) -> Method:
    return lora(rank=rank)
class Task(TextTask):
    pass
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file that leaves a letter in `mark` whenever it is executed; beside it, a finished run that names it."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(METHOD.format(mark=str(tmp_path / "mark")))
    words = ["--method", "mine.py:method", "--task", "mine.py:Task", "--data.context", "16", "--steps", "3"]
    assert main(["train", "gpt-mini", *TINY, *words, "--out", "run"]) == 0
    (tmp_path / "mark").unlink()
    return tmp_path / "mine.py"


def test_the_example_of_data_trains_resumes_and_is_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--data", f"{SUMS}:data"]
    assert len(SUMS.read_text().splitlines()) <= 80
    sized = ["--data.digits", "1", "--data.context", "16"]
    assert main(["train", "gpt-mini", *TINY, *data, *sized, "--steps", "6", "--out", "a"]) == 0
    assert main(["train", "gpt-mini", *TINY, *data, *sized, "--steps", "6", "--stop-at", "3", "--out", "b"]) == 0
    assert main(["train", "--resume", "b", *data, "--stop-at", "6", "--quiet"]) == 0
    whole, parts = ([line.get("loss") for line in read_log(tmp_path / run / "log.jsonl")] for run in "ab")
    assert whole == parts
    assert main(["eval", "a", "--trust-files", "--batches", "2"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["train", "gpt-mini", *data, "--data.digts", "1"]) == 2
    assert "has no 'digts' (did you mean 'digits'?); it takes digits, context" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "run"],
        ["generate", "run"],
        ["export", "run", "out"],
        ["train", "--resume", "run", "--steps", "5", "--quiet"],
        ["train", "run/run.json", "--out", "again", "--quiet"],
        ["train", "run", "--init-from", "run", "--out", "again", "--quiet"],
        ["compare", "run", "--out", "all"],
        ["plan", "run"],
    ],
)
def test_a_run_s_file_is_executed_only_where_the_person_says_so(words, mine, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"names the file {mine}" in said
    assert "--trust-files" in said
    assert not (mine.parent / "mark").exists()
    mine.write_text(mine.read_text() + "\n# changed\n")
    assert main([*words, "--trust-files"]) == 2
    assert "has changed since (SHA-256" in capsys.readouterr().err
    assert not (mine.parent / "mark").exists()


def test_reports_execute_nothing_and_name_the_file_shortly(mine, capsys):
    mine.unlink()
    assert main(["report", "run"]) == 0
    assert "mine.py:method" in capsys.readouterr().out
    assert not (mine.parent / "mark").exists()


def test_trusted_or_named_again_it_goes_on(mine, capsys):
    named = ["--method", "mine.py:method", "--task", "mine.py:Task"]
    assert main(["train", "--resume", "run", "--steps", "4", "--quiet", *named]) == 0
    assert main(["train", "--resume", "run", "--steps", "5", "--quiet", "--trust-files"]) == 0
    assert main(["eval", "run", "--trust-files"]) == 0
    assert main(["eval", "run"]) == 2, "trust ends with the command"
    mine.write_text(mine.read_text() + "\n# changed\n")
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--steps", "6", "--quiet", *named]) == 2
    assert "this would change --task" in capsys.readouterr().err


def test_a_run_is_the_same_wherever_its_files_lie(tmp_path):
    marks = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mine.py").write_text(METHOD.format(mark=str(tmp_path / "mark")))
        run = override(gpt_mini(), {"method": f"{tmp_path / place}/mine.py:method"})
        assert Run.from_json(run.to_json()) == run
        marks.append(fingerprint(run))
    assert marks[0] == marks[1]
    assert not (tmp_path / "mark").exists(), "signatures are read, not run"
