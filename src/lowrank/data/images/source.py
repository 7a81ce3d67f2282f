"""Images to diagnose: MedMNIST's sets, a ``.npz`` in their layout, people's own folders, and scikit-learn's digits.

:func:`images` is what a run's ``--data`` names; its arguments are the ``--data.…`` options. The model says how large it
wants its images and how normalised (:meth:`ImageData.for_model`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from lowrank.data.catalogue import Data
from lowrank.data.images.augment import check_augment
from lowrank.data.images.batches import BALANCES, Batch, ImageBatches, evaluation_batches, label_weights
from lowrank.data.images.decode import Fit
from lowrank.data.images.folder import Decoding, read_folder
from lowrank.data.images.medmnist import NAMES, download, read_npz
from lowrank.data.images.set import ImageSet, ImageSpec, Kind, Reading, Split
from lowrank.data.images.splits import split_by_patient
from lowrank.infra.convert import nearest
from lowrank.infra.registry import register


@dataclass(frozen=True, kw_only=True)
class ImageData(Data):
    """A set of images with the way in which it is read: what the loop, the evaluator and the models know of it."""

    set: ImageSet
    reading: Reading
    spec: ImageSpec
    augment: tuple[str, ...] = ()
    balance: Literal["none", "weights", "sampler"] = "none"

    @property
    def kind(self) -> Kind:
        return self.set.kind

    @property
    def classes(self) -> tuple[str, ...]:
        return self.set.classes

    def to_json(self) -> dict[str, Any]:
        """What a model needs to know to treat other images in the same way, without the set itself."""
        return {"kind": self.kind, "classes": self.classes, "reading": asdict(self.reading), "spec": asdict(self.spec)}

    @staticmethod
    def without_images(facts: Mapping[str, Any]) -> ImageData:
        """From ``to_json``: enough for a model and for predictions, with no image in any split."""
        spec: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["spec"].items()}
        nothing = ImageSet(name="no images", kind=facts["kind"], classes=tuple(facts["classes"]), splits={})
        return ImageData(set=nothing, reading=Reading(**facts["reading"]), spec=ImageSpec(**spec))

    def for_model(self, model: nn.Module) -> ImageData:
        """The same images as ``model.image_spec`` wants them; unchanged for a model that does not say."""
        spec = getattr(model, "image_spec", None)
        return self if spec is None else replace(self, spec=spec)

    def split(self, name: str) -> Split:
        """A split that has images.

        Raises:
            ValueError: there is none of that name, or it is empty.
        """
        splits = self.set.splits
        if name not in splits or not len(splits[name]):
            having = ", ".join(each for each in splits if len(splits[each]))
            raise ValueError(f"{self.set.name} has no images in a split {name!r}; it has {having}")
        return splits[name]

    def train(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> ImageBatches:
        """Training batches of ``batch_size`` images of all ranks together; each rank gets its own rows.

        Raises:
            ValueError: a batch that does not go round the ranks.
        """
        if batch_size < ranks:
            raise ValueError(
                f"a batch of {batch_size} does not go round {ranks} ranks: give batch_size={ranks} or more"
            )
        split = self.split("train")
        return ImageBatches(
            split=split,
            spec=self.spec,
            batch_size=batch_size,
            seed=seed,
            augment=self.augment,
            sampler=self.balance == "sampler",
            weights=label_weights(split) if self.balance == "weights" else None,
            rank=rank,
            ranks=ranks,
        )

    def evaluation(self, split: str, batch_size: int, limit: int | None = None) -> Iterable[Batch]:
        """Batches that show every image of ``split`` once."""
        return evaluation_batches(self.split(split), self.spec, batch_size, limit)


@register("data")
def images(
    source: str = "digits",
    *,
    dataset: str | None = None,
    size: int | None = None,
    kind: Kind | None = None,
    labels: str | None = None,
    patient_pattern: str | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    window: str = "auto",
    fit: Fit = "pad",
    skip_damaged: bool = False,
    augment: Sequence[str] = (),
    balance: Literal["none", "weights", "sampler"] = "none",
) -> ImageData:
    """Images with labels.

    Args:
        source: ``digits``, the name of a MedMNIST set, a ``.npz`` file in MedMNIST's layout, or a folder of images.
        dataset: which MedMNIST set a ``.npz`` holds, where its name does not tell.
        size: pixels: of a MedMNIST set, 28 (default), 64, 128 or 224; of a folder's images as stored, 224 by default.
        kind: of task, where labels and names do not tell: binary, multi-class, multi-label, ordinal.
        labels: a folder's table: a CSV file with columns path, label (or labels), perhaps patient and split.
        patient_pattern: regular expression whose first group in a file's path is the patient; splits keep patients
            whole.
        val_fraction, test_fraction: of a folder's patients, where it has no splits; 0.15 each by default.
        window: for more than eight bits: auto, full, or low,high.
        fit: images that are not square: pad, crop or stretch.
        skip_damaged: leave out files that cannot be read.
        augment: any of hflip, vflip, crop, randaugment.
        balance: against rare classes: weights in the loss, or a sampler that draws all classes alike.

    Raises:
        ValueError, OSError: no such source, or it does not hold what it should; options that do not fit the source.
    """
    if balance not in BALANCES:
        raise ValueError(f"data.balance={balance!r}{nearest(balance, BALANCES)}; it is one of {', '.join(BALANCES)}")
    names = check_augment(augment)
    of_folders = {
        "labels": labels,
        "patient_pattern": patient_pattern,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
        "skip_damaged": skip_damaged or None,
        "window": None if window == "auto" else window,
        "fit": None if fit == "pad" else fit,
    }
    path = Path(source).expanduser()
    if path.is_dir():
        _refuse(source, "a folder", dataset=dataset)
        decoding = Decoding(size=size or 224, window=window, fit=fit, skip_damaged=skip_damaged)
        found = read_folder(
            path,
            decoding,
            table=_table(path, labels),
            kind=kind,
            patient_pattern=patient_pattern,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
        )
    elif source == "digits":
        _refuse(source, "a built-in set", dataset=dataset, size=size, kind=kind, **of_folders)
        found = _digits()
    elif path.suffix == ".npz" and path.is_file():
        _refuse(source, "a file with splits", **of_folders)
        found = read_npz(path, dataset=dataset, kind=kind)
        if size not in (None, found.size):
            raise ValueError(
                f"data.size={size}, and {source} holds images of {found.size} pixels: give another file, or "
                "--data.size none (the model resizes what it gets)"
            )
    elif source in NAMES:
        _refuse(source, "a MedMNIST set", dataset=dataset, kind=kind, **of_folders)
        found = read_npz(download(source, size or 28), dataset=source)
    else:
        raise _nothing(source, path)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    grey = found.splits["train"].images.ndim == 3
    reading = Reading(size=found.size, grey=grey, window=window, fit=fit)
    return ImageData(set=found, reading=reading, spec=ImageSpec(size=found.size), augment=names, balance=balance)


def _table(folder: Path, labels: str | None) -> Path | None:
    """The table as it was given, or below the folder."""
    if labels is None:
        return None
    path = Path(labels).expanduser()
    return path if path.is_file() or not (folder / labels).is_file() else folder / labels


def _refuse(source: str, what: str, **options: object) -> None:
    """Raise ValueError for options that would do nothing for this kind of source."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"data.{given[0]} has no effect on {source}, {what}: leave it out")


def _nothing(source: str, path: Path) -> Exception:
    if path.suffix == ".npz" or "/" in source or source.startswith((".", "~")):
        return FileNotFoundError(f"there is no file or folder {source}")
    if path.is_file():
        return ValueError(f"{source} is neither a .npz file nor a folder of images")
    known = ("digits", *NAMES)
    return ValueError(
        f"there is no data {source!r}{nearest(source, known)}; there are {', '.join(known)}, .npz files and folders"
    )


def _digits() -> ImageSet:
    """Handwritten digits, 1,797 of 8 × 8 pixels (scikit-learn's copy of UCI's test set), 70/15/15."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error

    pixels, labels = load_digits(return_X_y=True)
    pictures = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int64)
    places = np.array(split_by_patient(labels, [f"digit {i}" for i in range(len(labels))], 0.15, 0.15))
    splits = {
        name: Split(images=pictures[places == name], labels=labels[places == name]) for name in ("train", "val", "test")
    }
    return ImageSet(name="digits", kind="multi-class", classes=tuple("0123456789"), splits=splits)
