"""What every source of images becomes: named splits of eight-bit images with labels, and a kind of task.

Images stay ``uint8`` and on the disk until a batch needs them, so that a set need not fit into memory. What the model
wants (its size, mean and deviation) is an :class:`ImageSpec`, which the model brings.

Shapes: images (n, h, w) grey or (n, h, w, 3) colour; labels (n,) int64, or (n, classes) uint8 of zeros and ones for
``multi-label``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Kind = Literal["binary", "multi-class", "multi-label", "ordinal"]
KINDS: tuple[str, ...] = get_args(Kind)
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How a model wants its images: square, of ``size`` pixels, (x/255 − mean)/std in each of three channels."""

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.size < 1 or min(self.std) <= 0:
            raise ValueError(f"an image size of at least 1 and deviations above 0 are needed, got {self}")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How image files become arrays: pixels of a side, one channel or three, and the options of ``images_decode``."""

    size: int
    grey: bool = False
    window: str = "auto"
    fit: Literal["pad", "crop", "stretch"] = "pad"


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split. ``names`` says what each image is (a file), ``patients`` whose; either may be empty: not known."""

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A data set. ``notes`` says what a reader should know about how it was read."""

    name: str
    kind: Kind
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"data.kind={self.kind!r} is unknown; it is one of {', '.join(KINDS)}")
        if len(self.classes) < (1 if self.kind == "multi-label" else 2):
            raise ValueError(
                f"{self.name} has only the class {', '.join(self.classes)}: there is nothing to tell apart"
            )
        if self.kind == "binary" and len(self.classes) != 2:
            raise ValueError(
                f"{self.name} has {len(self.classes)} classes: a binary task has two; use data.kind=multi-class"
            )
        for name, split in self.splits.items():
            _check(self, name, split)

    @property
    def size(self) -> int:
        """Pixels of the longer side as stored."""
        return max(next(iter(self.splits.values())).images.shape[1:3])


def _check(of: ImageSet, name: str, split: Split) -> None:
    where, count = f"the {name} split of {of.name}", len(of.classes)
    images, labels = split.images, split.labels
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
        raise ValueError(
            f"{where} holds images {images.shape} of {images.dtype}; uint8 (n, h, w) or (n, h, w, 3) is wanted"
        )
    if len(images) != len(labels):
        raise ValueError(f"{where} has {len(images)} images and {len(labels)} labels")
    if not len(labels):
        return
    if of.kind == "multi-label":
        if labels.shape != (len(images), count) or labels.min() < 0 or labels.max() > 1:
            raise ValueError(f"{where}: labels {labels.shape} must be zeros and ones, {count} to an image")
    elif labels.ndim != 1 or labels.min() < 0 or labels.max() >= count:
        shown = f"from {labels.min()} to {labels.max()}" if labels.ndim == 1 else f"of shape {labels.shape}"
        raise ValueError(
            f"{where} has labels {shown}; {of.kind} with {count} classes takes whole numbers from 0 to {count - 1}"
        )
