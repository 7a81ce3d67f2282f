"""Whole runs on images from the command line: trained, resumed, judged, exported, used."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.images import class_folders, medmnist_file

from lowrank.cli.app import main
from lowrank.data.images.source import images as data_of
from lowrank.evaluate import evaluate
from lowrank.evaluate import predict as predicting
from lowrank.evaluate.predict import classify, predict
from lowrank.evaluate.score import score
from lowrank.infra import files
from lowrank.infra.checkpoint import latest, load
from lowrank.infra.log import read_log
from lowrank.recipes import RECIPES
from lowrank.run.run import Run
from lowrank.run.session import Session, restore

SHAPE = {"width": 16, "depth": 1, "heads": 2, "patch_size": 14}
SMALL = ["--batch-size", "8", *(word for name, n in SHAPE.items() for word in (f"--model.{name}", str(n)))]
METHODS = {
    "lora": ["--method.rank", "2"],
    "lte_galore": ["--method.rank", "2", "--method.galore_rank", "2", "--method.merge_every", "2"],
    "linear_probe": [],
    "apla": [],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return medmnist_file(tmp_path / "pneumoniamnist.npz")


def train(out: Path, data: Path | str, method: str = "lora", *more: str) -> int:
    words = ["train", "vit-mini", "--data", str(data), "--method", method, *METHODS.get(method, []), *SMALL]
    return main([*words, "--out", str(out), *(more or ("--epochs", "2"))])


def test_a_run_killed_in_its_report_is_finished_by_resuming(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each file of the report in turn, which is left half written, and once after the last."""
    from matplotlib.figure import Figure

    assert train(tmp_path / "whole", file) == 0
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "clinic").iterdir()}
    shutil.copytree(tmp_path / "whole", tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "clinic")
    log = tmp_path / "x" / "log.jsonl"
    log.write_text("".join(line for line in log.open() if "test_auc" not in line))
    write, draw = files.write_text_atomically, Figure.savefig
    written: list[str] = []
    for left in [*range(len(wanted)), None]:

        def killed(path: Path, left: int | None = left) -> None:
            if path.parent.name == "clinic":
                if len(written) == left:
                    path.write_bytes(b"half")
                    raise KeyboardInterrupt
                written.append(path.name)

        (tmp_path / "x" / "summary.json").unlink(missing_ok=True)
        written.clear()
        with monkeypatch.context() as patched:
            for module in ("infra.files", "evaluate.image_page"):
                name = f"lowrank.{module}.write_text_atomically"
                patched.setattr(name, lambda path, text, killed=killed: (killed(path), write(path, text)))
            patched.setattr(
                Figure, "savefig", lambda f, path, killed=killed, **how: (killed(path), draw(f, path, **how))
            )
            assert main(["train", "--resume", str(tmp_path / "x"), "--quiet"]) == (0 if left is None else 130)
        assert (tmp_path / "x" / "summary.json").exists() == (left is None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x" / "clinic").iterdir()} == wanted
    assert sum("test_auc" in record for record in read_log(log)) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_run_prints_auc_and_acc_per_epoch_and_on_the_test_split(
    tmp_path: Path, file: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "x", file, method) == 0
    told = capsys.readouterr()
    notes = [line for line in told.err.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in notes] == ["1", "2"]
    assert all("val auc" in line and "val acc" in line for line in notes)
    assert "test auc" in told.err
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    report = json.loads((tmp_path / "x" / "clinic" / "metrics.json").read_text())
    assert summary["test_auc"] == report["overall"]["auc"]["value"]
    records = read_log(tmp_path / "x" / "log.jsonl")
    assert [r["step"] for r in records if "val_auc" in r] == [3, 6]
    assert all("wait_seconds" in r and "images_per_second" in r for r in records if "step_seconds" in r)
    assert max(r["val_auc"] for r in records if "val_auc" in r) == summary["best_val_auc"]


def test_stopping_and_resuming_changes_nothing(tmp_path: Path, file: Path) -> None:
    options = ("--epochs", "2", "--data.augment", "hflip,crop", "--data.balance", "sampler", "--quiet")
    assert train(tmp_path / "whole", file, "lora", *options) == 0
    assert train(tmp_path / "parts", file, "lora", *options, "--stop-at", "2") == 0
    assert main(["train", "--resume", str(tmp_path / "parts"), "--quiet"]) == 0
    a, b = (load(latest(tmp_path / name / "checkpoints")).tensors for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_exported_adapter_predicts_as_the_run_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = class_folders(tmp_path / "photos", per_class=12)
    assert train(tmp_path / "x", root, "lora", "--epochs", "2", "--data.size", "20", "--quiet") == 0
    assert main(["export", str(tmp_path / "x"), "--adapter", str(tmp_path / "a")]) == 0
    whole = latest(tmp_path / "x" / "checkpoints") / "model.safetensors"
    assert (tmp_path / "a" / "adapter.safetensors").stat().st_size < whole.stat().st_size
    rows = list(csv.DictReader((tmp_path / "x" / "clinic" / "predictions.csv").open()))
    root.rename(tmp_path / "elsewhere")  # neither base nor adapter needs the data
    files = [str(tmp_path / "elsewhere" / row["image"]) for row in rows]
    for base in (str(tmp_path / "x"), None):
        made = predict(files, adapter=str(tmp_path / "a"), base=base)
        for row, each in zip(rows, made, strict=True):
            assert each.answer == (row["answer"],)
            assert each.scores["ill"] == pytest.approx(float(row["ill"]), abs=1e-5)
    assert [each.scores for each in predict(files, base=str(tmp_path / "x"))] == [each.scores for each in made]
    capsys.readouterr()
    command = ["predict", "--base", str(tmp_path / "x"), "--adapter", str(tmp_path / "a"), *files]
    assert main([*command, "--out", str(tmp_path / "p.csv")]) == 0
    assert f"{files[0]}: {rows[0]['answer']}  (" in capsys.readouterr().out
    assert len((tmp_path / "p.csv").read_text().splitlines()) == len(files) + 1


def test_a_damaged_image_to_predict_is_named(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "x", file, "lora", "--steps", "2", "--quiet") == 0
    (tmp_path / "bad.png").write_bytes(b"nothing")
    assert main(["predict", "--base", str(tmp_path / "x"), str(tmp_path / "bad.png")]) == 2
    assert "1 of 1 images cannot be read" in capsys.readouterr().err


def test_weights_of_a_run_start_another_with_other_classes(tmp_path: Path, file: Path) -> None:
    assert train(tmp_path / "x", file, "full", "--steps", "2", "--quiet") == 0
    assert main(["export", str(tmp_path / "x"), str(tmp_path / "plain")]) == 0
    other = medmnist_file(tmp_path / "other.npz", classes=5)
    start = ("--model.weights", str(tmp_path / "plain"), "--steps", "2", "--quiet")
    assert train(tmp_path / "y", other, "lora", *start) == 0
    session, _ = restore(tmp_path / "y", device="cpu")
    assert session.model.head.weight.shape[0] == 5
    assert {row.name for row in session.plan.rows if row.why == "loaded"} >= {"cls_token", "norm.weight"}


def test_runs_that_have_no_adapter_say_so(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, words in {"full": "trains the weights themselves", "lte_galore": "merges its factors"}.items():
        assert train(tmp_path / method, file, method, "--steps", "2", "--quiet") == 0
        assert main(["export", str(tmp_path / method), "--adapter", str(tmp_path / "a")]) == 2
        assert words in capsys.readouterr().err
    assert main(["export", str(tmp_path / "full"), "a", "--adapter", "b"]) == 2


def test_scoring_another_file_wants_the_same_classes(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "x", file, "lora", "--steps", "2", "--quiet") == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "x"), "--split", "test"]) == 0
    assert "balanced_accuracy" in capsys.readouterr().out
    other = medmnist_file(tmp_path / "other.npz", classes=5)
    assert main(["eval", str(tmp_path / "x"), "--data", str(other)]) == 2
    assert "the run was trained on normal, pneumonia" in capsys.readouterr().err


