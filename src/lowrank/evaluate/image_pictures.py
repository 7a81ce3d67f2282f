"""The pictures of a report on images: confusion matrix, ROC curves, calibration, the worst mistakes (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lowrank.evaluate.image_metrics import answers_given, one_hot, predicted
from lowrank.evaluate.image_report import Judged, label_text, worst_mistakes

MISTAKES, COLUMNS = 24, 6
MOST_CURVES = 14
INK, BLUE, ORANGE = "#222222", "#2f6fb2", "#d1662b"


def write(folder: Path, judged: Judged, figures: Mapping[str, Any]) -> None:
    """Write the four pictures; without mistakes, or without images to show, there is no sheet of them."""
    confusion(judged).savefig(folder / "confusion.png", dpi=150)
    roc(judged, figures).savefig(folder / "roc.png", dpi=150)
    calibration(judged, figures).savefig(folder / "calibration.png", dpi=150)
    sheet = mistakes(judged)
    if sheet is not None:
        sheet.savefig(folder / "mistakes.png", dpi=150)
    else:
        (folder / "mistakes.png").unlink(missing_ok=True)


def confusion(judged: Judged) -> Figure:
    """Rows are the truth, columns the answers; for several labels, right and wrong answers of each label."""
    wanted = one_hot(judged.labels, len(judged.classes))
    answers = one_hot(predicted(judged.scores, judged.kind), len(judged.classes))
    if judged.kind == "multi-label":
        parts = (wanted & answers, wanted & ~answers, ~wanted & answers, ~wanted & ~answers)
        counts = np.stack([part.sum(axis=0) for part in parts], axis=1)
        shares = counts / np.maximum(np.stack([wanted.sum(axis=0)] * 2 + [(~wanted).sum(axis=0)] * 2, axis=1), 1)
        columns = ["found", "missed", "false alarm", "rightly not"]
    else:
        counts = wanted.astype(np.int64).T @ answers.astype(np.int64)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        columns = [_short(name) for name in judged.classes]
    rows = [_short(name) for name in judged.classes]
    figure = Figure(figsize=(2.6 + 0.75 * len(columns), 1.9 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i in range(counts.shape[0]):
        for j in range(counts.shape[1]):
            colour = "white" if shares[i, j] > 0.55 else INK
            axes.text(j, i, f"{counts[i, j]:,}\n{shares[i, j]:.0%}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(
        range(len(columns)), columns, rotation=30 if max(map(len, columns)) > 6 else 0, ha="center", fontsize=8
    )
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    axes.set_title(f"{len(judged.labels):,} images, share of each row", fontsize=9)
    return figure


def roc(judged: Judged, figures: Mapping[str, Any]) -> Figure:
    """Sensitivity over 1 − specificity, one curve a class (binary: the second class)."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    wanted = one_hot(judged.labels, len(judged.classes))
    shown = [1] if judged.kind == "binary" else list(range(len(judged.classes)))
    shown = [i for i in shown if wanted[:, i].any() and not wanted[:, i].all()]
    for i in shown[:MOST_CURVES]:
        fpr, tpr = _curve(wanted[:, i], judged.scores[:, i])
        auc = figures["classes"][judged.classes[i]]["auc"]
        between = "" if auc["low"] is None else f" ({auc['low']:.3f}–{auc['high']:.3f})"
        axes.plot(fpr, tpr, linewidth=1.6, label=f"{_short(judged.classes[i])}  {auc['value']:.3f}{between}")
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, linestyle="--")
    axes.axvline(1 - figures["specificity"], color="#bbbbbb", linewidth=0.8, linestyle=":")
    axes.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    if shown:
        axes.legend(fontsize=7.5, loc="lower right", title="AUC (95 % interval)", title_fontsize=8)
    rest = len(shown) - MOST_CURVES
    axes.set_title("ROC" + (f" ({rest} more classes in metrics.json)" if rest > 0 else ""), fontsize=9)
    return figure


def calibration(judged: Judged, figures: Mapping[str, Any], bins: int = 15) -> Figure:
    """How often answers of a confidence are right, and how many there are."""
    confidence, right = answers_given(judged.labels, judged.scores, judged.kind)
    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    used = np.unique(which)
    means = [confidence[which == b].mean() for b in used]
    above.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, linestyle="--")
    above.plot(means, [right[which == b].mean() for b in used], "o-", color=BLUE, markersize=4)
    above.set(ylabel="share of right answers", ylim=(-0.02, 1.02))
    error = figures["overall"]["calibration_error"]["value"]
    above.set_title(f"calibration error {error:.3f}", fontsize=9)
    below.hist(confidence, bins=bins, range=(0, 1), color=ORANGE)
    below.set(xlabel="confidence of the answer", ylabel="answers", xlim=(0, 1))
    return figure


def mistakes(judged: Judged) -> Figure | None:
    """The surest wrong answers, the worst first; None where there are none or no images."""
    worst = worst_mistakes(judged, MISTAKES)
    if not worst or judged.images is None:
        return None
    rows = -(-len(worst) // COLUMNS)
    figure = Figure(figsize=(1.75 * COLUMNS, 2.2 * rows + 0.3), layout="constrained")
    figure.suptitle("surest wrong answers", fontsize=10)
    for place, axes in enumerate(figure.subplots(rows, COLUMNS, squeeze=False).flat):
        axes.set_axis_off()
        if place < len(worst):
            i = worst[place]
            axes.imshow(np.asarray(judged.images[i]), cmap="gray", vmin=0, vmax=255)
            axes.set_title(_caption(judged, i), fontsize=6.5)
    return figure


def _caption(judged: Judged, i: int) -> str:
    answer = predicted(judged.scores[i : i + 1], judged.kind)[0]
    name = Path(str(judged.names[i])).name if len(judged.names) else f"image {i}"
    if judged.kind == "multi-label":
        wrong = np.flatnonzero(answer != judged.labels[i])
        worst = max(wrong, key=lambda c: abs(judged.scores[i, c] - 0.5))
        what = "false alarm" if answer[worst] else "missed"
        return f"{_short(name, 22)}\n{what}: {_short(judged.classes[worst])}\nscore {judged.scores[i, worst]:.2f}"
    truth, said = label_text(judged, judged.labels[i]), label_text(judged, answer)
    return f"{_short(name, 22)}\nis {_short(truth)}\nsaid {_short(said)} {judged.scores[i].max():.2f}"


def _curve(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    y = positive[order]
    return (
        np.append(0.0, np.cumsum(~y)[ends] / max(1, (~y).sum())),
        np.append(0.0, np.cumsum(y)[ends] / max(1, y.sum())),
    )


def _short(name: str, width: int = 20) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
