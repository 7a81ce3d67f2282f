"""Rows of tables: CSV and TSV, JSON lines and arrays, Parquet, each gzipped or not; and folders that `datasets` saved.

``rows`` reads the text column alone, ``records`` whole rows. Both read in bounded memory, but for a JSON array, which
has to be read whole.
"""

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lowrank.data.split_names import SPLIT_NAMES
from lowrank.infra.extras import import_extra

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
DELIMITERS = (",", ";", "\t", "|")
TEXT_COLUMNS = (
    *("text", "article", "content", "document", "story", "body"),
    *("passage", "sentence", "abstract", "review", "output"),
)


def rows(file: Path, column: str | None, delimiter: str | None = None) -> Iterator[Any]:
    """The text column of each row, in order: strings, or whatever else the file holds there (None if nothing).

    CSV and JSON lines are read by Python's own modules and not by pyarrow, whose streaming readers have a limit on a
    row's length, infer types and cannot say in which line a damaged row begins.
    """
    kind = kind_of(file)
    if kind == ".parquet":
        return _parquet_rows(file, column)
    if kind not in (".csv", ".tsv"):
        return _json_rows(file, column)
    delimiter, header = layout(file, column, delimiter)
    _, index = choose(file, header, column)
    return (row[index] for row in _csv_rows(file, delimiter, header))


def check_columns(file: Path, column: str | None, delimiter: str | None) -> None:
    """Find the text column now, so that a wrong one is an error before any work."""
    kind = kind_of(file)
    with naming(file):
        if kind == ".parquet":
            with open_parquet(file) as table:
                choose(file, table.schema_arrow.names, column)
        elif kind in (".csv", ".tsv"):
            choose(file, layout(file, column, delimiter)[1], column)
        else:
            _, row = next(json_lines(file), (0, ""))
            if isinstance(row, dict):
                choose(file, list(row), column)


def _csv_rows(file: Path, delimiter: str, header: Sequence[str]) -> Iterator[list[str]]:
    """The rows below the header, each with as many cells."""
    lines = csv_lines(file, delimiter)
    next(lines, None)
    for line, row in lines:
        if len(row) != len(header):
            raise ValueError(
                f"{file}, line {line}: {len(row)} cells, but the header has {len(header)} "
                f"({', '.join(map(repr, header))}); put a cell that holds {delimiter!r} or a line end into quotes, or "
                "say what stands between cells: delimiter=…"
            )
        yield row


def layout(file: Path, column: str | None, delimiter: str | None) -> tuple[str, list[str]]:
    """The delimiter and the header: as told, else by the first delimiter under which the text column has its name,
    else by the one that makes most columns."""
    usual = "\t" if kind_of(file) == ".tsv" else ","
    candidates = (delimiter,) if delimiter else (usual, *(other for other in DELIMITERS if other != usual))
    found: list[tuple[str, list[str]]] = []
    for candidate in candidates:
        try:
            header = next(csv_lines(file, candidate), (0, []))[1]
        except _BadRow:
            if candidate == candidates[-1] and not found:
                raise
            continue
        if delimiter and len(header) == 1 and any(other in header[0] for other in DELIMITERS):
            raise ValueError(f"{file}: the header {header[0]!r} has no {delimiter!r} in it: is delimiter= another?")
        found.append((candidate, header))
        if column in header or (column is None and {name.lower() for name in header} & set(TEXT_COLUMNS)):
            return found[-1]
    return max(found, key=lambda each: len(each[1]))


class _BadRow(ValueError):
    """A row of a table that is not written as CSV."""


