"""What a run, a report and the help say, as people read it."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from tests.images import class_folders, medmnist_file
from tests.runs.tiny import TEXT

from lowrank.cli import main
from lowrank.evaluate.image_findings import findings
from lowrank.evaluate.image_report import Judged, write_report
from lowrank.methods import METHODS
from lowrank.methods.options import OPTIONS
from lowrank.run.overrides import catalogue

Read = pytest.CaptureFixture[str]
SMALL = ["--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--data.context", "16", "--steps", "4"]
VIT = ["--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.patch_size", "14", "--steps", "2"]


def test_text_runs_say_their_evaluations(tmp_path: Path, capsys: Read) -> None:
    words = ["train", "gpt-mini", "--data", str(TEXT), *SMALL, "--eval-every", "2", "--out", str(tmp_path / "run")]
    assert main([*words, "--tokenizer", "bytes"]) == 0  # the same as --data.tokenizer
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "val loss" in line]
    assert [re.match(r"epoch \S+  step (\d)  val loss \d\.\d{4}  val perplexity \d+\.\d{4}$", x)[1] for x in lines] == [  # type: ignore[index]
        "2",
        "4",
    ]
    assert max(map(len, said.splitlines())) <= 80


def test_preparing_says_what_comes_next(capsys: Read) -> None:
    outs = []
    for option in ("--tokenizer", "--data.tokenizer"):
        assert main(["data", "prepare", str(TEXT), option, "bpe:300"]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    words = outs[0].splitlines()[-1].split()
    assert words[:4] == ["lowrank", "train", "gpt-mini", "--data"]
    assert main([*words[1:], *SMALL, "--out", str(Path(words[4]).parent / "run"), "--dry-run"]) == 0


def test_tables_and_help_are_at_most_100_wide(capsys: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for words in (["data", "list"], ["methods"], *(["methods", name] for name in METHODS)):
        assert main(words) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_each_option_of_each_method_is_explained(capsys: Read) -> None:
    offer = catalogue()
    for name in METHODS:
        assert main(["methods", name]) == 0
        out = capsys.readouterr().out
        for option in offer.signature("method", name).defaults:
            found = re.search(rf"--method\.{option} \S+\s+(\S.+)", out)
            assert found, f"{name} {option}"
            assert not found[1].startswith("--"), f"{name} {option}"
    used = {option for name in METHODS for option in offer.signature("method", name).defaults}
    assert used >= OPTIONS.keys()


def judged(kind: str, labels: list[object], scores: list[list[float]]) -> Judged:
    return Judged(
        kind=kind,  # type: ignore[arg-type]
        classes=("ill", "well", "odd")[: len(scores[0])],
        labels=np.array(labels),
        scores=np.array(scores, np.float32),
    )


def test_one_answer_for_everything_is_said() -> None:
    right = [[0.9, 0.1], [0.2, 0.8]]
    assert findings(judged("binary", [0, 1], right)) == []
    (said,) = findings(judged("binary", [0, 1, 1, 1], [[0.1, 0.9]] * 4))
    assert said.startswith("The model calls every image 'well': its answers do not tell the classes apart")
    assert "75%" in said
    (said,) = findings(judged("binary", [0, 1] * 50, [[0.9, 0.1]] * 98 + right[1:] * 2))
    assert said == "The model calls 98% of the images 'ill', of which there are 50%."
    assert findings(judged("binary", [1, 1], [[0.1, 0.9]] * 2)) == []  # there is nothing else
    several = judged("multi-label", [[0, 1], [1, 0]], [[0.1, 0.9], [0.2, 0.1]])
    assert findings(several) == ["The model finds 'ill' in no image, though there are some."]


def test_the_report_is_one_page_with_its_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_report(tmp_path, judged("binary", [0, 1, 1, 0], [[0.4, 0.6]] * 4), resampled=20)
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3  # of mistakes there are no images to show
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "The model calls every image 'well'" in unescape(page)
    assert "The model calls every image 'well'" in (tmp_path / "report.md").read_text()


def test_a_run_of_images_warns_and_predicts(tmp_path: Path, capsys: Read) -> None:
    file = medmnist_file(tmp_path / "pneumoniamnist.npz")
    for size, says in ((56, "have 28 pixels and the model takes 56: they are enlarged"), (28, None)):
        words = ["train", "vit-mini", "--data", str(file), *VIT, "--model.image_size", str(size), "--batch-size", "8"]
        assert main([*words, "--out", str(tmp_path / str(size))]) == 0
        said = capsys.readouterr().err
        assert (says is None) == ("the model takes" not in said)
        assert says is None or says in said
        assert str(tmp_path / str(size) / "clinic" / "report.html") in said
    root = class_folders(tmp_path / "new", per_class=2)
    image = next(root.rglob("*.png"))
    assert main(["predict", str(tmp_path / "28"), str(image)]) == 0
    one = capsys.readouterr().out
    assert one.startswith(f"{image}: ")
    assert main(["predict", "--base", str(tmp_path / "28"), str(image)]) == 0
    assert capsys.readouterr().out == one
