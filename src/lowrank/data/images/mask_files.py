"""Files of images with masks, as pairs that are read once into the cache.

    folder/images/….png  folder/masks/….png                  the same stems
    folder/{train,val,test}/{images,masks}/….png             splits as they are (``val`` may be missing)
    table.csv                                                columns ``image``, ``mask``, perhaps ``patient`` and
                                                             ``split``; paths from the table's folder

A mask's grey is the class, 0 being the background; one of 0 and 255 alone is binary. Masks are brought to a size by
nearest neighbour. A volume (a NIfTI file; in a table also a folder of a DICOM series) has a NIfTI file for its mask, of
the same voxels in the same place; each of its slices from the feet up is an image, and all of them one patient's.

Shapes: images (n, h, w) or (n, h, w, 3) uint8; masks (n, h, w) uint8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lowrank.data.images.decode import (
    Planes,
    Reading,
    coloured,
    fitted,
    fitted_part,
    image_files,
    is_grey,
    read_planes,
    window,
    window_corners,
)
from lowrank.data.images.folder import patients_by, rows_of, table_row_split
from lowrank.data.images.medical import NIFTI, Damaged, count_slices, is_nifti, is_volume, read_nifti, series_files
from lowrank.data.images.set import stored
from lowrank.data.split_names import SPLITS
from lowrank.infra.files import read_json, write_json
from lowrank.infra.text import some


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image, or a volume, and its mask. ``patient``, ``split``: None where they are not known."""

    image: Path
    mask: Path
    name: str
    patient: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Pairs in the cache: ``images.npy`` and ``masks.npy`` in ``place``, the pair that each row is ``of``, the rows'
    names, the millimetres between stored pixels (down, across) where all files say them, each pair's highest class."""

    place: Path
    reading: Reading
    of: tuple[int, ...]
    names: tuple[str, ...]
    spacing: tuple[tuple[float, float], ...]
    highest: tuple[int, ...]


def pairs_of(source: Path, patient_pattern: str | None) -> list[Pair]:
    """What a folder or a table holds.

    Raises:
        ValueError, FileNotFoundError: an image without a mask, a mask without an image, a table that does not fit.
    """
    if source.suffix.lower() == ".csv":
        pairs = _of_table(source)
    elif source.is_dir():
        pairs = _of_folder(source)
    else:
        raise FileNotFoundError(
            f"there is no folder {source}; --data is mni152, a folder with images/ and masks/, or a CSV file with the "
            "columns image and mask"
        )
    if patient_pattern is None:
        return pairs
    if any(pair.patient is not None for pair in pairs):
        raise ValueError(f"{source} names the patients itself: leave data.patient_pattern out")
    whose = patients_by(patient_pattern, [pair.name for pair in pairs])
    return [replace(pair, patient=patient) for pair, patient in zip(pairs, whose, strict=True)]


def _of_folder(root: Path) -> list[Pair]:
    parts = [(None, root)] if (root / "images").is_dir() else [(s, root / s) for s in SPLITS if (root / s).is_dir()]
    if not parts:
        raise FileNotFoundError(f"{root} has no images/ and masks/ (nor has it train/images, train/masks, test/…)")
    found = []
    for split, folder in parts:
        if not (folder / "images").is_dir() or not (folder / "masks").is_dir():
            raise FileNotFoundError(f"{folder} must hold the two folders images/ and masks/")
        files, drawn = ({_stem(f): f for f in image_files(folder / what, deep=False)} for what in ("images", "masks"))
        for stem in sorted(files.keys() ^ drawn.keys()):
            lone, other = (files, "masks") if stem in files else (drawn, "images")
            raise ValueError(f"{lone[stem]} has no {other[:-1]}: put one of the same name into {folder / other}")
        for stem in sorted(files):
            name = files[stem].relative_to(root).as_posix()
            found.append(Pair(image=files[stem], mask=drawn[stem], name=name, split=split))
    if not found:
        raise ValueError(f"{parts[0][1] / 'images'} holds no images")
    return found


def _stem(path: Path) -> str:
    """The name without its ending: a.png, a.nii and a.nii.gz are of one."""
    suffix = next((s for s in reversed(NIFTI) if path.name.lower().endswith(s)), path.suffix)
    return path.name[: len(path.name) - len(suffix)]


def _of_table(table: Path) -> list[Pair]:
    header, rows = rows_of(table)
    if not {"image", "mask"} <= set(header) or not rows:
        raise ValueError(
            f"{table} needs the columns image and mask, and rows; it has {', '.join(header)} and {len(rows)} rows"
        )
    found = []
    for line, row in rows:
        image, mask = (table.parent / row[what] for what in ("image", "mask"))
        for what, path in (("image", image), ("mask", mask)):
            if not path.is_file() and not (what == "image" and path.is_dir() and series_files(path)):
                raise FileNotFoundError(f"{table} line {line}: there is no {what} {row[what]!r}")
        split = table_row_split(row.get("split", ""), f"{table} line {line}: {row['image']}")
        found.append(Pair(image=image, mask=mask, name=row["image"], patient=row.get("patient") or None, split=split))
    if repeated := len(found) - len({pair.name for pair in found}):
        raise ValueError(f"{table} names {repeated} images more than once")
    return found