def records(file: Path, delimiter: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each row, in order; a row that is only text stands under the column ``text``.

    Raises:
        ValueError: damaged, or rows that are neither objects nor text.
    """
    with naming(file):
        if kind_of(file) == ".parquet":
            with open_parquet(file) as table:
                found = (row for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist())
                yield from ((f"{file}, row {number}", row) for number, row in enumerate(found, 1))
        elif kind_of(file) in (".csv", ".tsv"):
            delimiter, header = layout(file, None, delimiter)
            for number, row in enumerate(_csv_rows(file, delimiter, header), 1):
                yield f"{file}, row {number}", dict(zip(header, row, strict=True))
        else:
            for number, row in json_lines(file):
                where = f"{file}, line {number}"
                if not isinstance(row, (dict, str)):
                    raise ValueError(f"{where}: {type(row).__name__}; each row must be an object or a string")
                yield where, {"text": row} if isinstance(row, str) else row


def saved_dataset(folder: Path) -> Mapping[str, Any] | None:
    """The splits, by our names for them, of a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` has
    written; None of any other folder."""
    single = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    if not single and not (folder / "dataset_dict.json").is_file():
        return None
    try:
        found = import_extra("datasets", "text").load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} looks like a saved data set and cannot be opened: {error}") from error
    if single:
        return {"train": found}
    named = {SPLIT_NAMES.get(name.lower(), name): split for name, split in found.items()}
    return named if "train" in named else {"train": next(iter(named.values()))}


def csv_lines(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, the header too, each with the number of the line in which it begins."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # the default refuses documents above 128 KiB
    with open_binary(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise _BadRow(
                    f"{file}, line {line}: {error}; a cell that begins with a quote must end with one, and a quote in "
                    "it is written twice"
                ) from error
            if row:
                yield line, row


def _json_rows(file: Path, column: str | None) -> Iterator[Any]:
    chosen: str | None = None
    for number, row in json_lines(file):
        if isinstance(row, str):
            yield row
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: {type(row).__name__}; each line must be an object or a string")
        if chosen is None:
            chosen, _ = choose(file, list(row), column)
        if chosen not in row:
            raise ValueError(
                f"{file}, line {number}: no {chosen!r}, only {', '.join(map(repr, row)) or 'an empty object'}"
            )
        yield row[chosen]


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Values with the number of their line; of a ``.json`` file that holds one array, with their place in it."""
    with open_binary(file) as stream:
        if kind_of(file) == ".json" and stream.peek(64).lstrip()[:1] == b"[":  # type: ignore[attr-defined]
            yield from enumerate(_array(file, stream), 1)
            return
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{file}, line {number}: not JSON ({error}); one JSON value a line is expected"
                ) from error


def _array(file: Path, stream: BinaryIO) -> list[Any]:
    try:
        return json.load(stream, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); an array of rows is expected, or a row a line") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(name for name in names if names.count(name) > 1)!r} twice")
    return made


def _parquet_rows(file: Path, column: str | None) -> Iterator[Any]:
    with open_parquet(file) as table:
        chosen, _ = choose(file, table.schema_arrow.names, column)
        for batch in table.iter_batches(batch_size=256, columns=[chosen]):
            yield from batch.column(0).to_pylist()


def open_parquet(file: Path) -> Any:
    return import_extra("pyarrow.parquet", "text").ParquetFile(file)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Errors of the libraries that read, with the file and the remedy."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{file} is not UTF-8 (byte 0x{byte:02x}); convert it, for example with `iconv`") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is cut short or damaged ({error}): get it again") from error
    except (ValueError, OSError, NotImplementedError) as error:
        if kind_of(file) != ".parquet" or str(file) in str(error):
            raise
        raise ValueError(f"{file} is not a Parquet file, or damaged ({error})") from error


def choose(file: Path, columns: Sequence[str], column: str | None) -> tuple[str, int]:
    """The text column's name and place.

    Raises:
        ValueError: there is none, or more than one, of the name told or of a usual one.
    """
    have = ", ".join(map(repr, columns)) or "none"
    if column is not None and column not in columns:
        near = difflib.get_close_matches(column, columns, n=1)
        raise ValueError(
            f"{file} has no column {column!r}; it has {have}{f' (did you mean {near[0]!r}?)' if near else ''}"
        )
    usual = next((name for name in TEXT_COLUMNS if name in map(str.lower, columns)), None)
    if column is None and usual is None and len(columns) != 1:
        raise ValueError(
            f"{file} has no column of a usual name ({', '.join(TEXT_COLUMNS[:4])}, …); say which: column=… of {have}"
        )
    if column is None and usual is not None:
        chosen = [name for name in columns if name.lower() == usual]
    else:
        chosen = [name for name in columns if column in (None, name)]
    if len(chosen) > 1:
        raise ValueError(
            f"{file} has {len(chosen)} columns {chosen[0]!r}, and one is wanted: it has {have}; rename one"
        )
    return chosen[0], list(columns).index(chosen[0])


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
