"""What every source of images becomes: named splits of eight-bit images with labels, and a kind of task.

Images stay ``uint8`` and on the disk until a batch needs them, so that a set need not fit into memory. What the model
wants (its size, mean and deviation) is an :class:`ImageSpec`, which the model brings.

A source of images announces itself where it is defined, by an :class:`ImageSource` in ``SOURCES``.

Shapes: images (n, h, w) grey or (n, h, w, 3) colour, volumes (n, d, h, w) grey; labels (n,) int64, or (n, classes)
uint8 of zeros and ones for ``multi-label``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from lowrank.data.cache import cache_root, locked, published, remove_leftovers
from lowrank.data.images.decode import Fit
from lowrank.infra.checks import check_choice
from lowrank.infra.files import write_text_atomically

Kind = Literal["binary", "multi-class", "multi-label", "ordinal"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How a model wants its images: square, of ``size`` pixels, (x/255 − mean)/std in each of three channels.

    ``depth``: of a model of volumes, the slices; None: the model takes images.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    depth: int | None = None

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"a mean and a deviation of each of three channels are needed, got {self}")
        if self.size < 1 or min(self.std) <= 0:
            raise ValueError(f"an image size of at least 1 and deviations above 0 are needed, got {self}")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split. ``names`` says what each image is (a file), ``patients`` whose, ``spacing`` the millimetres between
    its pixels as stored (down, across); each may be empty: not known."""

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()
    spacing: tuple[tuple[float, float], ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A data set. ``notes`` says what a reader should know about how it was read; ``pixels`` is a digest of all pixels,
    or empty where there are none; ``volumes`` that each image is one, of slices."""

    name: str
    kind: Kind
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()
    pixels: str = ""
    volumes: bool = False

    def __post_init__(self) -> None:
        check_choice("data.kind", self.kind, KINDS)
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
        """Pixels of the longer side as stored; of volumes in a slice."""
        return max(self._shape[2:4] if self.volumes else self._shape[1:3])

    @property
    def depth(self) -> int | None:
        """Slices of a volume as stored; None: they are images."""
        return int(self._shape[1]) if self.volumes else None

    @property
    def _shape(self) -> tuple[int, ...]:
        return next(iter(self.splits.values())).images.shape

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that is learnt from: pixels, labels, classes and splits, wherever the files lie."""
        found = hashlib.blake2b(repr((self.kind, self.classes, self.pixels)).encode(), digest_size=16)
        for name, split in self.splits.items():
            labels = np.ascontiguousarray(split.labels, dtype=np.int64)
            found.update(repr((name, labels.shape, split.names)).encode() + labels.tobytes())
        return found.hexdigest()


def _check(of: ImageSet, name: str, split: Split) -> None:
    where, count = f"the {name} split of {of.name}", len(of.classes)
    images, labels = split.images, split.labels
    shaped = images.ndim == 4 if of.volumes else images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if of.volumes and shaped and images.shape[1] == 1:
        raise ValueError(f"{where} holds volumes of one slice, which are images: give them as (n, h, w)")
    if images.dtype != np.uint8 or not shaped or 0 in images.shape[1:]:
        wanted = "(n, d, h, w)" if of.volumes else "(n, h, w) or (n, h, w, 3)"
        raise ValueError(f"{where} holds images {images.shape} of {images.dtype}; uint8 {wanted} is wanted")
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


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person may say of a source, as ``images`` describes it."""

    dataset: str | None = None
    size: int | None = None
    kind: Kind | None = None
    labels: str | None = None
    patient_pattern: str | None = None
    val_fraction: float | None = None
    test_fraction: float | None = None
    window: str = "auto"
    fit: Fit = "pad"
    skip_damaged: bool = False
    unpack_large: bool = False
    volumes: bool = False

    def given(self) -> list[str]:
        """The names of those that differ from the default."""
        return [each.name for each in fields(self) if getattr(self, each.name) != each.default]


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """One kind of source of images.

    Attributes:
        what: what a message calls it, such as "a folder".
        matches: whether a run's ``--data`` means it.
        read: the set.
        takes: the options that say something of it; others are refused.
        names: what can be named besides files and folders.
    """

    what: str
    matches: Callable[[str], bool]
    read: Callable[[str, Options], ImageSet]
    takes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


SOURCES: list[ImageSource] = []


def stored(name: str, key: object, make: Callable[[Path], None]) -> Path:
    """The folder in the cache that ``make`` fills, whole or not at all.

    Args:
        name: the beginning of the folder's name.
        key: plain values; others give another folder.
        make: called with an empty folder where there is none yet; beside its arrays stands then their ``digest``, the
            same wherever and whenever they were made.
    """
    mark = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
    final = cache_root() / "images" / f"{name}-{mark}"
    if not final.is_dir():
        with locked(final) as held:
            if not final.is_dir():
                if held:
                    remove_leftovers(final)
                with published(final) as folder:
                    make(folder)
                    write_text_atomically(folder / "digest", _digest(folder))
    return final


def _digest(folder: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.npy")):
        found.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                found.update(piece)
    return found.hexdigest()
