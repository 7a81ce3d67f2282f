"""The task of giving a sequence a class or a score, as GLUE's: cross-entropy, or the squared error of the score.

``score`` decides which checkpoint is best: Matthews' correlation of the classes, as CoLA reports; for scores the mean
of Pearson's and Spearman's, as STS-B does. Accuracy and F1 (of class 1 of two; else the mean over the classes) stand
beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.infra.registry import register
from lowrank.run.task import Batch


@register("task", "sequences")
class SequenceTask:
    """Classes or scores of sequences; which of the two is taken from the labels of the batches."""

    unit, metric, lower = "sequences", "score", False
    shown: tuple[str, ...] = ("score", "accuracy", "f1")
    judged: bool = True

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])

    def size(self, batch: Batch) -> int:
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return sequence_loss(_outputs(model, batch), batch["labels"])

    def tally(self) -> SequenceTally:
        return SequenceTally()

    def report(self, data: Any, tally: SequenceTally, folder: Path, split: str) -> list[str]:
        return []


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    """(batch, outputs) float32."""
    out: Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return out.float()


def sequence_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Summed over the sequences: cross-entropy in nats, or (output − score)²."""
    if labels.is_floating_point():
        return F.mse_loss(outputs.squeeze(-1), labels, reduction="sum")
    return F.cross_entropy(outputs, labels, reduction="sum")


class SequenceTally:
    """Collects outputs and labels: the metrics are of the whole split and not means over batches."""

    def __init__(self) -> None:
        self.total = 0.0
        self._outputs: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, model: nn.Module, batch: Batch) -> None:
        outputs = _outputs(model, batch)
        self.total += float(sequence_loss(outputs, batch["labels"]))
        self._outputs.append(outputs.cpu())
        self._labels.append(batch["labels"].cpu())

    def counted(self) -> dict[str, Any]:
        return {"total": self.total, "outputs": self._outputs, "labels": self._labels}

    def absorb(self, counted: dict[str, Any]) -> None:
        self.total += counted["total"]
        self._outputs += counted["outputs"]
        self._labels += counted["labels"]

    def result(self) -> dict[str, float]:
        """``loss`` a sequence, ``score``, and by kind ``accuracy`` and ``f1``, or ``pearson`` and ``spearman``.

        Raises:
            FloatingPointError: the model gave NaN.
        """
        outputs, labels = torch.cat(self._outputs).numpy(), torch.cat(self._labels).numpy()
        if not np.isfinite(outputs).all():
            raise FloatingPointError(
                "the model's answers are not finite: its weights have diverged, or were damaged; use an earlier "
                "checkpoint, or --precision fp32"
            )
        found = score_metrics(outputs[:, 0], labels) if labels.dtype.kind == "f" else class_metrics(outputs, labels)
        return {"loss": self.total / len(labels), **found, "sequences": len(labels)}


def class_metrics(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``score`` (Matthews), ``accuracy`` and ``f1`` of outputs (n, classes) against labels (n,), by scikit-learn."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    answers = outputs.argmax(axis=1)
    average = "binary" if outputs.shape[1] == 2 else "macro"
    return {
        "score": float(matthews_corrcoef(labels, answers)),
        "accuracy": float(accuracy_score(labels, answers)),
        "f1": float(f1_score(labels, answers, average=average, zero_division=0.0)),
    }


def score_metrics(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``score``, ``pearson`` and ``spearman`` of outputs (n,) against labels (n,); 0 where either is constant."""
    from scipy.stats import rankdata

    pearson, spearman = _correlation(outputs, labels), _correlation(rankdata(outputs), rankdata(labels))
    return {"score": (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman}


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64) - x.mean(), y.astype(np.float64) - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else 0.0
