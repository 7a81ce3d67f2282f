"""Images with masks: those of files (``mask_files``), and tissue classes of the MNI152 template that nilearn ships.

All are brought to one size once, into memory-mapped arrays in the cache.

Shapes: images (n, h, w) or (n, h, w, 3) uint8; masks (n, h, w) uint8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from lowrank.data.images.batches import Batch, EvaluationBatches, ImageBatches, to_model
from lowrank.data.images.decode import MaskFit, Reading
from lowrank.data.images.folder import Rows, places_of
from lowrank.data.images.mask_files import Pair, pairs_of, read_pairs
from lowrank.data.images.medical import read_nifti
from lowrank.data.images.set import ImageSet, ImageSpec, Split, stored
from lowrank.data.images.source import ImageData
from lowrank.data.images.splits import check_folds, places_of_fold
from lowrank.data.split_names import SPLITS
from lowrank.infra.extras import import_extra
from lowrank.infra.files import read_json, write_json
from lowrank.infra.registry import register
from lowrank.infra.text import some

TISSUES = ("background", "grey matter", "white matter")
MNI152 = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
FEWEST = 500  # pixels of tissue in a slice that is used


@dataclass(frozen=True, kw_only=True)
class MaskSet(ImageSet):
    """A set whose labels are masks (n, h, w), a class a pixel; ``pixels`` is a digest of both."""

    def __post_init__(self) -> None:
        pass  # checked where the masks were read, once

    @property
    def fingerprint(self) -> str:
        """Of images, masks, classes and splits, wherever the files lie."""
        told = repr((self.classes, self.pixels, [(name, split.names) for name, split in self.splits.items()]))
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class MaskBatches(ImageBatches):
    """Training batches: ``images`` as of ``ImageBatches``, ``labels`` (batch, size, size) int64."""

    def batch(self, n: int) -> Batch:
        return _batch(self.split, self._in_order(n)[self._own], self.spec, self.spec.size)


@dataclass(frozen=True, kw_only=True)
class MaskEvaluation(EvaluationBatches):
    """Each image once, ``labels`` (batch, h, w) as stored: a model is scored on the pixels that were drawn."""

    def batch(self, n: int) -> Batch:
        return _batch(self.split, self.rows[n * self.batch_size : (n + 1) * self.batch_size], self.spec, None)


def _batch(split: Split, rows: np.ndarray, spec: ImageSpec, size: int | None) -> Batch:
    masks = torch.from_numpy(np.asarray(split.labels[rows]))
    if size is not None and masks.shape[-2:] != (size, size):
        masks = nn.functional.interpolate(masks[:, None], size=(size, size), mode="nearest-exact")[:, 0]
    return {"images": to_model(split.images[rows], spec), "labels": masks.long()}


@dataclass(frozen=True, kw_only=True)
class MaskData(ImageData):
    """Images with masks, and the way in which they are read."""

    batches: ClassVar = MaskBatches

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "masks": True}

    @staticmethod
    def without_images(facts: Mapping[str, Any]) -> MaskData:
        bare = ImageData.without_images({**facts, "kind": "multi-class"})
        nothing = MaskSet(name="no images", kind="multi-class", classes=bare.classes, splits={})
        return MaskData(set=nothing, reading=bare.reading, spec=bare.spec, origin=bare.origin)

    def learnt_by(self, run: ImageData, *, whole: bool = False) -> MaskData:
        """The same images, normalised as the run's own were; their classes must be its classes, in its order."""
        if self.classes != run.classes:
            raise ValueError(
                f"{self.set.name} has masks of {some(self.classes)}, and the run was trained on {some(run.classes)}; "
                "give --data.classes in the run's order"
            )
        return replace(self, spec=run.spec)

    def evaluation(self, split: str, batch_size: int, limit: int | None = None) -> MaskEvaluation:
        """Batches that show every image of ``split`` once, or ``limit`` batches spread evenly over it."""
        part = self.split(split)
        count = len(part) if limit is None else min(len(part), limit * batch_size)
        rows = np.linspace(0, len(part) - 1, count).round().astype(np.int64)
        return MaskEvaluation(split=part, spec=self.spec, batch_size=batch_size, rows=rows)


