"""Metrics of images against MedMNIST's own evaluator, and the figures of the report against scikit-learn's."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from tests.images import medmnist_file

from lowrank.data.images.medmnist import KIND_OF_TASK, NAMES
from lowrank.evaluate import image_pictures
from lowrank.evaluate.image_metrics import auc, balanced_accuracy, calibration_error, image_metrics, predicted
from lowrank.evaluate.image_report import (
    Judged,
    answer_figures,
    interval,
    ranked_figures,
    report_figures,
    resamples,
    worst_mistakes,
    write_report,
)
from lowrank.evaluate.image_task import ImageTask, image_loss


def answers(kind: str, classes: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores, float32, with ties among the scores."""
    noise = np.random.default_rng(seed)
    if kind == "multi-label":
        labels = noise.integers(0, 2, (n, classes))
        logits = noise.normal(size=(n, classes)) + labels
        return labels, (1 / (1 + np.exp(-logits.round(1)))).astype(np.float32)
    labels = np.concatenate([np.arange(classes), noise.integers(0, classes, n - classes)])
    logits = noise.normal(size=(n, classes)).round(1) + np.eye(classes)[labels]
    return labels, torch.from_numpy(logits).float().softmax(dim=1).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_auc_and_acc_are_medmnists_to_the_last_digit(tmp_path: Path, name: str) -> None:
    from medmnist import INFO, Evaluator

    kind, classes = KIND_OF_TASK[INFO[name]["task"]], len(INFO[name]["label"])
    labels, scores = answers(kind, classes, 60)
    file = medmnist_file(tmp_path / "x.npz", classes=classes)
    content = dict(np.load(file)) | {"test_labels": labels.reshape(len(labels), -1)}
    np.savez(tmp_path / f"{name}.npz", **content)
    theirs = Evaluator(name, "test", root=str(tmp_path)).evaluate(scores)
    ours = image_metrics(labels, scores, kind)
    assert ours["auc"] == theirs.AUC
    assert ours["acc"] == theirs.ACC


def test_a_class_without_examples_is_left_out_of_the_mean() -> None:
    labels, scores = answers("multi-class", 3, 40)
    labels[labels == 2] = 0
    expected = np.mean([sk.roc_auc_score(labels == c, scores[:, c]) for c in (0, 1)])
    assert auc(labels, scores, "multi-class") == pytest.approx(expected)
    assert math.isnan(auc(np.zeros(5, int), scores[:5, :2], "binary"))


def test_balanced_accuracy_is_scikit_learns() -> None:
    labels, scores = answers("multi-class", 4, 50)
    assert balanced_accuracy(labels, scores, "multi-class") == pytest.approx(
        sk.balanced_accuracy_score(labels, scores.argmax(1))
    )


def test_a_label_is_given_above_one_half_and_not_at_it() -> None:
    labels = np.array([[1], [1], [0], [0]])
    scores = np.array([[0.55], [0.45], [0.45], [0.5]])
    assert predicted(scores, "multi-label").tolist() == [[1], [0], [0], [0]]
    assert balanced_accuracy(labels, scores, "multi-label") == 0.75  # 0.5 with a threshold of 0.4 or 0.6, or with >=
    assert predicted(np.hstack([1 - scores, scores]), "binary").tolist() == [1, 0, 0, 0]


def test_calibration_error_of_what_is_known() -> None:
    sure, flat = np.tile([0.0, 1.0], (10, 1)), np.full((10, 2), 0.5)
    assert calibration_error(np.array([1] * 7 + [0] * 3), sure, "binary") == pytest.approx(0.3)
    assert calibration_error(np.ones(10, int), sure, "binary") == 0.0
    assert calibration_error(np.tile([[0], [1]], (5, 2)), flat, "multi-label") == pytest.approx(0.0)
    given = np.array([0.55, 0.55, 0.9, 0.9, 0.9, 0.95, 1.0])  # in three of fifteen bins
    right = np.array([1, 0, 1, 1, 1, 0, 1])
    expected = (2 * abs(0.5 - 0.55) + 3 * abs(1 - 0.9) + 2 * abs(0.5 - 0.975)) / 7
    assert calibration_error(right, np.stack([1 - given, given], axis=1), "binary") == pytest.approx(expected)


def test_the_tally_gives_the_metrics_of_the_whole_split() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    x, y = torch.randn(20, 3, 2, 2), torch.arange(20) % 2
    task = ImageTask()
    whole, parts = task.tally(), task.tally()
    with torch.no_grad():
        whole.add(model, {"images": x, "labels": y})
        for i in range(0, 20, 3):
            parts.add(model, {"images": x[i : i + 3], "labels": y[i : i + 3]})
    one, other = whole.result(), parts.result()
    assert set(one) == {"loss", "auc", "acc", "balanced_accuracy", "images"}
    for name in one:
        assert one[name] == pytest.approx(other[name], abs=1e-6)


