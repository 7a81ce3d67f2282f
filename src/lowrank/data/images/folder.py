"""People's own images: a folder a class, or a folder with a table of labels.

    folder/<class>/….png                      splits are made here, never parting a patient
    folder/{train,val,test}/<class>/….png     splits as they are (``val`` may be missing)
    folder/….png and labels.csv               columns ``path``, ``label`` or ``labels`` (several, separated by | or ;),
                                              perhaps ``patient``, ``split``

Every file is decoded once, into one memory-mapped array in the cache, so that a damaged one is found before training
and no batch waits for a decoder.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.data.cache import cache_root, locked, published, remove_leftovers
from lowrank.data.images.decode import SUFFIXES, Damaged, Fit, check_fit, check_window, is_grey, read_image
from lowrank.data.images.set import SPLITS, ImageSet, Kind, Split
from lowrank.data.images.splits import split_by_patient

SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How files become arrays. ``skip_damaged``: leave out what cannot be read instead of refusing the whole."""

    size: int = 224
    window: str = "auto"
    fit: Fit = "pad"
    skip_damaged: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"data.size={self.size} must be at least 1")
        check_window(self.window)
        check_fit(self.fit)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file with what is known of it. ``labels``: the names of its classes."""

    path: str
    labels: tuple[str, ...]
    patient: str
    split: str | None = None


def read_folder(
    root: Path,
    decoding: Decoding,
    *,
    table: Path | None = None,
    kind: Kind | None = None,
    patient_pattern: str | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
) -> ImageSet:
    """The images of a folder as a set.

    Args:
        root: the folder.
        decoding: how files become arrays.
        table: the labels, where they are not the names of folders.
        kind: of the task; by default it follows from the labels.
        patient_pattern: a regular expression whose first group, found in a file's path, is the patient.
        val_fraction, test_fraction: shares of the patients to hold out where the source has no splits of its own.

    Raises:
        ValueError: no images, damaged ones (named and counted), labels that do not fit, fractions for splits that exist
            already.
    """
    entries = _from_table(root, table) if table is not None else _from_folders(root)
    if patient_pattern is not None:
        entries = [_with_patient(entry, patient_pattern) for entry in entries]
    found, several = _classes(entries, table), any(len(entry.labels) != 1 for entry in entries)
    kind = _kind(kind, found, several or (table is not None and _has_column(table, "labels")), root)
    pixels, readable = _pixels(root, [entry.path for entry in entries], decoding)
    labels = _encoded(entries, found, kind)
    places = _splits(entries, labels, val_fraction, test_fraction, root)
    splits = {}
    for name in SPLITS:
        chosen = [i for i, place in enumerate(places) if place == name and i in readable]
        splits[name] = Split(
            images=_Rows(pixels, np.array(chosen, dtype=np.int64)),  # type: ignore[arg-type]
            labels=labels[chosen],
            names=tuple(entries[i].path for i in chosen),
            patients=tuple(entries[i].patient for i in chosen),
        )
    if not len(splits["train"]):
        raise ValueError(f"{root} leaves no image to train on")
    left_out = len(entries) - len(readable)
    notes = (f"{left_out} damaged images of {root} are left out",) if left_out else ()
    return ImageSet(name=root.name, kind=kind, classes=found, splits=splits, notes=notes)


class _Rows:
    """Some rows of a memory-mapped array, read when they are asked for; as much of an array as batches need."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array, self.rows = array, rows
        self.shape, self.dtype, self.ndim = (len(rows), *array.shape[1:]), array.dtype, array.ndim

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self.array[self.rows[index]])


# --- files and labels ------------------------------------------------------------------------------------------------


def _from_folders(root: Path) -> list[Entry]:
    """A folder a class, below the splits' folders if there are any."""
    below = sorted(child.name for child in root.iterdir() if child.is_dir())
    named = {name: SPLIT_NAMES.get(name.lower(), name.lower()) for name in below}
    divided = "train" in named.values() and set(named.values()) <= set(SPLITS)
    entries = []
    for name in below:
        split = named[name] if divided else None
        base = root / name
        classes = sorted(child for child in base.iterdir() if child.is_dir()) if divided else [base]
        for folder in classes:
            for path in _files(folder):
                relative = path.relative_to(root).as_posix()
                entries.append(Entry(path=relative, labels=(folder.name,), patient=relative, split=split))
    if not entries:
        loose = len(_files(root, deep=False))
        hint = f"; it holds {loose} images directly: their classes need --labels labels.csv" if loose else ""
        raise ValueError(f"{root} has no folders of images ({', '.join(SUFFIXES)}), one a class{hint}")
    return entries


def _files(folder: Path, deep: bool = True) -> list[Path]:
    found = folder.rglob("*") if deep else folder.glob("*")
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def _has_column(table: Path, name: str) -> bool:
    with open(table, newline="", encoding="utf-8-sig") as file:
        return name in (next(csv.reader(file), []))


