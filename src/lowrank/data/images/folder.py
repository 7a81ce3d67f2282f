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
import json
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.data.images.decode import SUFFIXES, Damaged, Reading, image_files, is_grey, is_stray, read_image
from lowrank.data.images.medical import series_files, volumes_of
from lowrank.data.images.set import SOURCES, ImageSet, ImageSource, Kind, Options, Split, stored
from lowrank.data.images.splits import split_by_patient
from lowrank.data.split_names import SPLITS, split_of
from lowrank.infra.files import write_json
from lowrank.infra.text import some


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file with what is known of it. ``labels``: the names of its classes."""

    path: str
    labels: tuple[str, ...]
    patient: str
    split: str | None = None


def read_folder(source: str, options: Options) -> ImageSet:
    """The images of a folder as a set.

    Raises:
        ValueError: no images, damaged ones (named and counted), labels that do not fit, fractions for splits that exist
            already.
    """
    root = Path(source).expanduser()
    size = options.size if options.size is not None else 64 if options.volumes else 224
    depth = size if options.volumes else None
    reading = Reading(size=size, window=options.window, fit=options.fit, depth=depth)
    notes: list[str] = []
    if options.labels is not None:
        entries, several = _from_table(root, _table(root, options.labels), options.volumes)
    else:
        entries, several = _from_folders(root, notes, options.volumes), False
    if options.patient_pattern is not None:
        whose = patients_by(options.patient_pattern, [entry.path for entry in entries])
        entries = [replace(entry, patient=patient) for entry, patient in zip(entries, whose, strict=True)]
    classes = _in_order({label for entry in entries for label in entry.labels})
    kind = _kind(options.kind, classes, several, root)
    pixels, readable, digest = _pixels(root, [entry.path for entry in entries], reading, options.skip_damaged)
    labels = _encoded(entries, classes, kind)
    told = [(entry.split, entry.patient) for entry in entries]
    places = places_of(told, labels, options.val_fraction, options.test_fraction, root)
    splits = {}
    for name in SPLITS:
        chosen = [i for i, place in enumerate(places) if place == name and i in readable]
        splits[name] = Split(
            images=Rows(pixels, np.array(chosen, dtype=np.int64)),  # type: ignore[arg-type]
            labels=labels[chosen],
            names=tuple(entries[i].path for i in chosen),
            patients=tuple(entries[i].patient for i in chosen),
        )
    if not len(splits["train"]):
        raise ValueError(f"{root} leaves no image to train on")
    if left_out := len(entries) - len(readable):
        notes.append(f"{left_out} damaged images of {root} are left out")
    return ImageSet(
        name=root.name,
        kind=kind,
        classes=classes,
        splits=splits,
        notes=tuple(notes),
        pixels=digest,
        volumes=options.volumes,
    )


SOURCES.append(
    ImageSource(
        what="a folder",
        matches=lambda source: Path(source).expanduser().is_dir(),
        read=read_folder,
        takes=(
            *("size", "kind", "labels", "patient_pattern", "val_fraction", "test_fraction"),
            *("window", "fit", "skip_damaged", "volumes"),
        ),
    )
)


class Rows:
    """Some rows of a memory-mapped array, read when they are asked for; as much of an array as batches need."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array, self.rows = array, rows
        self.shape, self.dtype, self.ndim = (len(rows), *array.shape[1:]), array.dtype, array.ndim

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self.array[self.rows[index]])


# --- files and labels ------------------------------------------------------------------------------------------------


def _from_folders(root: Path, notes: list[str], volumes: bool) -> list[Entry]:
    """A folder a class, below the splits' folders if there are any; ``notes`` gets what is passed over."""
    below = _subfolders(root, notes)
    divided = _are_splits(root, below)
    entries = []
    for base in below:
        for folder in _subfolders(base, notes) if divided else [base]:
            for path in volumes_of(image_files(folder)) if volumes else image_files(folder):
                relative = path.relative_to(root).as_posix()
                split = split_of(base.name) if divided else None
                entries.append(Entry(path=relative, labels=(folder.name,), patient=relative, split=split))
    beside = [path for place in ([root, *below] if divided else [root]) for path in image_files(place, deep=False)]
    if not entries:
        hint = f"; it holds {len(beside)} images directly: their classes need --labels labels.csv" if beside else ""
        raise ValueError(f"{root} has no folders of images ({', '.join(SUFFIXES)}), one a class{hint}")
    if beside:
        named = some([path.relative_to(root).as_posix() for path in beside])
        notes.append(f"{len(beside)} images of {root} are in no class's folder, and left out: {named}")
    return entries


