"""The report on an image classifier: figures by class with intervals, curves, calibration and the worst mistakes.

:func:`write_report` fills a folder beside a run:

    metrics.json      every figure, overall and by class, with its 95 % bootstrap interval (patients are resampled whole
                      where they are known)
    report.md         the same as tables
    predictions.csv   every image with its labels, answer and scores
    confusion.png  roc.png  calibration.png  mistakes.png

Sensitivity at a fixed specificity takes its threshold from the very images that are judged: it describes the curve, and
is no promise for one threshold elsewhere.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.data.images.set import Kind
from lowrank.evaluate.bootstrap import answer_figures, interval, ranked_figures, resamples
from lowrank.evaluate.image_metrics import calibration_error, image_metrics, one_hot, predicted

RESAMPLES, SPECIFICITY = 1000, 0.9
Figure = dict[str, Any]  # {"value": float or None, "low": …, "high": …}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A split with a model's predictions.

    ``labels`` (n,) or (n, classes); ``scores`` (n, classes) probabilities; ``images`` (n, h, w[, 3]) uint8, for the
    sheet of mistakes; ``names`` and ``patients`` may be empty.
    """

    kind: Kind
    classes: tuple[str, ...]
    labels: np.ndarray
    scores: np.ndarray
    images: Any = None
    names: Sequence[str] = ()
    patients: Sequence[str] = ()


def write_report(
    folder: Path, judged: Judged, *, resampled: int = RESAMPLES, specificity: float = SPECIFICITY, seed: int = 0
) -> dict[str, Any]:
    """Write the report into ``folder`` and return its figures (the content of ``metrics.json``).

    Args:
        folder: made where it is missing; files of an earlier report are replaced.
        judged: labels and scores.
        resampled: bootstrap resamples; 0 leaves the intervals out.
        specificity: at which the sensitivity is given.
        seed: of the resamples.
    """
    if not 0 < specificity < 1:
        raise ValueError(f"specificity={specificity} must lie between 0 and 1")
    folder.mkdir(parents=True, exist_ok=True)
    figures = report_figures(judged, resampled=resampled, specificity=specificity, seed=seed)
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    (folder / "report.md").write_text(_markdown(figures))
    _write_predictions(folder / "predictions.csv", judged)
    try:
        from lowrank.evaluate import image_pictures
    except ImportError:
        return figures  # the pictures need matplotlib, the figures do not
    image_pictures.write(folder, judged, figures)
    return figures


def report_figures(judged: Judged, *, resampled: int, specificity: float, seed: int) -> dict[str, Any]:
    """All figures: ``overall`` and ``classes`` (by name), each with its interval."""
    labels, scores, kind = judged.labels, judged.scores, judged.kind
    wanted, answers = one_hot(labels, scores.shape[1]), one_hot(predicted(scores, kind), scores.shape[1])
    draws: list[dict[str, np.ndarray]] = [{} for _ in judged.classes]
    balanced: list[np.ndarray] = []
    right: list[np.ndarray] = []
    for counts in resamples(resampled, len(labels), seed, judged.patients):
        for i, drawn in enumerate(draws):
            for name, values in _class_figures(wanted[:, i], scores[:, i], answers[:, i], counts, specificity).items():
                drawn[name] = np.append(drawn.get(name, []), values)
        right.append(
            counts @ (wanted == answers).mean(axis=1) / counts.sum(axis=1)
            if kind == "multi-label"
            else counts @ (wanted & answers).any(axis=1) / counts.sum(axis=1)
        )
        balanced.append(_balanced(draws, kind, len(counts)))
    whole = np.ones((1, len(labels)))
    points = [
        _class_figures(wanted[:, i], scores[:, i], answers[:, i], whole, specificity)
        for i in range(len(judged.classes))
    ]
    counted = range(1, 2) if kind == "binary" else range(len(judged.classes))
    overall = image_metrics(labels, scores, kind)
    drawn_overall = {
        "auc": _mean([draws[i].get("auc", np.empty(0)) for i in counted]),
        "acc": np.concatenate(right) if right else np.empty(0),
        "balanced_accuracy": np.concatenate(balanced) if balanced else np.empty(0),
    }
    return {
        "kind": kind,
        "images": len(labels),
        "patients": len(set(judged.patients)) or None,
        "resamples": resampled,
        "resampled": "patients" if len(judged.patients) else "images",
        "specificity": specificity,
        "overall": {
            **{name: _figure(value, drawn_overall[name]) for name, value in overall.items()},
            "calibration_error": _figure(calibration_error(labels, scores, kind), np.empty(0)),
        },
        "classes": {
            name: {
                "images": int(wanted[:, i].sum()),
                **{key: _figure(float(values[0]), draws[i].get(key, np.empty(0))) for key, values in points[i].items()},
            }
            for i, name in enumerate(judged.classes)
        },
    }


