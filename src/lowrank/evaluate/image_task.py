"""The task of naming what an image shows: one class, one of ordered grades, or several labels.

    one class, grades   cross-entropy over the classes (grades too, as MedMNIST does)
    several labels      binary cross-entropy of each label, averaged over the labels

The validation metric that decides which checkpoint is best is AUC.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.data.images.set import Kind
from lowrank.evaluate.image_metrics import image_metrics
from lowrank.infra.registry import register
from lowrank.models.vision import logits_of
from lowrank.run.task import Batch

if TYPE_CHECKING:
    from lowrank.data.images.source import ImageData


@register("task", "images")
class ImageTask:
    """Classification of images; the kind of labels is taken from the batches."""

    unit, metric, lower = "images", "auc", False
    shown: tuple[str, ...] = ("auc", "acc")
    judged: bool = True

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])

    def size(self, batch: Batch) -> int:
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return image_loss(logits_of(model, batch["images"]), batch["labels"], batch.get("weights"))

    def tally(self) -> ImageTally:
        return ImageTally()

    def report(self, data: ImageData, tally: ImageTally, folder: Path, split: str) -> list[str]:
        from lowrank.evaluate.image_report import report  # and the libraries that draw

        return report(data, tally, folder, split)


class ImageTally:
    """Collects labels and scores: the metrics are of the whole split and not means over batches."""

    def __init__(self) -> None:
        self.total = 0.0
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, model: nn.Module, batch: Batch) -> None:
        logits = logits_of(model, batch["images"])
        self.total += float(image_loss(logits, batch["labels"]))
        self._scores.append(probabilities(logits, several=batch["labels"].dim() == 2).cpu())
        self._labels.append(batch["labels"].cpu())

    def counted(self) -> dict[str, Any]:
        return {"total": self.total, "scores": self._scores, "labels": self._labels}

    def absorb(self, counted: dict[str, Any]) -> None:
        self.total += counted["total"]
        self._scores += counted["scores"]
        self._labels += counted["labels"]

    @property
    def scores(self) -> np.ndarray:
        """Probabilities (n, classes), float32.

        Raises:
            FloatingPointError: the model gave NaN.
        """
        scores = torch.cat(self._scores).numpy()
        check_finite(scores)
        return scores

    @property
    def labels(self) -> np.ndarray:
        """(n,) or (n, classes), int64."""
        return torch.cat(self._labels).long().numpy()

    def result(self) -> dict[str, float]:
        """``loss`` (nats an image), ``auc``, ``acc``, ``balanced_accuracy``, ``images``."""
        labels, scores = self.labels, self.scores
        kind: Kind = "multi-label" if labels.ndim == 2 else "binary" if scores.shape[1] == 2 else "multi-class"
        return {"loss": self.total / len(labels), **image_metrics(labels, scores, kind), "images": len(labels)}


def image_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The loss summed over the images, float32; ``weights`` of the labels' shape count some more than others."""
    if labels.dim() == 1:
        each = F.cross_entropy(logits, labels, reduction="none")
        return (each if weights is None else each * weights).sum()
    each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return (each if weights is None else each * weights).mean(dim=1).sum()


def probabilities(logits: Tensor, *, several: bool) -> Tensor:
    """Logits (batch, classes) → probabilities: a softmax, or with ``several`` labels a sigmoid of each."""
    return logits.sigmoid() if several else logits.softmax(dim=1)


def check_finite(scores: np.ndarray) -> None:
    """Raise FloatingPointError where a model's probabilities (n, classes) are none."""
    wrong = int((~np.isfinite(scores).all(axis=1)).sum())
    if wrong:
        raise FloatingPointError(
            f"the model's answers to {wrong} of {len(scores)} images are not finite: a weight of it, or a product of "
            "them, is NaN or infinite; use an earlier checkpoint, or --precision fp32"
        )