def _from_table(root: Path, table: Path) -> list[Entry]:
    if not table.is_file():
        raise FileNotFoundError(f"there is no table of labels {table}")
    with open(table, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    columns = set(rows[0]) if rows else set()
    which = "labels" if "labels" in columns else "label"
    if not {"path", which} <= columns:
        raise ValueError(
            f"{table} needs the columns path and label (or labels); it has {', '.join(columns) or 'no rows'}"
        )
    entries = []
    for row in rows:
        text = row[which].strip()
        labels = (
            tuple(part.strip() for part in re.split(r"[|;]", text) if part.strip()) if which == "labels" else (text,)
        )
        entries.append(
            Entry(path=row["path"], labels=labels, patient=row.get("patient") or row["path"], split=_place(row, table))
        )
    missing = [entry.path for entry in entries if not (root / entry.path).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(entries)} files in {table} are not in {root}: {_some(missing)}")
    repeated = len(entries) - len({entry.path for entry in entries})
    if repeated:
        raise ValueError(f"{table} names {repeated} files more than once")
    return entries


def _place(row: dict[str, str], table: Path) -> str | None:
    text = (row.get("split") or "").strip().lower()
    name = SPLIT_NAMES.get(text, text)
    if name and name not in SPLITS:
        raise ValueError(f"{table}: {row['path']} is in the split {text!r}; there are {', '.join(SPLITS)}")
    return name or None


def _with_patient(entry: Entry, pattern: str) -> Entry:
    found = re.search(pattern, entry.path)
    if not found or not found.groups():
        raise ValueError(
            f"data.patient_pattern={pattern!r} finds no patient in {entry.path}; "
            "it needs a group, such as '(patient\\d+)'"
        )
    return Entry(path=entry.path, labels=entry.labels, patient=found[1], split=entry.split)


def _classes(entries: Sequence[Entry], table: Path | None) -> tuple[str, ...]:
    """Names in order; numbers as numbers, so that grade 10 follows 9."""
    names = {label for entry in entries for label in entry.labels}
    if "" in names:
        unlabelled = [entry.path for entry in entries if "" in entry.labels]
        raise ValueError(f"{len(unlabelled)} files in {table} have no label: {_some(unlabelled)}")
    numbers = all(name.isdigit() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def _kind(kind: Kind | None, classes: tuple[str, ...], several: bool, root: Path) -> Kind:
    if several:
        if kind not in (None, "multi-label"):
            raise ValueError(f"data.kind={kind}: images of {root} have several labels or none: the task is multi-label")
        return "multi-label"
    return kind or ("binary" if len(classes) == 2 else "multi-class")


def _encoded(entries: Sequence[Entry], classes: tuple[str, ...], kind: Kind) -> np.ndarray:
    number = {name: i for i, name in enumerate(classes)}
    if kind != "multi-label":
        return np.array([number[entry.labels[0]] for entry in entries], dtype=np.int64)
    labels = np.zeros((len(entries), len(classes)), dtype=np.uint8)
    for i, entry in enumerate(entries):
        labels[i, [number[name] for name in entry.labels]] = 1
    return labels


def _splits(
    entries: Sequence[Entry], labels: np.ndarray, val_fraction: float | None, test_fraction: float | None, root: Path
) -> list[str]:
    """The split of each image: the source's own where it has splits; a missing ``val`` is cut out of its ``train``."""
    given = {entry.split for entry in entries} - {None}
    for split, fraction in (("val", val_fraction), ("test", test_fraction)):
        if fraction is not None and split in given:
            raise ValueError(f"{root} has its own {split} split: leave data.{split}_fraction out")
    val = (0.0 if "val" in given else 0.15) if val_fraction is None else val_fraction
    test = (0.0 if given else 0.15) if test_fraction is None else test_fraction
    open_ones = [i for i, entry in enumerate(entries) if entry.split in (None, "train")]
    made = split_by_patient(labels[open_ones], [entries[i].patient for i in open_ones], val, test)
    places = [entry.split or "train" for entry in entries]
    for i, place in zip(open_ones, made, strict=True):
        places[i] = place
    return places


# --- pixels ----------------------------------------------------------------------------------------------------------


def _pixels(root: Path, paths: Sequence[str], decoding: Decoding) -> tuple[np.ndarray, set[int]]:
    """The images as one array, a row a file, and the rows that could be read."""
    stats = [(path, (root / path).stat()) for path in paths]
    key = json.dumps([str(root.resolve()), *((p, s.st_size, s.st_mtime_ns) for p, s in stats), repr(decoding)])
    final = cache_root() / "images" / f"{root.name}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
    if not final.is_dir():
        with locked(final) as held:
            if not final.is_dir():
                if held:
                    remove_leftovers(final)
                _decode_all(root, paths, decoding, final)
    readable = set(json.loads((final / "readable.json").read_text()))
    return np.load(final / "images.npy", mmap_mode="r"), readable


def _decode_all(root: Path, paths: Sequence[str], decoding: Decoding, final: Path) -> None:
    damaged: dict[int, str] = {}

    def grey(i: int) -> bool:
        try:
            return is_grey(root / paths[i])
        except Damaged as error:
            damaged[i] = str(error)
            return True

    with ThreadPoolExecutor() as pool, published(final) as folder:
        all_grey = all(list(pool.map(grey, range(len(paths)))))
        shape = (len(paths), decoding.size, decoding.size) + (() if all_grey else (3,))
        array = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)

        def decode(i: int) -> None:
            try:
                array[i] = read_image(
                    root / paths[i], decoding.size, grey=all_grey, window=decoding.window, fit=decoding.fit
                )
            except Damaged as error:
                damaged[i] = str(error)

        list(pool.map(decode, [i for i in range(len(paths)) if i not in damaged]))
        array.flush()
        _refuse_damaged(root, paths, damaged, decoding)
        (folder / "readable.json").write_text(json.dumps([i for i in range(len(paths)) if i not in damaged]))


def _refuse_damaged(root: Path, paths: Sequence[str], damaged: dict[int, str], decoding: Decoding) -> None:
    if not damaged:
        return
    named = _some([f"{paths[i]} ({why})" for i, why in sorted(damaged.items())])
    if len(damaged) == len(paths):
        raise ValueError(f"none of the {len(paths)} images in {root} can be read: {named}")
    text = f"{len(damaged)} of {len(paths)} images in {root} cannot be read: {named}"
    if not decoding.skip_damaged:
        raise ValueError(f"{text}; mend or remove them, or leave them out with --data.skip_damaged true")
    print(f"{text}; left out", file=sys.stderr)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