def read_pairs(source: Path, pairs: Sequence[Pair], classes: tuple[str, ...], reading: Reading) -> Stored:
    """The pairs, read once.

    Raises:
        ValueError: a file that cannot be read, a mask that does not fit its image or has unknown classes; it is named.
    """
    try:
        grey = all(is_volume(pair.image) or is_grey(pair.image) for pair in pairs)
    except Damaged as error:
        raise ValueError(f"an image of {source} cannot be read: {error}") from error
    reading = replace(reading, grey=grey)
    files = [f for p in pairs for f in (*(series_files(p.image) if p.image.is_dir() else [p.image]), p.mask)]
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = [5, reading.size, grey, reading.window, reading.fit, list(classes), stamps]
    place = stored("masks", key, lambda folder: _read_all(source, folder, pairs, classes, reading))
    facts = read_json(place / "facts.json")
    spacings, counts = facts["spacing"], facts["rows"]
    of = tuple(i for i, count in enumerate(counts) for _ in range(count))
    return Stored(
        place=place,
        reading=reading,
        of=of,
        names=tuple(
            pair.name if count == 1 else f"{pair.name} {'window' if reading.fit == 'windows' else 'slice'} {z}"
            for pair, count in zip(pairs, counts, strict=True)
            for z in range(count)
        ),
        spacing=tuple((spacings[i][0], spacings[i][1]) for i in of) if all(spacings) else (),
        highest=tuple(facts["highest"]),
    )


def _count(image: Path, reading: Reading) -> int:
    """How many rows an image becomes."""
    if reading.fit == "windows":
        count, h, w = read_planes(image, reading).values.shape[:3]
        return count * len(window_corners(h, w, reading.size))
    return count_slices(image) if is_volume(image) else 1


def _squares(planes: Planes, masks: np.ndarray, reading: Reading) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each image with its mask as they are stored."""
    for plane, mask in zip(planes.values, masks, strict=True):
        if reading.fit != "windows":
            yield fitted(plane, reading), fitted(mask, reading, mask=True)
            continue
        whole = coloured(plane, reading)
        for corner in window_corners(mask.shape[0], mask.shape[1], reading.size):
            yield window(whole, corner, reading.size), window(mask, corner, reading.size)


def _read_all(source: Path, folder: Path, pairs: Sequence[Pair], classes: tuple[str, ...], reading: Reading) -> None:
    try:
        counts = [_count(pair.image, reading) for pair in pairs]
    except Damaged as error:
        raise ValueError(f"an image of {source} cannot be read: {error}") from error
    shape, colour = (sum(counts), reading.size, reading.size), () if reading.grey else (3,)
    pictures = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (*shape, *colour))
    drawn = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, shape)
    row, spacings, highest = 0, [], []
    for pair, count in zip(pairs, counts, strict=True):
        try:
            planes = read_planes(pair.image, reading)
        except Damaged as error:
            raise ValueError(f"{pair.image} cannot be read: {error}") from error
        masks = read_mask(pair.mask, planes, len(classes) or None)
        for z, (picture, mask) in enumerate(_squares(planes, masks, reading)):
            pictures[row + z], drawn[row + z] = picture, mask
        row += count
        highest.append(int(masks.max()))
        spacings.append(None if planes.spacing is None else _stored_spacing(planes, reading))
    pictures.flush()
    drawn.flush()
    write_json(folder / "facts.json", {"rows": counts, "highest": highest, "spacing": spacings})


def _stored_spacing(planes: Planes, reading: Reading) -> list[float]:
    """Millimetres between the pixels (down, across) as they are stored."""
    assert planes.spacing is not None
    if reading.fit == "windows":
        return list(planes.spacing)
    seen, shown = fitted_part(planes.values.shape[1], planes.values.shape[2], reading)
    pairs = zip(planes.spacing, seen, shown, strict=True)
    return [mm * (a.stop - a.start) / (b.stop - b.start) for mm, a, b in pairs]


def read_mask(path: Path, planes: Planes, known: int | None) -> np.ndarray:
    """(planes, h, w) uint8 classes of a mask that fits the planes of its image.

    Raises:
        ValueError: another size or place, colours, or values that are no class of ``known`` many; names the file.
    """
    from PIL import Image, UnidentifiedImageError

    count, h, w = planes.values.shape[:3]
    if is_nifti(path):
        try:
            raw = read_nifti(path)
        except Damaged as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        values = raw.values
        if values.shape == (count, h, w) and planes.affine is not None and raw.affine is not None:
            corners = np.array([[x, y, z, 1] for x in (0, w) for y in (0, h) for z in (0, count)])
            apart = np.linalg.norm(corners @ (raw.affine - planes.affine).T, axis=1).max()
            if apart > 0.5 * np.linalg.norm(planes.affine[:3, :3], axis=0).min():
                raise ValueError(f"{path} lies elsewhere than its image, up to {apart:.3g} mm: their affines differ")
    else:
        try:
            with Image.open(path) as image:
                if image.mode not in ("L", "P", "1"):
                    raise ValueError(f"{path} is no mask: it is {image.mode}, and a mask has one channel of eight bits")
                values = np.asarray(image, dtype=np.uint8)[None]
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a mask, a PNG or NIfTI file ({error})") from error
    if values.shape != (count, h, w):
        sizes = [" × ".join(map(str, reversed(shape[shape[0] == 1 :]))) for shape in (values.shape, (count, h, w))]
        raise ValueError(f"{path} is {sizes[0]}, and its image {sizes[1]}: they must be equal")
    found = np.unique(values)
    if not np.isin(found, np.arange(256)).all():
        raise ValueError(f"{path} is no mask: it holds {some([f'{v:g}' for v in found])}, and classes are 0, 1, … 255")
    whole = set(found.tolist()) <= {0, 255} and 255 in found
    classes: np.ndarray = (values > 0).astype(np.uint8) if whole else values.astype(np.uint8)
    if known is not None and classes.max() >= known:
        raise ValueError(
            f"{path} holds the label {classes.max()}, and there are {known} classes (0 to {known - 1}): name all with "
            "--data.classes background,…"
        )
    return classes
