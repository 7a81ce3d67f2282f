"""The task of giving a sequence a class or a score, as GLUE's: cross-entropy, or the squared error of the score.

``score`` decides which checkpoint is best: Matthews' correlation of the classes, as CoLA reports; for scores the mean
of Pearson's and Spearman's, as STS-B does. Accuracy and F1 (of class 1 of two; else the mean over the classes) stand
beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.data.text.glue import TABLES
from lowrank.evaluate.collected_answers import Collected
from lowrank.infra.registry import register
from lowrank.run.run import Run
from lowrank.run.task import Batch, Task, Unread


@register("task", "sequences")
class SequenceTask(Task):
    """Classes or scores of sequences; which of the two is taken from the labels of the batches."""

    unit, metric, lower = "sequences", "score", False
    shown: tuple[str, ...] = ("score", "accuracy", "f1")
    judged: bool = True

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return sequence_loss(_outputs(model, batch), batch["labels"])

    def tally(self) -> SequenceTally:
        return SequenceTally()

    def stand_in(self, run: Run) -> tuple[Unread, list[str]]:
        args = run.data.args
        longest, name = str(args.get("context", "auto")), str(args.get("name", "auto"))
        outputs = len(TABLES[name].classes) or 1 if name in TABLES else 2
        return Unread(512 if longest == "auto" else int(longest), outputs=outputs), []

    def any_batch(self, model: nn.Module, data: Any, rows: int) -> Batch:
        ids = torch.zeros(rows, data.context, dtype=torch.int64)
        labels = torch.zeros(rows, dtype=torch.float32 if data.outputs == 1 else torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    """(batch, outputs) float32."""
    out: Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return out.float()


def sequence_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Summed over the sequences: cross-entropy in nats, or (output − score)²."""
    if labels.is_floating_point():
        return F.mse_loss(outputs.squeeze(-1), labels, reduction="sum")
    return F.cross_entropy(outputs, labels, reduction="sum")


class SequenceTally(Collected):
    """Collects outputs and labels."""

    def add(self, model: nn.Module, batch: Batch) -> None:
        outputs = _outputs(model, batch)
        self.keep(sequence_loss(outputs, batch["labels"]), outputs, batch["labels"])

    def result(self) -> dict[str, float]:
        """``loss`` a sequence, ``score``, and by kind ``accuracy`` and ``f1``, or ``pearson`` and ``spearman``.

        Raises:
            FloatingPointError: the model gave NaN.
        """
        outputs, labels = self.answers("sequences"), torch.cat(self._labels).numpy()
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