def test_losses_of_each_kind() -> None:
    logits, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    assert torch.allclose(image_loss(logits, y), torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
    several = torch.eye(3)[y]
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, several, reduction="none")
    assert torch.allclose(image_loss(logits, several), each.mean(1).sum())
    weights = torch.tensor([2.0, 0, 0, 0, 0])
    assert torch.allclose(image_loss(logits, y, weights), 2 * torch.nn.functional.cross_entropy(logits[:1], y[:1]))
    assert image_loss(logits, several, torch.zeros(5, 3)) == 0


# --- intervals and the report ----------------------------------------------------------------------------------------


def test_figures_of_the_sample_itself_are_scikit_learns() -> None:
    labels, scores = answers("binary", 2, 80)
    y, score = labels == 1, scores[:, 1]
    once = np.ones((1, 80))
    ranked, answered = ranked_figures(y, score, once, 0.9), answer_figures(y, score > 0.5, once)
    assert ranked["auc"][0] == pytest.approx(sk.roc_auc_score(y, score))
    assert ranked["auprc"][0] == pytest.approx(sk.average_precision_score(y, score))
    fpr, tpr, _ = sk.roc_curve(y, score, drop_intermediate=False)
    assert ranked["sensitivity_at_specificity"][0] == pytest.approx(tpr[fpr <= 0.1].max())
    assert answered["sensitivity"][0] == pytest.approx(sk.recall_score(y, score > 0.5))
    assert answered["precision"][0] == pytest.approx(sk.precision_score(y, score > 0.5))
    assert answered["specificity"][0] == pytest.approx(sk.recall_score(~y, score <= 0.5))
    assert answered["f1"][0] == pytest.approx(sk.f1_score(y, score > 0.5))


def test_a_resample_is_the_figure_of_the_images_drawn() -> None:
    labels, scores = answers("binary", 2, 30)
    counts = np.concatenate(list(resamples(5, 30, seed=1)))
    assert counts.shape == (5, 30)
    assert (counts.sum(axis=1) == 30).all()
    values = ranked_figures(labels == 1, scores[:, 1], counts, 0.9)
    for row, value in zip(counts.astype(int), values["auc"], strict=True):
        drawn = np.repeat(np.arange(30), row)
        assert value == pytest.approx(sk.roc_auc_score(labels[drawn], scores[drawn, 1]))


def test_patients_are_drawn_whole() -> None:
    patients = [f"p{i // 3}" for i in range(12)]
    counts = next(iter(resamples(50, 12, seed=0, patients=patients)))
    assert (counts.reshape(50, 4, 3) == counts.reshape(50, 4, 3)[:, :, :1]).all()
    assert counts.max() > 1
    assert interval(np.array([np.nan, np.nan, 1.0])) is None