@register("data")
def masks(
    source: str = "mni152",
    *,
    classes: Sequence[str] = (),
    size: int | None = None,
    patient_pattern: str | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    window: str = "auto",
    fit: MaskFit = "pad",
    folds: int | None = None,
    fold: int | None = None,
) -> MaskData:
    """Images with masks.

    Args:
        source: ``mni152``; or a folder with ``images/`` and ``masks/``, or with such folders in train, val and test; or
            a CSV file with columns image and mask, perhaps patient and split.
        classes: names of the masks' values 0, 1, …; by default background and numbers.
        size: pixels to which images of files are brought, 224 by default.
        patient_pattern: regular expression whose first group in an image's path is the patient; splits keep patients
            whole, and slices of a volume together.
        val_fraction, test_fraction: of the patients of files that have no splits; 0.15 each by default.
        window: for more than eight bits: auto, full, or low,high.
        fit: images that are not square: pad, crop or stretch; or windows, which cuts all into windows of ``size`` of
            their own pixels, and slides these over what is predicted.
        folds: cross-validation: all images, whatever their splits, are dealt to so many folds, by patient.
        fold: which of them, from 1, is the test split; 0.15 of the other patients (val_fraction) validate.

    Raises:
        ValueError, OSError: no such source; images without masks, masks of another size or with unknown labels.
    """
    check_folds(folds, fold)
    path = Path(source).expanduser()
    if source == "mni152":
        given: dict[str, object] = {"classes": classes or None, "size": size, "patient_pattern": patient_pattern}
        given |= {"val_fraction": val_fraction, "test_fraction": test_fraction}
        given |= {"folds": folds, "window": None if window == "auto" else window, "fit": None if fit == "pad" else fit}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"data.{name} has no effect on mni152: leave it out")
        found, reading = _mni152(), Reading(size=233, grey=True)
    else:
        reading = Reading(size=224 if size is None else size, window=window, fit=fit)
        pairs = pairs_of(path, patient_pattern)
        whose = [pair.patient or pair.name for pair in pairs]
        nothing = np.zeros(len(pairs), dtype=np.int64)  # of classes nothing is known yet
        if folds is None or fold is None:
            told = [(pair.split, patient) for pair, patient in zip(pairs, whose, strict=True)]
            places = places_of(told, nothing, val_fraction, test_fraction, path)
        elif test_fraction is not None:
            raise ValueError("data.test_fraction has no effect with data.folds, which say what is tested: leave it out")
        else:
            places = places_of_fold(nothing, whose, folds, fold, 0.15 if val_fraction is None else val_fraction)
        found, reading = _of_files(path, pairs, tuple(classes), reading, places)
    origin = str(path.resolve()) if path.exists() else ""
    return MaskData(set=found, reading=reading, spec=ImageSpec(size=reading.size), origin=origin)


def _of_files(
    source: Path,
    pairs: Sequence[Pair],
    classes: tuple[str, ...],
    reading: Reading,
    places: Sequence[str],
) -> tuple[MaskSet, Reading]:
    if len(classes) == 1:
        raise ValueError(f"data.classes names {classes[0]} alone; name background and what is to be found")
    read = read_pairs(source, pairs, classes, reading)
    highest = {split: max(h for h, p in zip(read.highest, places, strict=True) if p == split) for split in set(places)}
    if empty := [split for split in SPLITS if highest.get(split) == 0]:
        where = f"of the split {empty[0]} " if any(highest.values()) else ""
        raise ValueError(f"the masks {where}of {source} hold nothing but 0: there is nothing to find")
    known = classes or ("background", *map(str, range(1, max(read.highest) + 1)))
    patients = [pairs[i].patient or pairs[i].name for i in read.of]
    if len(read.of) == len(pairs) and not any(pair.patient for pair in pairs):
        patients = []  # images that nobody says anything of
    rows = [places[i] for i in read.of]
    return _set(source.stem, read.place, known, read.names, rows, patients, read.spacing), read.reading


def _mni152() -> MaskSet:
    """Axial slices of the ICBM 2009a template (Fonov et al., 2011), 1 mm, padded to 233 × 233.

    A pixel is tissue where grey and white matter together are above one half, and of the larger of the two. Every
    second slice is used; of those the odd ones train (every fourth of them validates), the even ones test: between two
    that are used lies one that is not.
    """
    nilearn = import_extra("nilearn", "dev")
    where = Path(nilearn.__file__).parent / "datasets" / "data"
    if not (where / MNI152.format("t1")).is_file():
        raise FileNotFoundError(f"nilearn ships no {MNI152.format('t1')}: pip install nilearn==0.14.1")

    def make(folder: Path) -> None:
        t1, grey, white = (read_nifti(where / MNI152.format(name)).values for name in ("t1", "gm", "wm"))
        tissue = grey.astype(np.int64) + white > 127
        wide = np.where(tissue, np.where(white > grey, 2, 1), 0).astype(np.uint8)
        used = np.flatnonzero((wide > 0).sum(axis=(1, 2)) > FEWEST)[::2]
        around = [(n // 2, n - n // 2) for n in (max(t1.shape[1:]) - side for side in t1.shape[1:])]
        for name, volume in (("images", t1), ("masks", wide)):
            np.save(folder / f"{name}.npy", np.pad(volume[used], [(0, 0), *around]))
        write_json(folder / "facts.json", {"slices": used.tolist()})

    place = stored("mni152", ["masks", 3], make)
    number = np.arange(len(used := read_json(place / "facts.json")["slices"]))
    split = np.where(number % 2 == 0, "test", np.where(number % 8 == 5, "val", "train"))
    names, spacing = [f"slice {z}" for z in used], [(1.0, 1.0)] * len(used)
    return _set("mni152", place, TISSUES, names, split.tolist(), spacing=spacing)


def _set(
    name: str,
    place: Path,
    classes: tuple[str, ...],
    names: Sequence[str],
    places: Sequence[str],
    patients: Sequence[str] = (),
    spacing: Sequence[tuple[float, float]] = (),
) -> MaskSet:
    """The set of the arrays in ``place``, whose rows are in these splits."""
    pictures, drawn = (np.load(place / f"{what}.npy", mmap_mode="r") for what in ("images", "masks"))
    splits = {}
    for split in SPLITS:
        rows = [i for i, each in enumerate(places) if each == split]
        if rows:
            splits[split] = Split(
                images=Rows(pictures, np.array(rows)),  # type: ignore[arg-type]
                labels=Rows(drawn, np.array(rows)),  # type: ignore[arg-type]
                names=tuple(names[i] for i in rows),
                patients=tuple(patients[i] for i in rows) if patients else (),
                spacing=tuple(spacing[i] for i in rows) if spacing else (),
            )
    digest = (place / "digest").read_text()
    return MaskSet(name=name, kind="multi-class", classes=classes, splits=splits, pixels=digest)