def worst_mistakes(judged: Judged, count: int) -> list[int]:
    """The images with the surest wrong answers, the surest first."""
    answers = predicted(judged.scores, judged.kind)
    if judged.kind == "multi-label":
        wrong = answers != judged.labels
        sureness = np.where(wrong, np.abs(judged.scores - 0.5), -1.0).max(axis=1)
    else:
        sureness = np.where(answers != judged.labels, judged.scores.max(axis=1), -1.0)
    order = np.argsort(-sureness, kind="stable")
    return [int(i) for i in order[:count] if sureness[i] >= 0]


def _class_figures(
    positive: np.ndarray, score: np.ndarray, answer: np.ndarray, counts: np.ndarray, specificity: float
) -> dict[str, np.ndarray]:
    return ranked_figures(positive, score, counts, specificity) | answer_figures(positive, answer, counts)


def _balanced(draws: list[dict[str, np.ndarray]], kind: Kind, rows: int) -> np.ndarray:
    """Balanced accuracy of the last ``rows`` resamples, (rows,), from the classes' sensitivities.

    With several labels, from their specificities too.
    """
    parts = [drawn["sensitivity"][-rows:] for drawn in draws]
    if kind == "multi-label":
        parts = [_mean([drawn["sensitivity"][-rows:], drawn["specificity"][-rows:]]) for drawn in draws]
    return _mean(parts)


def _mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over the values that are defined (not NaN)."""
    stacked = np.stack(list(parts))
    defined = np.isfinite(stacked)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(defined, stacked, 0.0).sum(axis=0) / defined.sum(axis=0)
    return mean


def _figure(value: float, drawn: np.ndarray) -> Figure:
    between = interval(drawn) if len(drawn) else None
    low, high = between if between else (None, None)
    return {"value": value if math.isfinite(value) else None, "low": low, "high": high}


# --- files -----------------------------------------------------------------------------------------------------------


def _write_predictions(path: Path, judged: Judged) -> None:
    answers = predicted(judged.scores, judged.kind)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "patient", "true", "answer", *judged.classes])
        for i, row in enumerate(judged.scores):
            name = judged.names[i] if len(judged.names) else i
            patient = judged.patients[i] if len(judged.patients) else ""
            texts = label_text(judged, judged.labels[i]), label_text(judged, answers[i])
            writer.writerow([name, patient, *texts, *(f"{score:.6g}" for score in row)])


def label_text(judged: Judged, label: Any) -> str:
    """A class by name, or several joined by |."""
    if judged.kind != "multi-label":
        return judged.classes[int(label)]
    return "|".join(name for name, has in zip(judged.classes, label, strict=True) if has)


def _markdown(figures: Mapping[str, Any]) -> str:
    percent = f"{figures['specificity']:.0%}"
    shown = {
        "auc": "AUC",
        "auprc": "AUPRC",
        "sensitivity": "sensitivity",
        "specificity": "specificity",
        "precision": "precision",
        "npv": "NPV",
        "f1": "F1",
        "sensitivity_at_specificity": f"sensitivity at {percent} specificity",
    }
    lines = [f"# {figures['images']:,} images, {figures['kind']}", ""]
    for name, figure in figures["overall"].items():
        lines.append(f"* {name.replace('_', ' ')}: {_text(figure)}")
    lines += ["", f"| class | images | {' | '.join(shown.values())} |", "|---|---|" + "---|" * len(shown)]
    for name, row in figures["classes"].items():
        lines.append(f"| {name} | {row['images']:,} | {' | '.join(_text(row[key]) for key in shown)} |")
    if figures["resamples"]:
        of = figures["resampled"]
        lines += ["", f"In brackets the 95 % bootstrap interval over {figures['resamples']:,} resamples of the {of}."]
    return "\n".join(lines) + "\n"


def _text(figure: Figure) -> str:
    if figure["value"] is None:
        return "–"
    between = "" if figure["low"] is None else f" ({figure['low']:.3f}–{figure['high']:.3f})"
    return f"{figure['value']:.3f}{between}"
