"""Rows to make examples of, from files, folders, data sets that were saved, and sources with a name, by split.

What is not divided already is divided by a hash of each row: of many rows each goes where its own hash says, so that it
does not depend on the others; of few the lowest hashes are held out, so that the shares are met.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lowrank.data.split_names import SPLITS
from lowrank.data.text.files import by_split, files_of, nearest_names
from lowrank.data.text.source import SOURCES
from lowrank.data.text.splits import FEW_DOCUMENTS, check_fractions
from lowrank.data.text.tables import TABLES, kind_of, open_binary, records, saved_dataset

Row = tuple[str, dict[str, Any]]  # where it stands, and its cells by column
Rows = Iterator[Row]


def open_rows(source: str, delimiter: str | None) -> dict[str, Callable[[], Rows]]:
    """By split, a function that starts reading (where, row)."""
    path = Path(source).expanduser()
    if source in SOURCES:
        opened = SOURCES[source].open()
        return {split: partial(_documents, opened, split) for split in opened.splits}
    if not path.exists():
        raise FileNotFoundError(
            f"no file or folder {source!r} and no source of that name{nearest_names(path)} "
            f"(sources: {', '.join(SOURCES)})"
        )
    if (saved := saved_dataset(path)) is not None:
        return {split: partial(_saved_rows, path, saved[split]) for split in SPLITS if split in saved}
    files = by_split(path, files_of(path))
    return {split: partial(_file_rows, own, delimiter) for split, own in files.items()}


def _documents(opened: Any, split: str) -> Rows:
    return ((f"{opened.name}, document {n}", {"text": text}) for n, text in enumerate(opened.documents(split), 1))


def _saved_rows(path: Path, rows: Any) -> Rows:
    return ((f"{path}, row {n}", dict(row)) for n, row in enumerate(rows, 1))


def _file_rows(files: Sequence[Path], delimiter: str | None) -> Rows:
    return chain.from_iterable(
        records(file, delimiter) if kind_of(file) in TABLES else _text_file(file) for file in files
    )


def _text_file(file: Path) -> Rows:
    with open_binary(file) as stream:
        try:
            yield str(file), {"text": stream.read().decode()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: convert it, for example with `iconv`") from error


def divided_rows(
    opened: Mapping[str, Callable[[], Rows]], val_fraction: float | None, test_fraction: float | None
) -> dict[str, list[Row]]:
    """Rows by split: the source's own where it has them, else by a hash of each row."""
    rows = {split: list(read()) for split, read in opened.items()}
    val, test = check_fractions("the data", rows, val_fraction, test_fraction)
    return rows | _held_out(rows["train"], {"test": test, "val": val})


def _held_out(rows: list[Row], shares: Mapping[str, float]) -> dict[str, list[Any]]:
    """``rows`` divided: of many, each goes where its own hash says; of few, the lowest hashes are held out."""
    places = [_place(row) for _, row in rows]
    order = sorted(range(len(rows)), key=lambda n: places[n])
    limits: dict[str, float] = {}
    bound, taken = 0.0, 0
    for split, share in shares.items():
        if not share:
            continue
        bound += share
        taken += max(1, round(share * len(rows)))
        few = len(rows) < FEW_DOCUMENTS
        limits[split] = (places[order[taken]] if taken < len(rows) else 1.0) if few else bound
    found: dict[str, list[Any]] = {"train": [], **{split: [] for split in limits}}
    for place, row in zip(places, rows, strict=True):
        found[next((split for split, limit in limits.items() if place < limit), "train")].append(row)
    if not found["train"]:
        raise ValueError(f"{len(rows)} rows leave nothing to train on: give more, or set val_fraction 0")
    return {split: part for split, part in found.items() if part}


def _place(row: Mapping[str, Any]) -> float:
    text = json.dumps(row, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") / 2**64
