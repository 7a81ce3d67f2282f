"""The pictures of a report on images: confusion matrix, ROC curves, calibration, the worst mistakes (matplotlib).

Curves are scikit-learn's displays. The matrix is ours: theirs is square and has one number a cell, and here a cell says
count and share, and several labels have four columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lowrank.evaluate.image_metrics import BINS, answers_given, one_hot, predicted
from lowrank.evaluate.image_page import figure_text
from lowrank.evaluate.image_report import Judged, label_text, worst_mistakes

MISTAKES, COLUMNS = 24, 6
MOST_CURVES = 14
INK, BLUE, ORANGE, GREY = "#222222", "#2f6fb2", "#d1662b", "#bbbbbb"


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
    from sklearn.metrics import confusion_matrix

    answers, rows = predicted(judged.scores, judged.kind), [_short(name) for name in judged.classes]
    if judged.kind == "multi-label":
        has, said = judged.labels.astype(bool), answers.astype(bool)  # scikit-learn takes one label for two classes
        counts = np.stack([(each & other).sum(axis=0) for each in (has, ~has) for other in (said, ~said)], axis=1)
        totals = np.repeat(counts.reshape(-1, 2, 2).sum(axis=2), 2, axis=1)
        columns = ["found", "missed", "false alarm", "rightly not"]
    else:
        counts = confusion_matrix(judged.labels, answers, labels=range(len(rows)))
        totals, columns = counts.sum(axis=1, keepdims=True), rows
    shares = counts / np.maximum(totals, 1)
    figure = Figure(figsize=(2.6 + 0.75 * len(columns), 1.9 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), count in np.ndenumerate(counts):
        colour = "white" if shares[i, j] > 0.55 else INK
        axes.text(j, i, f"{count:,}\n{shares[i, j]:.0%}", ha="center", va="center", color=colour, fontsize=8)
    tilt = 30 if max(map(len, columns)) > 6 else 0
    axes.set_xticks(range(len(columns)), columns, rotation=tilt, ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set(xlabel="answer", ylabel="truth")
    axes.set_title(f"{len(judged.labels):,} images, share of each row", fontsize=9)
    return figure


def roc(judged: Judged, figures: Mapping[str, Any]) -> Figure:
    """Sensitivity over 1 − specificity, one curve a class (binary: the second class)."""
    from sklearn.metrics import RocCurveDisplay

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    wanted = one_hot(judged.labels, len(judged.classes))
    shown = [1] if judged.kind == "binary" else list(range(len(judged.classes)))
    shown = [i for i in shown if wanted[:, i].any() and not wanted[:, i].all()]
    for i in shown[:MOST_CURVES]:
        text = f"{_short(judged.classes[i])}  {figure_text(figures['classes'][judged.classes[i]]['auc'])}"
        shown_curve = RocCurveDisplay.from_predictions(wanted[:, i], judged.scores[:, i], ax=axes)
        shown_curve.line_.set(linewidth=1.6, label=text)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
    axes.axvline(1 - figures["specificity"], color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="1 − specificity", ylabel="sensitivity", aspect="auto")
    if shown:
        axes.legend(fontsize=7.5, loc="lower right", title="AUC (95 % interval)", title_fontsize=8)
    rest = len(shown) - MOST_CURVES
    axes.set_title("ROC" + (f" ({rest} more classes in metrics.json)" if rest > 0 else ""), fontsize=9)
    return figure


def calibration(judged: Judged, figures: Mapping[str, Any]) -> Figure:
    """How often answers of a confidence are right, and how many there are."""
    from sklearn.calibration import CalibrationDisplay

    confidence, right = answers_given(judged.labels, judged.scores, judged.kind)
    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
    look: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 4}
    CalibrationDisplay.from_predictions(
        right, confidence.clip(0, 1), n_bins=BINS, pos_label=1, ref_line=False, ax=above, **look
    )
    above.get_legend().remove()
    error = figures["overall"]["calibration_error"]["value"]
    above.set(xlabel="", ylabel="share of right answers", ylim=(-0.02, 1.02))
    above.set_title(f"calibration error {error:.3f}", fontsize=9)
    below.hist(confidence, bins=BINS, range=(0, 1), color=ORANGE)
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
            picture = np.asarray(judged.images[i])
            if picture.ndim == 3 and picture.shape[2] != 3:  # a volume
                picture = picture[len(picture) // 2]
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axes.set_title(_caption(judged, i), fontsize=6.5)
    return figure


def _caption(judged: Judged, i: int) -> str:
    answer = predicted(judged.scores[i : i + 1], judged.kind)[0]
    name = _short(Path(str(judged.names[i])).name if len(judged.names) else f"image {i}", 22)
    if judged.kind == "multi-label":
        wrong = np.flatnonzero(answer != judged.labels[i])
        worst = max(wrong, key=lambda c: abs(judged.scores[i, c] - 0.5))
        what = "false alarm" if answer[worst] else "missed"
        return f"{name}\n{what}: {_short(judged.classes[worst])}\nscore {judged.scores[i, worst]:.2f}"
    truth, said = label_text(judged, judged.labels[i]), label_text(judged, answer)
    return f"{name}\nis {_short(truth)}\nsaid {_short(said)} {judged.scores[i].max():.2f}"


def _short(name: str, width: int = 20) -> str:
    """A name as it stands, at most so long: no formula between $, no unprintable sign, nothing a legend would hide."""
    short = name if len(name) <= width else name[: width - 1] + "…"
    plain = "".join(sign if sign.isprintable() else "�" for sign in short).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain
