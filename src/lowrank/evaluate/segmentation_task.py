"""The task of saying of every pixel what it shows.

    loss of an image = mean over pixels of the cross-entropy + 1 − mean over classes of the soft Dice
    soft Dice of a class = (2 Σ p y + 1)/(Σ p + Σ y + 1)                         (Milletari et al., arXiv 1606.04797)

A model is scored on the masks as they are stored, its logits brought to their size. Dice and IoU are MONAI's, of each
image and each class but the background (0); where neither mask nor answer has a class, it does not count.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.data.images.masks import TISSUES, MaskData
from lowrank.evaluate.collected_answers import check_finite, defined_mean
from lowrank.infra.extras import import_extra
from lowrank.infra.registry import register
from lowrank.models.vision import logits_of
from lowrank.run.run import Run
from lowrank.run.task import Asked, Batch, Task


@register("task", "segmentation")
class SegmentationTask(Task):
    """Masks of two or more classes, 0 being the background."""

    unit, metric, lower = "images", "dice", False
    shown: tuple[str, ...] = ("dice", "iou")
    judged: bool = True

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return mask_loss(_logits(model, batch), batch["labels"])

    def tally(self) -> MaskTally:
        return MaskTally()

    def stand_in(self, run: Run) -> tuple[MaskData, list[str]]:
        args = run.data.args
        source, named = args.get("source"), args.get("classes")
        classes = TISSUES if source == "mni152" else tuple(named) if isinstance(named, (list, tuple)) else ()
        size = 233 if source == "mni152" else int(str(args.get("size") or 224))
        notes = [] if classes else [f"the classes of {source} are not known before it is read: 2 assumed"]
        facts = {
            "classes": classes or ("background", "1"),
            "reading": {"size": size, "grey": source == "mni152"},
            "spec": {"size": size},
        }
        return MaskData.without_images(facts), notes

    def learnt(self, facts: Mapping[str, Any], folders: Sequence[Path]) -> MaskData | None:
        return MaskData.without_images(facts) if "spec" in facts else None

    def any_batch(self, model: nn.Module, data: MaskData, rows: int) -> Batch:
        size = (getattr(model, "image_spec", None) or data.spec).size
        masks = torch.zeros(rows, size, size, dtype=torch.int64)
        return {"images": torch.zeros(rows, 3, size, size), "labels": masks}

    def report(self, data: MaskData, tally: MaskTally, folder: Path, split: str) -> list[str]:
        from lowrank.evaluate.segmentation_report import report  # and the libraries that draw

        return report(data, tally, folder, split)

    def predict(self, model: nn.Module, data: MaskData, asked: Asked) -> list[Any]:
        from lowrank.evaluate.predict_masks import predict_masks

        return predict_masks(model, data, asked)


class MaskTally:
    """Collects the figures of each image, and the answers, packed: all masks of a split would fill the memory."""

    def __init__(self) -> None:
        self.total = 0.0
        self.figures: list[Tensor] = []  # (2, batch, classes − 1): Dice, IoU
        self.packed: list[Tensor] = []

    def add(self, model: nn.Module, batch: Batch) -> None:
        logits, masks = _logits(model, batch), batch["labels"]
        check_finite(logits, "images")
        self.total += float(mask_loss(logits, masks))
        answers = logits.argmax(dim=1)
        self.figures.append(overlaps(answers, masks, logits.shape[1]).cpu())
        for answer in answers.to(torch.uint8).cpu().numpy():
            self.packed.append(torch.frombuffer(bytearray(zlib.compress(answer.tobytes(), 1)), dtype=torch.uint8))

    def counted(self) -> dict[str, Any]:
        return {"total": self.total, "figures": self.figures, "packed": self.packed}

    def absorb(self, counted: dict[str, Any]) -> None:
        self.total += counted["total"]
        self.figures += counted["figures"]
        self.packed += counted["packed"]

    @property
    def overlap(self) -> np.ndarray:
        """Dice and IoU of each image and class, (2, images, classes − 1); NaN: the class is in neither."""
        return torch.cat(self.figures, dim=1).double().numpy()

    def answer(self, i: int, shape: tuple[int, ...]) -> np.ndarray:
        """The answer to image i, (h, w) uint8."""
        return np.frombuffer(zlib.decompress(self.packed[i].numpy().tobytes()), dtype=np.uint8).reshape(shape)

    def result(self) -> dict[str, float]:
        """``loss`` of an image, ``dice`` and ``iou`` (the mean over classes of the mean over images), ``images``."""
        dice, iou = (float(defined_mean(defined_mean(each))) for each in self.overlap)
        return {"loss": self.total / len(self.packed), "dice": dice, "iou": iou, "images": len(self.packed)}


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """The loss summed over the images, float32: logits (batch, classes, h, w), masks (batch, h, w)."""
    wanted = one_hot(masks, logits.shape[1]).float()
    p = logits.softmax(dim=1)
    dice = (2 * (p * wanted).sum((2, 3)) + 1) / (p.sum((2, 3)) + wanted.sum((2, 3)) + 1)
    return F.cross_entropy(logits, masks, reduction="none").mean((1, 2)).sum() + (1 - dice.mean(dim=1)).sum()


def one_hot(masks: Tensor, classes: int) -> Tensor:
    """(batch, h, w) → (batch, classes, h, w) bool."""
    return masks[:, None] == torch.arange(classes, device=masks.device)[None, :, None, None]


def overlaps(answers: Tensor, masks: Tensor, classes: int) -> Tensor:
    """Dice and IoU of masks (batch, h, w), each class but 0: (2, batch, classes − 1), NaN: the class is in neither."""
    monai = import_extra("monai.metrics", "medical")
    said, true = one_hot(answers, classes), one_hot(masks, classes)
    found = torch.stack(
        [f(said, true, include_background=False, ignore_empty=False) for f in (monai.compute_dice, monai.compute_iou)]
    )
    neither = ~(said | true).flatten(2).any(dim=2)[:, 1:]
    return found.masked_fill(neither, float("nan"))


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of the masks' size."""
    return resized(logits_of(model, batch["images"]), *batch["labels"].shape[-2:])


def resized(logits: Tensor, h: int, w: int) -> Tensor:
    """(batch, classes, …) → (batch, classes, h, w), as they are where they have that size."""
    if logits.shape[-2:] == (h, w):
        return logits
    return F.interpolate(logits, size=(h, w), mode="bilinear", align_corners=False)