def test_classes_belong_to_the_run_whatever_becomes_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = class_folders(tmp_path / "photos", per_class=12, classes=("a", "b", "c"))
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path / "x", "photos", "full", "--steps", "4", "--data.size", "20", "--quiet") == 0
    facts = json.loads((tmp_path / "x" / "images.json").read_text())
    assert load(latest(tmp_path / "x" / "checkpoints")).meta["learnt"] == facts
    expected = score(str(tmp_path / "x"), split="train")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert score(str(tmp_path / "x"), split="train") == expected
    monkeypatch.chdir(tmp_path)
    (root / "a").rename(root / "z")
    for command in (["eval", str(tmp_path / "x")], ["train", "--resume", str(tmp_path / "x"), "--steps", "6"]):
        assert main(command) == 2
        assert "trained on a, b, c (multi-class); it does not know z" in capsys.readouterr().err
    (root / "z").rename(tmp_path / "a")  # what is left is known by name, though its numbers are others
    session, _ = restore(tmp_path / "x", device="cpu")
    assert score(str(tmp_path / "x"), split="train")["acc"] == pytest.approx(accuracy_of(session, root, ("b", "c")))
    assert main(["train", "--resume", str(tmp_path / "x"), "--steps", "6"]) == 2
    assert "missing are a" in capsys.readouterr().err
    root.rename(tmp_path / "gone")
    assert main(["export", str(tmp_path / "x"), str(tmp_path / "plain")]) == 0
    assert json.loads((tmp_path / "plain" / "images.json").read_text()) == facts
    assert predict([str(tmp_path / "gone")], base=str(tmp_path / "x"))[0].scores.keys() == {"a", "b", "c"}


