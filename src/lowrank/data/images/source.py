"""Images to diagnose: MedMNIST's sets, a ``.npz`` in their layout, people's own folders, and scikit-learn's digits.

:func:`images` is what a run's ``--data`` names; its arguments are the ``--data.…`` options. The model says how large it
wants its images and how normalised (:meth:`ImageData.for_model`). What a run has learnt (classes, reading,
normalisation) stays with it: :meth:`ImageData.to_json` is written beside it, and images that are read later are brought
under it (:meth:`ImageData.learnt_by`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from lowrank.data.catalogue import Data
from lowrank.data.images import folder as _folder  # noqa: F401  (for the sources that they announce)
from lowrank.data.images import medmnist as _medmnist  # noqa: F401
from lowrank.data.images.augment import check_augment
from lowrank.data.images.batches import BALANCES, Batch, ImageBatches, evaluation_batches, label_weights
from lowrank.data.images.decode import Fit, Reading
from lowrank.data.images.set import SOURCES, ImageSet, ImageSource, ImageSpec, Kind, Options, Split
from lowrank.data.images.splits import check_folds, places_of_fold, split_by_patient
from lowrank.data.split_names import SPLITS
from lowrank.infra.checks import check_choice
from lowrank.infra.convert import nearest
from lowrank.infra.files import write_json
from lowrank.infra.registry import register
from lowrank.infra.text import some

FACTS = "images.json"  # beside run.json: classes, and how images are read


@dataclass(frozen=True, kw_only=True)
class ImageData(Data):
    """A set of images with the way in which it is read: what the loop, the evaluator and the models know of it.

    ``origin``: the file or folder, from wherever one looks; empty for what has a name. ``batches``: of its training.
    """

    batches: ClassVar[type[ImageBatches]] = ImageBatches

    set: ImageSet
    reading: Reading
    spec: ImageSpec
    augment: tuple[str, ...] = ()
    balance: Literal["none", "weights", "sampler"] = "none"
    origin: str = ""

    @property
    def kind(self) -> Kind:
        return self.set.kind

    @property
    def classes(self) -> tuple[str, ...]:
        return self.set.classes

    @property
    def fingerprint(self) -> str:
        """Of the images' content, their labels and splits; the same wherever they lie."""
        return self.set.fingerprint

    def to_json(self) -> dict[str, Any]:
        """What a model needs to know to treat other images in the same way, without the set itself; plain JSON."""
        facts = {"kind": self.kind, "classes": self.classes, "reading": asdict(self.reading), "spec": asdict(self.spec)}
        plain: dict[str, Any] = json.loads(json.dumps(facts | {"origin": self.origin}))
        return plain

    @staticmethod
    def without_images(facts: Mapping[str, Any]) -> ImageData:
        """From ``to_json``: enough for a model and for predictions, with no image in any split."""
        spec: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["spec"].items()}
        nothing = ImageSet(name="no images", kind=facts["kind"], classes=tuple(facts["classes"]), splits={})
        reading, origin = Reading(**facts["reading"]), facts.get("origin", "")
        return ImageData(set=nothing, reading=reading, spec=ImageSpec(**spec), origin=origin)

    @property
    def unread(self) -> bool:
        return not self.set.splits

    def write_facts(self, folder: Path) -> None:
        write_json(folder / FACTS, self.to_json())

    def learnt_by(self, run: ImageData, *, whole: bool = False) -> ImageData:
        """The same images with the classes that a run has learnt, in its order, read and normalised as its own were.

        Args:
            run: what the run says of its images; of its splits nothing is needed.
            whole: all of its classes must be there, as they must be to train further.

        Raises:
            ValueError: images of another kind, or of classes that the run does not know.
        """
        strange = [name for name in self.classes if name not in run.classes]
        missing = [name for name in run.classes if name not in self.classes] if whole else []
        if strange or missing or (self.kind == "multi-label") != (run.kind == "multi-label"):
            raise ValueError(
                f"{self.set.name} has the classes {some(self.classes)} ({self.kind}), and the run was trained on "
                f"{some(run.classes)} ({run.kind})"
                + (f"; it does not know {some(strange)}" if strange else "")
                + (f"; missing are {some(missing)}" if missing else "")
            )
        place = [run.classes.index(name) for name in self.classes]
        splits = {name: _relabelled(split, place, len(run.classes)) for name, split in self.set.splits.items()}
        found = replace(self.set, kind=run.kind, classes=run.classes, splits=splits)
        return replace(self, set=found, reading=run.reading, spec=run.spec)

    @property
    def notes(self) -> Sequence[str]:  # type: ignore[override]
        """That images are resized for the model, where they are."""
        stored, wanted = self.reading.size, self.spec.size
        if stored == wanted or not self.set.splits:
            return []
        what = f"enlarged to {wanted}, which adds nothing to them" if stored < wanted else f"shrunk to {wanted}"
        return [f"the images have {stored} pixels and the model takes {wanted}: they are {what} (--model.image_size)"]

    def for_model(self, model: nn.Module) -> ImageData:
        """The same images as ``model.image_spec`` wants them; unchanged for a model that does not say."""
        spec = getattr(model, "image_spec", None)
        return self if spec is None else replace(self, spec=spec)

    def has(self, split: str) -> bool:
        return len(self.set.splits.get(split, ())) > 0

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
        return self.batches(
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
        """Batches that show every image of ``split`` once, or ``limit`` batches of a fixed sample of all classes."""
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
    unpack_large: bool = False,
    volumes: bool = False,
    augment: Sequence[str] = (),
    balance: Literal["none", "weights", "sampler"] = "none",
    folds: int | None = None,
    fold: int | None = None,
) -> ImageData:
    """Images with labels.

    Args:
        source: ``digits``, the name of a MedMNIST set, a ``.npz`` file in MedMNIST's layout, of images or volumes, or a
            folder of images.
        dataset: which MedMNIST set a ``.npz`` holds, where its name does not tell.
        size: pixels: of a MedMNIST set, 28 (default), 64, 128 or 224 (of volumes 28 or 64); of a folder's
            images as stored, 224 by default.
        kind: of task, where labels and names do not tell: binary, multi-class, multi-label, ordinal.
        labels: a folder's table: a CSV file with columns path, label (or labels), perhaps patient and split.
        patient_pattern: regular expression whose first group in a file's path is the patient; splits keep patients
            whole.
        val_fraction, test_fraction: of a folder's patients, where it has no splits; 0.15 each by default.
        window: for more than eight bits: auto, full, or low,high.
        fit: images that are not square: pad, crop or stretch.
        skip_damaged: leave out files that cannot be read.
        unpack_large: unpack a ``.npz`` that becomes more than a hundred times as large.
        volumes: a folder's files are volumes: NIfTI, or a folder of its own for each DICOM series; by default 64 voxels
            a side.
        augment: any of hflip, vflip, crop, randaugment.
        balance: against rare classes: weights in the loss, or a sampler that draws all classes alike.
        folds: cross-validation: all images, whatever their splits, are dealt to so many folds, by patient and class.
        fold: which of them, from 1, is the test split; 0.15 of the other patients (val_fraction) validate.

    Raises:
        ValueError, OSError: no such source, or it does not hold what it should; options that do not fit the source.
    """
    check_choice("data.balance", balance, BALANCES)
    check_choice("data.fit", fit, Fit)
    names = check_augment(augment)
    check_folds(folds, fold)
    options = Options(
        dataset=dataset,
        size=size,
        kind=kind,
        labels=labels,
        patient_pattern=patient_pattern,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        window=window,
        fit=fit,
        skip_damaged=skip_damaged,
        unpack_large=unpack_large,
        volumes=volumes,
    )
    origin = next((each for each in SOURCES if each.matches(source)), None)
    if origin is None:
        raise _nothing(source)
    for name in options.given():
        if name not in origin.takes and not (folds and name == "val_fraction"):
            raise ValueError(f"data.{name} has no effect on {source}, {origin.what}: leave it out")
    found = origin.read(source, options if folds is None else replace(options, val_fraction=None))
    if folds is not None and fold is not None:
        found = _folded(found, folds, fold, 0.15 if val_fraction is None else val_fraction)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if found.volumes and "randaugment" in names:
        raise ValueError("data.augment: randaugment is for images; volumes take hflip, vflip and crop")
    grey = found.volumes or found.splits["train"].images.ndim == 3
    reading = Reading(size=found.size, grey=grey, window=window, fit=fit, depth=found.depth)
    path = Path(source).expanduser()
    return ImageData(
        set=found,
        reading=reading,
        spec=ImageSpec(size=found.size, depth=found.depth),
        augment=names,
        balance=balance,
        origin=str(path.resolve()) if path.exists() else "",
    )