def _subfolders(folder: Path, notes: list[str]) -> list[Path]:
    """The folders in it that hold images somewhere; hidden and empty ones are none."""
    every = sorted(child for child in folder.iterdir() if child.is_dir())
    found = [child for child in every if not is_stray(child.name) and image_files(child)]
    if passed := [child.name for child in every if child not in found]:
        notes.append(f"folders of {folder} that are hidden or hold no images are passed over: {some(passed)}")
    return found


def _are_splits(root: Path, below: Sequence[Path]) -> bool:
    """Whether the folders are splits.

    Raises:
        ValueError: some are and others are not, or one split has two folders.
    """
    splits = [split for folder in below if (split := split_of(folder.name))]
    if "train" not in splits and not any(_holds_classes(folder) for folder in below if split_of(folder.name)):
        return False  # a class may be called "test"
    others = [folder.name for folder in below if not split_of(folder.name)]
    if others:
        named = some([folder.name for folder in below if split_of(folder.name)])
        raise ValueError(
            f"{root} holds the splits {named} and beside them {some(others)}: move these elsewhere, or say what each "
            "image is with --labels labels.csv"
        )
    if "train" not in splits or len(splits) != len(set(splits)):
        raise ValueError(
            f"{root} holds the splits {some([folder.name for folder in below])}: there must be one train, and at most "
            "one val and one test"
        )
    return True


def _holds_classes(folder: Path) -> bool:
    return any(child.is_dir() and not is_stray(child.name) for child in folder.iterdir())


def table_row_split(told: str, where: str) -> str | None:
    """The split that a table's row names, if it names one."""
    if told.strip() and not split_of(told.strip()):
        raise ValueError(f"{where} is in the split {told.strip()!r}; there are {', '.join(SPLITS)}")
    return split_of(told.strip())


def _table(root: Path, labels: str) -> Path:
    """The table as it was given, or below the folder."""
    path = Path(labels).expanduser()
    return path if path.is_file() or not (root / labels).is_file() else root / labels


def _from_table(root: Path, table: Path, volumes: bool) -> tuple[list[Entry], bool]:
    """The entries of a table, and whether an image may have several labels."""
    header, rows = rows_of(table)
    which = "labels" if "labels" in header else "label"
    if not {"path", which} <= set(header) or {"label", "labels"} <= set(header) or not rows:
        raise ValueError(
            f"{table} needs the columns path and label (or labels), one of them, and rows; it has "
            f"{', '.join(header)} and {len(rows)} rows"
        )
    entries = []
    for line, row in rows:
        parts = re.split(r"[|;]", row[which]) if which == "labels" else [row[which]]
        labels = tuple(part.strip() for part in parts if part.strip())
        if which == "label" and not labels:
            raise ValueError(f"{table} line {line}: {row['path']} has no label")
        split = table_row_split(row.get("split", ""), f"{table} line {line}: {row['path']}")
        patient = row.get("patient") or row["path"]
        entries.append(Entry(path=row["path"], labels=labels, patient=patient, split=split))
    missing = [
        entry.path
        for entry in entries
        if not (root / entry.path).is_file() and not (volumes and (root / entry.path).is_dir())
    ]
    if missing:
        raise ValueError(f"{len(missing)} of {len(entries)} files in {table} are not in {root}: {some(missing)}")
    if repeated := len(entries) - len({entry.path for entry in entries}):
        raise ValueError(f"{table} names {repeated} files more than once")
    return entries, which == "labels"