def accuracy_of(session: Session, root: Path, classes: tuple[str, ...]) -> float:
    """Of a session's model on the training split of a folder, by names alone."""
    data = data_of(str(root), size=20)
    split = data.split("train")
    named = [(name, split.images[i]) for i, name in enumerate(split.names)]
    right = [each.answer == (each.path.split("/")[0],) for each in classify(session.model, named, session.data)]
    assert data.classes == classes
    return sum(right) / len(right)


def test_a_model_with_nan_is_an_error(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "x", file, "full", "--steps", "2", "--quiet") == 0
    session, _ = restore(tmp_path / "x", device="cpu")
    session.model.head.weight.data[0, 0] = torch.nan
    image = np.zeros((28, 28), np.uint8)
    with pytest.raises(FloatingPointError, match="answers to 1 of 1 images are not finite"):
        classify(session.model, [("x", image)], session.data)
    data = data_of(str(file))
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluate(session.model, data.for_model(session.model).evaluation("test", 4), session.task)


def test_images_are_predicted_as_they_are_read(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(tmp_path / "x", file, "full", "--steps", "2", "--quiet") == 0
    root, events = class_folders(tmp_path / "photos", per_class=4), []
    read, told = predicting.read_image, predicting.classify
    monkeypatch.setattr(predicting, "read_image", lambda *a: events.append("read") or read(*a))
    monkeypatch.setattr(predicting, "classify", lambda *a: events.append("told") or told(*a))
    assert len(predict([str(root)], base=str(tmp_path / "x"), batch_size=3)) == 8
    assert events == ["read"] * 3 + ["told"] + ["read"] * 3 + ["told"] + ["read"] * 2 + ["told"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "gpt2"], "--model gpt2 is for text"),
        (["--model.image_size", "30"], "not a multiple of the patch"),
        (["--data", "none.npz"], "no file or folder none.npz"),
        (["--labels", "x.csv"], "data.labels has no effect"),
        (["--data.augment", "flip"], "it is one of hflip, vflip"),
    ],
)
def test_bad_input_is_one_clear_message(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "vit-mini", *words, "--steps", "2", "--out", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_plan_needs_no_download(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--model.depth", "1", "--model.width", "64", "--model.heads", "2", "--batch-size", "32"]
    assert main(["plan", "vit-pretrain", *shape, "--layers"]) == 0
    assert "9 × 64" in capsys.readouterr().out  # PathMNIST's nine classes


def test_weights_in_bfloat16_train(tmp_path: Path, file: Path) -> None:
    options = ("--epochs", "2", "--precision", "bf16-weights", "--quiet")
    assert train(tmp_path / "x", file, "lora", *options) == 0
    session, _ = restore(tmp_path / "x", device="cpu")
    assert session.model.cls_token.dtype is torch.bfloat16


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("vit-")])
def test_recipes_are_complete(name: str) -> None:
    run = RECIPES[name]()
    assert run.recipe == name
    assert run.task == ("segmentation" if name == "vit-segment" else "images")
    assert Run.from_json(run.to_json()) == run


def test_the_real_file_trains(tmp_path: Path, shared_data: Path) -> None:
    assert train(tmp_path / "x", shared_data / "pneumoniamnist.npz", "lora", "--steps", "30", "--quiet") == 0
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert summary["test_images"] == 624
    assert summary["test_auc"] > 0.5
