"""Figures of an image classifier, from labels and scores alone.

AUC and ACC are MedMNIST's own (``medmnist.Evaluator``), to the last digit:

    binary        AUC and ACC of the last column, ACC at a threshold of 0.5
    multi-label   the mean of the labels' AUCs, and of their ACCs at 0.5
    else          the mean of the classes' one-against-the-rest AUCs; ACC of the largest score (ordinal too)

One deviation: a class of which a split has no example, or nothing else, has no AUC. MedMNIST gives NaN; here the mean
is over the classes that have one, and NaN only if none has. AUC and recall are scikit-learn's; accuracy and the means
are written out, because MedMNIST's last digit depends on the order of its sums; scikit-learn has no calibration error.

Shapes: labels (n,) int, or (n, classes) of zeros and ones; scores (n, classes), probabilities.
"""

from __future__ import annotations

import math

import numpy as np

from lowrank.data.images.set import Kind

BINS = 15  # of confidence


def image_metrics(labels: np.ndarray, scores: np.ndarray, kind: Kind) -> dict[str, float]:
    """``auc``, ``acc`` and ``balanced_accuracy`` (the mean of the classes' sensitivities)."""
    return {
        "auc": auc(labels, scores, kind),
        "acc": accuracy(labels, scores, kind),
        "balanced_accuracy": balanced_accuracy(labels, scores, kind),
    }


def auc(labels: np.ndarray, scores: np.ndarray, kind: Kind) -> float:
    """Area under the ROC curve, as MedMNIST averages it."""
    if kind == "binary":
        return class_auc(labels == 1, scores[:, -1])
    wanted = one_hot(labels, scores.shape[1])
    values = [class_auc(wanted[:, i], scores[:, i]) for i in range(scores.shape[1])]
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def class_auc(positive: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve of one class against the rest; NaN where there is only one of the two."""
    from sklearn.metrics import roc_auc_score

    if positive.all() or not positive.any():
        return math.nan
    return float(roc_auc_score(positive.astype(float), score))


def accuracy(labels: np.ndarray, scores: np.ndarray, kind: Kind) -> float:
    """The share of right answers."""
    if kind == "multi-label":
        return (
            sum(float(np.mean(labels[:, i] == (scores[:, i] > 0.5))) for i in range(scores.shape[1])) / scores.shape[1]
        )
    return float(np.mean(labels == predicted(scores, kind)))


def balanced_accuracy(labels: np.ndarray, scores: np.ndarray, kind: Kind) -> float:
    """The mean sensitivity over the classes that occur; of several labels, the mean of their balanced accuracies."""
    answers = predicted(scores, kind)
    if kind == "multi-label":
        return float(np.mean([_mean_recall(labels[:, i], answers[:, i]) for i in range(scores.shape[1])]))
    return _mean_recall(labels, answers)


def predicted(scores: np.ndarray, kind: Kind) -> np.ndarray:
    """The answers: (n,) classes, or (n, classes) of zeros and ones."""
    if kind == "multi-label":
        return (scores > 0.5).astype(np.int64)
    if kind == "binary":
        return (scores[:, -1] > 0.5).astype(np.int64)
    return scores.argmax(axis=1)


def calibration_error(labels: np.ndarray, scores: np.ndarray, kind: Kind) -> float:
    """Expected calibration error (Guo et al., arXiv 1706.04599): the weighted mean of |accuracy − confidence|.

    The mean is over bins of confidence of equal width, weighted by their counts; for several labels, over all answers,
    confidence being the probability of the answer given.
    """
    confidence, right = answers_given(labels, scores, kind)
    which = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [
        abs(right[which == b].mean() - confidence[which == b].mean()) * (which == b).mean() for b in np.unique(which)
    ]
    return float(sum(gaps))


def answers_given(labels: np.ndarray, scores: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """(the probability of each answer given, whether it was right), flat."""
    if kind == "multi-label":
        chosen = predicted(scores, kind)
        return np.where(chosen > 0, scores, 1 - scores).ravel(), (chosen == labels).ravel().astype(float)
    return scores.max(axis=1), (predicted(scores, kind) == labels).astype(float)


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """(n, classes) booleans: which classes each image has."""
    return labels.astype(bool) if labels.ndim == 2 else labels[:, None] == np.arange(classes)


def _mean_recall(labels: np.ndarray, answers: np.ndarray) -> float:
    from sklearn.metrics import recall_score

    return float(recall_score(labels, answers, labels=np.unique(labels), average="macro"))
