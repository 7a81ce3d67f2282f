"""Figures of one class against the rest, for many resamples of the test set at once, and their intervals.

A resample gives each image (or each patient, whose images go together) a count w; every figure here is a function of
the counts:

    TP_k = Σ_{i ≤ k} w_i y_i,  FP_k = Σ_{i ≤ k} w_i (1 − y_i)     images by falling score, k at the end of each tie
    AUC = Σ_k (FPR_k − FPR_{k−1})(TPR_k + TPR_{k−1})/2
    AUPRC = Σ_k (TPR_k − TPR_{k−1}) TP_k/(TP_k + FP_k)

Intervals are the 2.5th and 97.5th percentile (Efron and Tibshirani, 1993).

Shapes: positive (n,) bool, score (n,), counts (resamples, n).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

CHUNK = 1 << 23  # numbers in one (resamples, n) array


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
    rise = np.diff(tpr, axis=1, prepend=0.0)
    return {
        "auc": (np.diff(fpr, axis=1, prepend=0.0) * (tpr - rise / 2)).sum(axis=1),
        "auprc": np.where(np.isnan(fpr[:, -1]), np.nan, (rise * precision).sum(axis=1)),
        "sensitivity_at_specificity": np.where(
            np.isnan(tpr[:, -1]) | np.isnan(fpr[:, -1]),
            np.nan,
            np.where(fpr <= 1 - specificity + 1e-12, tpr, 0.0).max(axis=1),
        ),
    }


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