@pytest.mark.parametrize(("kind", "classes"), [("binary", 2), ("multi-class", 4), ("multi-label", 3), ("ordinal", 3)])
def test_a_report_is_written_with_its_pictures(tmp_path: Path, kind: str, classes: int) -> None:
    labels, scores = answers(kind, classes, 40)
    names = tuple(f"class {i}" for i in range(classes))
    pictures = np.zeros((40, 6, 6), np.uint8)
    judged = Judged(kind=kind, classes=names, labels=labels, scores=scores, images=pictures)  # type: ignore[arg-type]
    figures = write_report(tmp_path, judged, resampled=50)
    assert json.loads((tmp_path / "metrics.json").read_text()) == figures
    assert figures["overall"]["auc"]["value"] == auc(labels, scores, kind)  # type: ignore[arg-type]
    for figure in (figures["overall"]["auc"], figures["overall"]["acc"], figures["overall"]["balanced_accuracy"]):
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["low"] < figure["high"]
    for picture in ("confusion", "roc", "calibration", "mistakes"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert len(rows) == 40
    assert "| class 0 |" in (tmp_path / "report.md").read_text()


def test_strange_class_names_change_nothing(tmp_path: Path) -> None:
    labels, scores = answers("multi-class", 4, 40)
    names = ("$x^$", "a|b", "_hidden", "=1+1\a")
    judged = Judged(kind="multi-class", classes=names, labels=labels, scores=scores)
    write_report(tmp_path, judged, resampled=0)
    assert next(csv.reader((tmp_path / "predictions.csv").open(newline="")))[4:] == list(names)
    assert "| a\\|b |" in (tmp_path / "report.md").read_text()
    figures = report_figures(judged, resampled=0, specificity=0.9, seed=0)
    legend = image_pictures.roc(judged, figures).axes[0].get_legend().get_texts()
    assert [text.get_text().rsplit("  ", 1)[0] for text in legend] == [r"\$x^\$", "a|b", " _hidden", "=1+1�"]


def test_the_worst_mistakes_come_first() -> None:
    judged = Judged(
        kind="binary",
        classes=("a", "b"),
        labels=np.array([0, 0, 1, 1]),
        scores=np.array([[0.4, 0.6], [0.9, 0.1], [0.99, 0.01], [0.2, 0.8]]),
        names=["x/1.png", "x/2.png", "x/3.png", "x/4.png"],
        images=np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((4, 6, 6), np.uint8),
    )
    assert worst_mistakes(judged, 5) == [2, 0]
    assert worst_mistakes(judged, 1) == [2]
    sheet = image_pictures.mistakes(judged)
    assert sheet is not None
    assert [axes.get_title() for axes in sheet.axes] == [
        "3.png\nis b\nsaid a 0.99",
        "1.png\nis a\nsaid b 0.60",
        *[""] * 4,
    ]
    assert [int(np.asarray(axes.images[0].get_array())[0, 0]) for axes in sheet.axes[:2]] == [2, 0]
    several = Judged(
        kind="multi-label",
        classes=("a", "b"),
        labels=np.array([[0, 0], [1, 1], [0, 1]]),
        scores=np.array([[0.6, 0.1], [0.45, 0.02], [0.1, 0.9]]),
        images=np.zeros((3, 6, 6, 3), np.uint8),
    )
    assert worst_mistakes(several, 5) == [1, 0]
    sheet = image_pictures.mistakes(several)
    assert sheet is not None
    titles = [axes.get_title() for axes in sheet.axes[:2]]
    assert titles == ["image 1\nmissed: b\nscore 0.02", "image 0\nfalse alarm: a\nscore 0.60"]


def test_pictures_show_the_figures() -> None:
    labels, scores = np.array([0, 0, 0, 1, 1, 2]), np.eye(3)[[0, 0, 1, 1, 1, 0]] * 0.7 + 0.1
    judged = Judged(kind="multi-class", classes=("a", "b", "c"), labels=labels, scores=scores)
    figures = report_figures(judged, resampled=0, specificity=0.9, seed=0)
    (axes,) = image_pictures.confusion(judged).axes
    cells = [text.get_text() for text in axes.texts]
    assert cells == ["2\n67%", "1\n33%", "0\n0%", "0\n0%", "2\n100%", "0\n0%", "1\n100%", "0\n0%", "0\n0%"]
    assert [text.get_position() for text in axes.texts[:4]] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert [text.get_color() for text in axes.texts[:3]] == ["white", image_pictures.INK, image_pictures.INK]
    assert np.asarray(axes.images[0].get_array())[0] == pytest.approx([2 / 3, 1 / 3, 0])
    (axes,) = image_pictures.roc(judged, figures).axes
    *curves, diagonal, limit = axes.lines
    assert len(curves) == 3
    for i, curve in enumerate(curves):
        fpr, tpr, _ = sk.roc_curve(labels == i, scores[:, i])
        assert np.asarray(curve.get_xydata()).tolist() == np.stack([fpr, tpr], axis=1).tolist()
    assert np.asarray(diagonal.get_xydata()).tolist() == [[0, 0], [1, 1]]
    assert np.asarray(limit.get_xdata()) == pytest.approx([0.1, 0.1])
    above, below = image_pictures.calibration(judged, figures).axes
    diagonal, curve = above.lines
    assert np.asarray(diagonal.get_xydata()).tolist() == [[0, 0], [1, 1]]
    assert np.asarray(curve.get_xydata()).ravel() == pytest.approx([0.8, 4 / 6])
    assert above.get_title() == f"calibration error {0.8 - 4 / 6:.3f}"
    heights = [bar.get_height() for bar in below.patches]
    assert (len(heights), sum(heights), max(heights)) == (15, 6, 6)
    answered = np.array([[0.9, 0.1], [0.8, 0.3], [0, 0.6], [0, 0]])
    several = Judged(kind="multi-label", classes=("a", "b"), labels=np.eye(4, 2, dtype=int), scores=answered)
    cells = [text.get_text() for text in image_pictures.confusion(several).axes[0].texts]
    assert cells[:4] == ["1\n100%", "0\n0%", "1\n33%", "2\n67%"]  # found, missed, false alarm, rightly not
    assert cells[4:] == ["0\n0%", "1\n100%", "1\n33%", "2\n67%"]
    alone = Judged(kind="multi-label", classes=("a",), labels=several.labels[:, :1], scores=answered[:, :1])
    assert [text.get_text() for text in image_pictures.confusion(alone).axes[0].texts] == cells[:4], "one label alone"


def test_a_class_that_does_not_occur_has_no_figures() -> None:
    labels, scores = answers("multi-class", 3, 20)
    labels[labels == 2] = 0
    judged = Judged(kind="multi-class", classes=("a", "b", "c"), labels=labels, scores=scores)
    figures = report_figures(judged, resampled=20, specificity=0.9, seed=0)
    assert figures["classes"]["c"]["images"] == 0
    assert figures["classes"]["c"]["auc"] == {"value": None, "low": None, "high": None}
    with pytest.raises(ValueError, match="between 0 and 1"):
        write_report(Path("/nonexistent"), judged, specificity=1.0)