def _folded(found: ImageSet, folds: int, fold: int, val: float) -> ImageSet:
    """The set with one fold to test on, and the rest divided anew into what trains and what validates."""
    parts = list(found.splits.items())
    names = [n for split, part in parts for n in part.names or [f"{split} {i}" for i in range(len(part))]]
    whose = [p for split, part in parts for p in part.patients or part.names or [""] * len(part)]
    patients = [patient or name for patient, name in zip(whose, names, strict=True)]
    labels = np.concatenate([np.asarray(part.labels) for _, part in parts])
    pictures = np.concatenate([part.images for _, part in parts])
    places = np.array(places_of_fold(labels, patients, folds, fold, val))
    splits = {}
    for split in SPLITS:
        chosen = np.flatnonzero(places == split)
        if len(chosen):
            splits[split] = Split(
                images=pictures[chosen],
                labels=labels[chosen],
                names=tuple(names[i] for i in chosen),
                patients=tuple(patients[i] for i in chosen),
            )
    counts = ", ".join(f"{len(part)} {split}" for split, part in splits.items())
    note = f"fold {fold} of {folds}, by patient and class: {counts}"
    return replace(found, splits=splits, notes=(*found.notes, note))


def _nothing(source: str) -> Exception:
    path = Path(source).expanduser()
    if path.suffix == ".npz" or "/" in source or source.startswith((".", "~")):
        return FileNotFoundError(f"there is no file or folder {source}")
    if path.is_file():
        return ValueError(f"{source} is neither a .npz file nor a folder of images")
    known = [name for each in SOURCES for name in each.names]
    return ValueError(
        f"there is no data {source!r}{nearest(source, known)}; there are {', '.join(known)}, .npz files and folders"
    )


def _relabelled(split: Split, place: list[int], classes: int) -> Split:
    """The split with its class i called ``place[i]``, of ``classes``."""
    labels = np.asarray(split.labels)
    if labels.ndim == 1:
        return replace(split, labels=np.array(place, dtype=np.int64)[labels])
    wide = np.zeros((len(labels), classes), dtype=labels.dtype)
    wide[:, place] = labels
    return replace(split, labels=wide)


def _digits(source: str, options: Options) -> ImageSet:
    """Handwritten digits, 1,797 of 8 × 8 pixels (scikit-learn's copy of UCI's test set), 70/15/15."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error

    pixels, labels = load_digits(return_X_y=True)
    pictures = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int64)
    places = np.array(split_by_patient(labels, [f"digit {i}" for i in range(len(labels))], 0.15, 0.15))
    splits = {name: Split(images=pictures[places == name], labels=labels[places == name]) for name in SPLITS}
    return ImageSet(
        name=source, kind="multi-class", classes=tuple("0123456789"), splits=splits, pixels="scikit-learn's"
    )


SOURCES.append(
    ImageSource(what="a built-in set", matches=lambda source: source == "digits", read=_digits, names=("digits",))
)
