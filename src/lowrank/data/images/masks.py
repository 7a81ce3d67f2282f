"""Images with masks: a folder of both, and tissue classes of the MNI152 template that nilearn ships.

    folder/images/….png  folder/masks/….png                  the same stems; splits are made here (seeded by the names)
    folder/{train,val,test}/{images,masks}/….png             splits as they are (``val`` may be missing)

A mask is an eight-bit image whose grey is the class, 0 being the background; one of 0 and 255 alone is binary.
Images and masks are brought to one size once (masks by nearest neighbour), into
memory-mapped arrays in the cache.

Shapes: images (n, h, w) or (n, h, w, 3) uint8; masks (n, h, w) uint8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lowrank.data.images.batches import Batch, EvaluationBatches, ImageBatches, to_model
from lowrank.data.images.decode import Damaged, Fit, Reading, image_files, is_grey, read_image
from lowrank.data.images.medical import read_nifti
from lowrank.data.images.set import ImageSet, ImageSpec, Split, some, stored
from lowrank.data.images.source import ImageData
from lowrank.data.images.splits import split_by_patient
from lowrank.data.split_names import SPLITS
from lowrank.infra.extras import import_extra
from lowrank.infra.files import read_json, write_json
from lowrank.infra.registry import register

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

    def train(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> MaskBatches:
        if batch_size < ranks:
            raise ValueError(
                f"a batch of {batch_size} does not go round {ranks} ranks: give batch_size={ranks} or more"
            )
        split, size = self.split("train"), batch_size
        return MaskBatches(split=split, spec=self.spec, batch_size=size, seed=seed, rank=rank, ranks=ranks)

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
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    fit: Fit = "pad",
) -> MaskData:
    """Images with masks.

    Args:
        source: ``mni152``, or a folder with ``images/`` and ``masks/``, or with such folders in train, val and test.
        classes: names of the masks' values 0, 1, …; by default background and numbers.
        size: pixels to which a folder's images are brought, 224 by default.
        val_fraction, test_fraction: of a folder's images, where it has no splits; 0.15 each by default.
        fit: images that are not square: pad, crop or stretch.

    Raises:
        ValueError, OSError: no such source; images without masks, masks of another size or with unknown labels.
    """
    if source == "mni152":
        given = {"classes": classes or None, "size": size, "val_fraction": val_fraction, "test_fraction": test_fraction}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"data.{name} has no effect on mni152: leave it out")
        found, reading = _mni152(), Reading(size=233, grey=True)
    else:
        fractions = (val_fraction, test_fraction)
        reading = Reading(size=224 if size is None else size, fit=fit)
        found, reading = _folder(Path(source).expanduser(), tuple(classes), reading, fractions)
    path = Path(source).expanduser()
    origin = str(path.resolve()) if path.exists() else ""
    return MaskData(set=found, reading=reading, spec=ImageSpec(size=reading.size), origin=origin)


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
    return _set("mni152", place, TISSUES, [f"slice {z}" for z in used], split.tolist())


def _set(name: str, place: Path, classes: tuple[str, ...], names: Sequence[str], places: Sequence[str]) -> MaskSet:
    pictures, drawn = (np.load(place / f"{what}.npy", mmap_mode="r") for what in ("images", "masks"))
    splits = {}
    for split in SPLITS:
        rows = [i for i, each in enumerate(places) if each == split]
        if rows:
            own = tuple(names[i] for i in rows)
            splits[split] = Split(images=_Rows(pictures, rows), labels=_Rows(drawn, rows), names=own)  # type: ignore[arg-type]
    digest = (place / "digest").read_text()
    return MaskSet(name=name, kind="multi-class", classes=classes, splits=splits, pixels=digest)


class _Rows:
    """Some rows of a mapped array, read when they are asked for."""

    def __init__(self, array: np.ndarray, rows: Sequence[int]):
        self._array, self._rows = array, np.asarray(rows)
        self.shape, self.ndim, self.dtype = (len(rows), *array.shape[1:]), array.ndim, array.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: Any) -> np.ndarray:
        return np.asarray(self._array[self._rows[key]])


def _pairs(root: Path) -> Iterator[tuple[str | None, Path, Path]]:
    """(split or None, image, mask) of a folder.

    Raises:
        ValueError, FileNotFoundError: an image without a mask, a mask without an image, or neither folder.
    """
    parts = [(None, root)] if (root / "images").is_dir() else [(s, root / s) for s in SPLITS if (root / s).is_dir()]
    if not parts:
        raise FileNotFoundError(f"{root} has no images/ and masks/ (nor has it train/images, train/masks, test/…)")
    for split, folder in parts:
        if not (folder / "images").is_dir() or not (folder / "masks").is_dir():
            raise FileNotFoundError(f"{folder} must hold the two folders images/ and masks/")
        files, drawn = ({f.stem: f for f in image_files(folder / what, deep=False)} for what in ("images", "masks"))
        for stem in sorted(files.keys() ^ drawn.keys()):
            lone, other = (files, "masks") if stem in files else (drawn, "images")
            raise ValueError(f"{lone[stem]} has no {other[:-1]}: put one of the same name into {folder / other}")
        yield from ((split, files[stem], drawn[stem]) for stem in sorted(files))


def read_mask(path: Path, shape: tuple[int, int], reading: Reading, known: int | None) -> tuple[np.ndarray, bool]:
    """((size, size) uint8 classes, whether it is written as 0 and 255) of a mask that fits an image of (h, w).

    Raises:
        ValueError: another size, colours, or values that are no class of ``known`` many; names the file.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        if image.mode not in ("L", "P", "1"):
            raise ValueError(f"{path} is no mask: it is {image.mode}, and a mask has one channel of eight bits")
        if (image.height, image.width) != shape:
            wanted = f"{shape[1]} × {shape[0]}"
            raise ValueError(f"{path} is {image.width} × {image.height}, and its image {wanted}: they must be equal")
        values = np.asarray(image, dtype=np.uint8)
    found = set(np.unique(values).tolist())
    whole = found <= {0, 255} and 255 in found
    values = (values > 0).astype(np.uint8) if whole else values
    if known is not None and values.max() >= known:
        raise ValueError(
            f"{path} holds the label {values.max()}, and there are {known} classes (0 to {known - 1}): name all with "
            "--data.classes background,…"
        )
    plain, way, size = Image.fromarray(values), Image.Resampling.NEAREST, (reading.size, reading.size)
    if reading.fit == "stretch":
        return np.asarray(plain.resize(size, way)), whole
    return np.asarray((ImageOps.fit if reading.fit == "crop" else ImageOps.pad)(plain, size, way)), whole


