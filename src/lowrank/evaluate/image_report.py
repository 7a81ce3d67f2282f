"""The report of a run's final test on images: figures by class with intervals, curves and the worst mistakes.

:func:`write_report` fills a folder beside the run's checkpoints:

    metrics.json      every figure, overall and by class, with its 95 % bootstrap interval (patients are resampled whole
                      where they are known)
    report.html       one page with tables and pictures, and in sentences what is plainly wrong
    report.md         the same as tables
    predictions.csv   every image with its labels, answer and scores
    confusion.png  roc.png  calibration.png  mistakes.png

A resample gives each image (or each patient, whose images go together) a count w. Figures are functions of the counts,
so that all resamples are computed at once; scikit-learn's metrics, which give the same values, take one at a time:

    TP_k = Σ_{i ≤ k} w_i y_i,  FP_k = Σ_{i ≤ k} w_i (1 − y_i)     images by falling score, k at the end of each tie
    AUC = Σ_k (FPR_k − FPR_{k−1})(TPR_k + TPR_{k−1})/2
    AUPRC = Σ_k (TPR_k − TPR_{k−1}) TP_k/(TP_k + FP_k)

Intervals are the 2.5th and 97.5th percentile (Efron and Tibshirani, 1993). Sensitivity at a fixed specificity takes its
threshold from the very images that are judged: it describes the curve, and is no promise for one threshold elsewhere.

Shapes: positive and answer (n,) bool, score (n,), counts (resamples, n).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank.data.images.set import Kind
from lowrank.evaluate.collected_answers import defined_mean
from lowrank.evaluate.image_findings import findings
from lowrank.evaluate.image_metrics import calibration_error, image_metrics, one_hot, predicted
from lowrank.evaluate.image_page import class_table, figure_text, write_markdown, write_page
from lowrank.infra.files import write_csv, write_json

if TYPE_CHECKING:
    from lowrank.data.images.source import ImageData
    from lowrank.evaluate.image_task import ImageTally

RESAMPLES, SPECIFICITY = 1000, 0.9
CHUNK = 1 << 23  # numbers in one (resamples, n) array
Figure = dict[str, Any]  # {"value": float or None, "low": …, "high": …}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A split with a model's predictions.

    ``labels`` (n,) or (n, classes); ``scores`` (n, classes) probabilities; ``images`` (n, h, w[, 3]) uint8, for the
    sheet of mistakes (of volumes, (n, d, h, w), their middle slices); ``names`` and ``patients`` may be empty.
    """

    kind: Kind
    classes: tuple[str, ...]
    labels: np.ndarray
    scores: np.ndarray
    images: Any = None
    names: Sequence[str] = ()
    patients: Sequence[str] = ()


def report(data: ImageData, tally: ImageTally, folder: Path, split: str) -> list[str]:
    """Write what a run's best checkpoint made of ``split`` to ``folder/clinic``; gives what is worth saying of it."""
    part = data.set.splits[split]
    judged = Judged(
        kind=data.kind,
        classes=data.classes,
        labels=tally.labels,
        scores=tally.scores,
        images=part.images,
        names=part.names,
        patients=part.patients,
    )
    write_report(folder / "clinic", judged)
    return [f"report: {folder / 'clinic' / 'report.html'}", *findings(judged)]


def write_report(
    folder: Path, judged: Judged, *, resampled: int = RESAMPLES, specificity: float = SPECIFICITY
) -> dict[str, Any]:
    """Write the report into ``folder`` and return its figures (the content of ``metrics.json``).

    Args:
        folder: made where it is missing; files of an earlier report are replaced.
        judged: labels and scores.
        resampled: bootstrap resamples; 0 leaves the intervals out.
        specificity: at which the sensitivity is given.
    """
    if not 0 < specificity < 1:
        raise ValueError(f"specificity={specificity} must lie between 0 and 1")
    folder.mkdir(parents=True, exist_ok=True)
    figures = report_figures(judged, resampled=resampled, specificity=specificity, seed=0)
    write_json(folder / "metrics.json", figures)
    overall = {name.replace("_", " "): figure_text(figure) for name, figure in figures["overall"].items()}
    shown = {
        **{"auc": "AUC", "auprc": "AUPRC", "sensitivity": "sensitivity", "specificity": "specificity"},
        **{"precision": "precision", "npv": "NPV", "f1": "F1"},
        "sensitivity_at_specificity": f"sensitivity at {specificity:.0%} specificity",
    }
    table = class_table(figures, shown)
    write_markdown(folder, figures, overall, table)
    _write_predictions(folder / "predictions.csv", judged)
    try:
        from lowrank.evaluate import image_pictures
    except ImportError:
        return figures  # the pictures need matplotlib, the figures do not
    image_pictures.write(folder, judged, figures)
    write_page(folder, figures, overall, table)
    return figures


# --- figures ---------------------------------------------------------------------------------------------------------


