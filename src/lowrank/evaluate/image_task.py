"""The task of naming what an image shows: one class, one of ordered grades, or several labels.

    one class, grades   cross-entropy over the classes (grades too, as MedMNIST does)
    several labels      binary cross-entropy of each label, averaged over the labels

The validation metric that decides which checkpoint is best is AUC.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.data.images.medmnist import NAMES
from lowrank.data.images.medmnist import facts as medmnist_facts
from lowrank.data.images.set import Kind
from lowrank.data.images.source import ImageData
from lowrank.evaluate.collected_answers import Collected
from lowrank.evaluate.image_metrics import image_metrics
from lowrank.infra.registry import register
from lowrank.models.vision import logits_of
from lowrank.run.run import Run
from lowrank.run.task import Asked, Batch, Task

ASSUMED_CLASSES = 1000


@register("task", "images")
class ImageTask(Task):
    """Classification of images; the kind of labels is taken from the batches."""

    unit, metric, lower = "images", "auc", False
    shown: tuple[str, ...] = ("auc", "acc")
    judged: bool = True

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return image_loss(logits_of(model, batch["images"]), batch["labels"], batch.get("weights"))

    def tally(self) -> ImageTally:
        return ImageTally()

    def shaped_by_data(self, run: Run) -> bool:
        return run.data.args.get("source") not in NAMES

    def stand_in(self, run: Run) -> tuple[ImageData, list[str]]:
        args = run.data.args
        source, size = str(args.get("source")), int(str(args.get("size") or 28))
        stem = re.sub(r"(_\d+)?\.npz$", "", Path(source).name)
        if stem in NAMES:
            return ImageData.without_images(medmnist_facts(stem, size)), []
        count = 10 if source == "digits" else ASSUMED_CLASSES
        unknown = f"the classes of {source} are not known before it is read: {count} assumed"
        facts = {
            "kind": "multi-class",
            "classes": tuple(map(str, range(count))),
            "reading": {"size": size, "grey": source == "digits"},
            "spec": {"size": size},
        }
        return ImageData.without_images(facts), [] if source == "digits" else [unknown]

    def learnt(self, facts: Mapping[str, Any], folders: Sequence[Path]) -> ImageData | None:
        return ImageData.without_images(facts) if "spec" in facts else None

    def any_batch(self, model: nn.Module, data: ImageData, rows: int) -> Batch:
        spec: Any = getattr(model, "image_spec", None) or data.spec
        several = (len(data.classes),) if data.set.kind == "multi-label" else ()
        labels = torch.zeros(rows, *several, dtype=torch.int64)
        sides = (spec.size, spec.size) if spec.depth is None else (spec.depth, spec.size, spec.size)
        return {"images": torch.zeros(rows, 3, *sides), "labels": labels}

    def report(self, data: ImageData, tally: ImageTally, folder: Path, split: str) -> list[str]:
        from lowrank.evaluate.image_report import report  # and the libraries that draw

        return report(data, tally, folder, split)

    def predict(self, model: nn.Module, data: ImageData, asked: Asked) -> list[Any]:
        from lowrank.evaluate.predict import predict_classes  # which uses this file

        return predict_classes(model, data, asked)


class ImageTally(Collected):
    """Collects labels and scores."""

    def add(self, model: nn.Module, batch: Batch) -> None:
        logits = logits_of(model, batch["images"])
        labels = batch["labels"]
        self.keep(image_loss(logits, labels), probabilities(logits, several=labels.dim() == 2), labels)

    @property
    def scores(self) -> np.ndarray:
        """Probabilities (n, classes), float32.

        Raises:
            FloatingPointError: the model gave NaN.
        """
        return self.answers("images")

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