def _folder(
    root: Path, classes: tuple[str, ...], reading: Reading, fractions: tuple[float | None, float | None]
) -> tuple[MaskSet, Reading]:
    from PIL import Image

    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; --data is mni152, or a folder with images/ and masks/")
    pairs = list(_pairs(root))
    if not pairs:
        raise ValueError(f"{root / 'images'} holds no images")
    own = pairs[0][0] is not None
    if own and fractions != (None, None):
        raise ValueError(f"{root} has splits of its own: leave data.val_fraction and data.test_fraction out")
    try:
        reading = replace(reading, grey=all(is_grey(image) for _, image, _ in pairs))
    except Damaged as error:
        raise ValueError(f"an image of {root} cannot be read: {error}") from error
    files = [file for _, *both in pairs for file in both]
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]

    def make(folder: Path) -> None:
        shape = (len(pairs), reading.size, reading.size)
        pictures = np.lib.format.open_memmap(
            folder / "images.npy", "w+", np.uint8, shape if reading.grey else (*shape, 3)
        )
        drawn = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, shape)
        for i, (_, image, mask) in enumerate(pairs):
            try:
                pictures[i] = read_image(image, reading)
            except Damaged as error:
                raise ValueError(f"{image} cannot be read: {error}") from error
            with Image.open(image) as header:
                turned = header.getexif().get(274, 1) > 4
                wide, high = header.size
            drawn[i], _ = read_mask(mask, (wide, high) if turned else (high, wide), reading, len(classes) or None)
        highest = int(drawn.max())
        if highest == 0:
            raise ValueError(f"the masks of {root} hold nothing but 0: there is nothing to find")
        pictures.flush()
        drawn.flush()
        write_json(folder / "facts.json", {"highest": highest})

    facing = [reading.size, reading.grey, reading.fit, list(classes), stamps]
    place = stored("masks", facing, make)
    highest = int(read_json(place / "facts.json")["highest"])
    names = [image.relative_to(root).as_posix() for _, image, _ in pairs]
    if own:
        places = [str(split) for split, _, _ in pairs]
    else:
        val, test = (0.15 if each is None else each for each in fractions)
        places = split_by_patient(np.zeros(len(pairs), dtype=np.int64), names, val, test)
    if "train" not in places:
        raise ValueError(f"{root} has nothing to train on: put images and masks into {root / 'train'}")
    known = classes or ("background", *map(str, range(1, highest + 1)))
    if len(known) < 2:
        raise ValueError(f"data.classes names {', '.join(known)} alone; name background and what is to be found")
    return _set(root.name, place, known, names, places), reading
