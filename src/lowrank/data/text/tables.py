"""Tables of text: CSV, TSV, JSON lines and Parquet, gzipped or not, a document a row, read row by row."""

import csv
import difflib
import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lowrank.infra.extras import import_extra

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
TEXT_COLUMNS = (
    "text",
    "article",
    "content",
    "document",
    "story",
    "body",
    "passage",
    "sentence",
    "abstract",
    "review",
    "output",
)


def rows(file: Path, column: str | None) -> Iterator[Any]:
    """The text column of each row, in order: strings, or whatever else the file holds there (None if nothing)."""
    kind = kind_of(file)
    if kind == ".parquet":
        return _parquet_rows(file, column)
    return _csv_rows(file, column) if kind in (".csv", ".tsv") else _json_rows(file, column)


def _csv_rows(file: Path, column: str | None) -> Iterator[Any]:
    with open_binary(file) as stream, _naming(file):
        reader = _csv_reader(file, stream)
        _, index = _choose(file, next(reader, []), column)
        for row in reader:
            if row and len(row) <= index:
                raise ValueError(
                    f"{file}, line {reader.line_num}: {len(row)} columns, but the text is in column {index + 1}"
                )
            if row:
                yield row[index]


def _csv_reader(file: Path, stream: BinaryIO) -> Any:
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # the default refuses documents above 128 KiB
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    return csv.reader(text, delimiter="\t" if kind_of(file) == ".tsv" else ",")


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors of the csv module and of its decoding, with the file and the remedy."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{file} is not UTF-8 (byte 0x{byte:02x}); convert it, for example with `iconv`") from error
    except csv.Error as error:
        raise ValueError(f"{file} is not a table that can be read: {error}") from error


def _json_rows(file: Path, column: str | None) -> Iterator[Any]:
    chosen: str | None = None
    for number, row in _json_lines(file):
        if isinstance(row, str):
            yield row
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: {type(row).__name__}; each line must be an object or a string")
        if chosen is None:
            chosen, _ = _choose(file, list(row), column)
        if chosen not in row:
            raise ValueError(
                f"{file}, line {number}: no {chosen!r}, only {', '.join(map(repr, row)) or 'an empty object'}"
            )
        yield row[chosen]


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    with open_binary(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{file}, line {number}: not JSON ({error}); one JSON value a line is expected"
                ) from error


def _parquet_rows(file: Path, column: str | None) -> Iterator[Any]:
    with _parquet(file) as table:
        chosen, _ = _choose(file, table.schema_arrow.names, column)
        for batch in table.iter_batches(batch_size=256, columns=[chosen]):
            yield from batch.column(0).to_pylist()


def _parquet(file: Path) -> Any:
    parquet = import_extra("pyarrow.parquet", "text")
    try:
        return parquet.ParquetFile(file)
    except ValueError as error:
        raise ValueError(f"{file} is not a Parquet file, or damaged ({error})") from error


def check_columns(file: Path, column: str | None) -> None:
    """Find the text column now, so that a wrong one is an error before any work."""
    kind = kind_of(file)
    if kind == ".parquet":
        with _parquet(file) as table:
            _choose(file, table.schema_arrow.names, column)
    elif kind in (".csv", ".tsv"):
        with open_binary(file) as stream, _naming(file):
            _choose(file, next(_csv_reader(file, stream), []), column)
    else:
        _, row = next(_json_lines(file), (0, ""))
        if isinstance(row, dict):
            _choose(file, list(row), column)


def _choose(file: Path, columns: Sequence[str], column: str | None) -> tuple[str, int]:
    """The text column's name and place."""
    have = ", ".join(map(repr, columns)) or "none"
    if column is not None:
        if column in columns:
            return column, list(columns).index(column)
        near = difflib.get_close_matches(column, columns, n=1)
        raise ValueError(
            f"{file} has no column {column!r}; it has {have}{f' (did you mean {near[0]!r}?)' if near else ''}"
        )
    by_lower = {name.lower(): name for name in columns}
    known = [by_lower[name] for name in TEXT_COLUMNS if name in by_lower]
    if not known and len(columns) != 1:
        raise ValueError(
            f"{file} has no column of a usual name ({', '.join(TEXT_COLUMNS[:4])}, …); say which: column=… of {have}"
        )
    chosen = known[0] if known else columns[0]
    return chosen, list(columns).index(chosen)


def kind_of(file: Path) -> str:
    """The lower-case suffix, without a ``.gz`` after it."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] == ".gz" and len(suffixes) > 1:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def compressed(file: Path) -> bool:
    return file.suffix.lower() in (".gz", ".parquet")


def open_binary(file: Path) -> BinaryIO:
    opener: Callable[..., Any] = gzip.open if file.suffix.lower() == ".gz" else open
    return opener(file, "rb")