def report_figures(judged: Judged, *, resampled: int, specificity: float, seed: int) -> dict[str, Any]:
    """All figures: ``overall`` and ``classes`` (by name), each with its interval."""
    labels, scores, kind = judged.labels, judged.scores, judged.kind
    wanted, answers = one_hot(labels, scores.shape[1]), one_hot(predicted(scores, kind), scores.shape[1])
    right = (wanted == answers).mean(axis=1) if kind == "multi-label" else (wanted & answers).any(axis=1)
    parts: list[list[dict[str, np.ndarray]]] = [[] for _ in judged.classes]
    accuracies: list[np.ndarray] = []
    for counts in chain([np.ones((1, len(labels)))], resamples(resampled, len(labels), seed, judged.patients)):
        accuracies.append(counts @ right / counts.sum(axis=1))
        for i, part in enumerate(parts):
            ranked = ranked_figures(wanted[:, i], scores[:, i], counts, specificity)
            part.append(ranked | answer_figures(wanted[:, i], answers[:, i], counts))
    classes = [{name: np.concatenate([each[name] for each in part]) for name in part[0]} for part in parts]
    halves = ("sensitivity", "specificity") if kind == "multi-label" else ("sensitivity",)
    overall = {
        "auc": defined_mean([figures["auc"] for figures in (classes[1:2] if kind == "binary" else classes)]),
        "acc": np.concatenate(accuracies),
        "balanced_accuracy": defined_mean([defined_mean([each[name] for name in halves]) for each in classes]),
    }
    exact = image_metrics(labels, scores, kind) | {"calibration_error": calibration_error(labels, scores, kind)}
    return {
        "kind": kind,
        "findings": findings(judged),
        "images": len(labels),
        "patients": len(set(judged.patients)) or None,
        "resamples": resampled,
        "resampled": "patients" if len(judged.patients) else "images",
        "specificity": specificity,
        "overall": {name: figure_of(value, overall.get(name, np.empty(0))[1:]) for name, value in exact.items()},
        "classes": {
            name: {
                "images": int(wanted[:, i].sum()),
                **{key: figure_of(values[0], values[1:]) for key, values in classes[i].items()},
            }
            for i, name in enumerate(judged.classes)
        },
    }


def resamples(count: int, n: int, seed: int, patients: Sequence[str] = ()) -> Iterator[np.ndarray]:
    """Chunks (some, n) of ``count`` resamples with replacement, of images or of whole patients."""
    noise = np.random.default_rng(seed)
    owner = np.unique(np.asarray(patients), return_inverse=True)[1] if len(patients) else np.arange(n)
    units = int(owner.max()) + 1
    step = max(1, CHUNK // n)
    for start in range(0, count, step):
        rows = min(step, count - start)
        drawn = noise.integers(0, units, size=(rows, units))
        drawn += units * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
        yield counts[:, owner].astype(np.float64)


def ranked_figures(
    positive: np.ndarray, score: np.ndarray, counts: np.ndarray, specificity: float
) -> dict[str, np.ndarray]:
    """``auc``, ``auprc`` and ``sensitivity_at_specificity`` (resamples,); NaN where a resample has one kind only."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    weights, y = counts[:, order], positive[order].astype(np.float64)
    tp, fp = np.cumsum(weights * y, axis=1)[:, ends], np.cumsum(weights * (1 - y), axis=1)[:, ends]
    with np.errstate(invalid="ignore", divide="ignore"):
        tpr, fpr = tp / tp[:, -1:], fp / fp[:, -1:]
        precision = np.where(tp + fp > 0, tp / (tp + fp), 0.0)
    rise, defined = np.diff(tpr, axis=1, prepend=0.0), ~np.isnan(tpr[:, -1]) & ~np.isnan(fpr[:, -1])
    figures = {
        "auc": (np.diff(fpr, axis=1, prepend=0.0) * (tpr - rise / 2)).sum(axis=1),
        "auprc": (rise * precision).sum(axis=1),
        "sensitivity_at_specificity": np.where(fpr <= 1 - specificity + 1e-12, tpr, 0.0).max(axis=1),
    }
    return {name: np.where(defined, values, np.nan) for name, values in figures.items()}


def answer_figures(positive: np.ndarray, answer: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """``sensitivity``, ``specificity``, ``precision``, ``npv``, ``f1`` of the answers, (resamples,); NaN: undefined."""
    tp, fn = counts @ (positive & answer), counts @ (positive & ~answer)
    fp, tn = counts @ (~positive & answer), counts @ (~positive & ~answer)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "sensitivity": tp / (tp + fn),
            "specificity": tn / (tn + fp),
            "precision": tp / (tp + fp),
            "npv": tn / (tn + fn),
            "f1": 2 * tp / (2 * tp + fp + fn),
        }


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval of resampled values; None where fewer than half of them are defined."""
    defined = values[np.isfinite(values)]
    if len(defined) * 2 < len(values) or not len(defined):
        return None
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)


def worst_mistakes(judged: Judged, count: int) -> list[int]:
    """The images with the surest wrong answers, the surest first."""
    wrong = predicted(judged.scores, judged.kind) != judged.labels
    if judged.kind == "multi-label":
        sureness = np.where(wrong, np.abs(judged.scores - 0.5), -1.0).max(axis=1)
    else:
        sureness = np.where(wrong, judged.scores.max(axis=1), -1.0)
    order = np.argsort(-sureness, kind="stable")
    return [int(i) for i in order[:count] if sureness[i] >= 0]


def figure_of(value: float, drawn: np.ndarray) -> Figure:
    """A figure with the interval of its resampled values."""
    low, high = interval(drawn) or (None, None)
    return {"value": float(value) if math.isfinite(value) else None, "low": low, "high": high}


# --- files -----------------------------------------------------------------------------------------------------------


def _write_predictions(path: Path, judged: Judged) -> None:
    answers, rows = predicted(judged.scores, judged.kind), []
    for i, row in enumerate(judged.scores):
        name = judged.names[i] if len(judged.names) else i
        patient = judged.patients[i] if len(judged.patients) else ""
        texts = label_text(judged, judged.labels[i]), label_text(judged, answers[i])
        rows.append([name, patient, *texts, *(f"{score:.6g}" for score in row)])
    write_csv(path, ["image", "patient", "true", "answer", *judged.classes], rows)


def label_text(judged: Judged, label: Any) -> str:
    """A class by name, or several joined by |."""
    if judged.kind != "multi-label":
        return judged.classes[int(label)]
    return "|".join(name for name, has in zip(judged.classes, label, strict=True) if has)