def rows_of(table: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The header of a CSV file, and each row with its line, by the header's names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a row that does not fit the header, a stray quote, no UTF-8; the line is named.
    """
    if not table.is_file():
        raise FileNotFoundError(f"there is no table of labels {table}")
    line, found = 1, []
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, strict=True, delimiter=max(",;\t", key=first.count))
            header = next(reader, [])
            for row in reader:
                line = reader.line_num
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{table} line {line} has {len(row)} cells, and the header {len(header)}: "
                        f"{', '.join(header)}; a cell that holds a separator needs quotes"
                    )
                if row:
                    found.append((line, dict(zip(header, row, strict=True))))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{table} after line {line}: {error}") from error
    if repeated := {name for name in header if header.count(name) > 1}:
        raise ValueError(f"{table} has several columns {', '.join(sorted(repeated))}")
    return header, found


def patients_by(pattern: str, paths: Sequence[str]) -> list[str]:
    """The patient of each path, by the first group of ``data.patient_pattern``."""
    needs = "it needs a group, such as '(patient\\d+)'"
    try:
        patient = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"data.patient_pattern={pattern!r} is no regular expression ({error}); {needs}") from error
    found = []
    for path in paths:
        match = patient.search(path)
        if not match or not match.groups() or match[1] is None:
            raise ValueError(f"data.patient_pattern={pattern!r} finds no patient in {path}; {needs}")
        found.append(match[1])
    return found


def _in_order(names: set[str]) -> tuple[str, ...]:
    """Names in order; numbers as numbers, so that grade 10 follows 9."""
    numbers = all(name.isdecimal() for name in names)
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


def places_of(
    told: Sequence[tuple[str | None, str]],
    labels: np.ndarray,
    val_fraction: float | None,
    test_fraction: float | None,
    root: Path,
) -> list[str]:
    """The split of each image of ``told`` (split or None, patient): the source's own where it has splits; a missing
    ``val`` is cut out of its ``train``.

    Raises:
        ValueError: a fraction for a split that exists; a patient in two splits; nothing to train on.
    """
    given = {split for split, _ in told} - {None}
    for name, fraction in (("val", val_fraction), ("test", test_fraction)):
        if fraction is not None and name in given:
            raise ValueError(f"{root} has its own {name} split: leave data.{name}_fraction out")
    where: dict[str, set[str]] = {}
    for split, patient in told:
        where.setdefault(patient, set()).add(split or "train")
    parted = {p: " and ".join(s for s in SPLITS if s in where[p]) for p in sorted(where) if len(where[p]) > 1}
    if parted:
        raise ValueError(
            f"patients of {root} are in several splits: {some([f'{p} in {both}' for p, both in parted.items()])}; what "
            "is learnt of a patient must not be tested on the same"
        )
    val = (0.0 if "val" in given else 0.15) if val_fraction is None else val_fraction
    test = (0.0 if given else 0.15) if test_fraction is None else test_fraction
    open_ones = [i for i, (split, _) in enumerate(told) if split in (None, "train")]
    if not open_ones:
        raise ValueError(
            f"{root} leaves no image to train on: all are in the splits {', '.join(sorted(filter(None, given)))}"
        )
    made = split_by_patient(labels[open_ones], [told[i][1] for i in open_ones], val, test)
    places = [split or "train" for split, _ in told]
    for i, place in zip(open_ones, made, strict=True):
        places[i] = place
    return places


# --- pixels ----------------------------------------------------------------------------------------------------------


def _pixels(root: Path, paths: Sequence[str], reading: Reading, skip_damaged: bool) -> tuple[np.ndarray, set[int], str]:
    """The images as one array, a row a file; the rows that could be read; a digest of it all."""
    files = [
        (path, file.stat())
        for path in paths
        for file in (series_files(root / path) if (root / path).is_dir() else [root / path])
    ]
    key = [str(root.resolve()), repr(reading), skip_damaged, [(p, s.st_size, s.st_mtime_ns) for p, s in files]]
    folder = stored(root.name, key, lambda empty: _decode_all(root, paths, reading, skip_damaged, empty))
    readable = set(json.loads((folder / "readable.json").read_text()))
    return np.load(folder / "images.npy", mmap_mode="r"), readable, (folder / "digest").read_text()


def _decode_all(root: Path, paths: Sequence[str], reading: Reading, skip_damaged: bool, folder: Path) -> None:
    damaged: dict[int, str] = {}

    def attempt(what: Callable[[int], Any]) -> list[Any]:
        """What it gives for each image that is not damaged, on several threads."""

        def one(i: int) -> Any:
            try:
                return what(i)
            except Damaged as error:
                damaged[i] = str(error)
                return True

        with ThreadPoolExecutor() as pool:
            return list(pool.map(one, [i for i in range(len(paths)) if i not in damaged]))

    if reading.depth is None:
        reading = replace(reading, grey=all(attempt(lambda i: is_grey(root / paths[i]))))
        shape: tuple[int, ...] = (len(paths), reading.size, reading.size, *(() if reading.grey else (3,)))
    else:
        shape = (len(paths), reading.depth, reading.size, reading.size)
    array = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    attempt(lambda i: array.__setitem__(i, read_image(root / paths[i], reading)))
    array.flush()
    _refuse_damaged(root, paths, damaged, skip_damaged)
    write_json(folder / "readable.json", [i for i in range(len(paths)) if i not in damaged], indent=None)


def _refuse_damaged(root: Path, paths: Sequence[str], damaged: dict[int, str], skip_damaged: bool) -> None:
    if not damaged:
        return
    named = some([f"{paths[i]} ({why})" for i, why in sorted(damaged.items())])
    if len(damaged) == len(paths):
        raise ValueError(f"none of the {len(paths)} images in {root} can be read: {named}")
    text = f"{len(damaged)} of {len(paths)} images in {root} cannot be read: {named}"
    if not skip_damaged:
        raise ValueError(f"{text}; mend or remove them, or leave them out with --data.skip_damaged true")
    print(f"{text}; left out", file=sys.stderr)
