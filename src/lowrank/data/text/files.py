"""Local files of text: plain, tables, and folders of them, each read in bounded memory.

A plain text file is one document, losslessly: its pieces put together are the file, to the byte. A table's row (CSV,
TSV, JSON lines or Parquet, gzipped or not) is one document, taken from its text column. A folder's files are read in
the order of their names; a folder with tables is read as tables alone (a README beside them is about the data, not part
of it). Names such as ``train-00001.parquet`` or ``validation.csv``, or folders called so, make the source's own splits
when they say so for every file.
"""

import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lowrank.data.split_names import SPLIT_NAMES, SPLITS
from lowrank.data.text.source import Piece, Source
from lowrank.infra.extras import import_extra

PIECE_BYTES = 1 << 18  # a large text file is cut into pieces of about this size
HASH_WHOLE_BYTES = 1 << 26  # up to this size a file is known by its content, above it by size, time, head and tail
COMPRESSION = 3  # how much larger text is than its gzip or Parquet, roughly
PLAIN = (
    *(".txt", ".md", ".rst", ".text", ".tex", ".html", ".htm", ".xml"),
    *(".py", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs"),
)
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
DELIMITERS = (",", ";", "\t", "|")
TEXT_COLUMNS = (
    *("text", "article", "content", "document", "story", "body"),
    *("passage", "sentence", "abstract", "review", "output"),
)


def open_files(path: Path, *, column: str | None, delimiter: str | None = None) -> Source:
    """A file or folder as a source.

    Raises:
        ValueError: nothing readable or empty, a missing text column, a column told for plain text.
    """
    files = _files_of(path)
    kinds = {kind_of(file) for file in files}
    if not sum(file.stat().st_size for file in files):
        raise ValueError(f"{path} is empty: there is nothing to train on")
    if column is not None and not kinds & set(TABLES):
        raise ValueError(f"{path} is plain text and has no columns: leave column={column!r} out")
    if delimiter is not None and (not kinds & {".csv", ".tsv"} or len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ValueError(f"delimiter={delimiter!r}: it is one character that stands between the cells of CSV files")
    for file in files:
        if kind_of(file) in TABLES:
            check_columns(file, column, delimiter)
    splits = _splits(path, files)
    named = {"files": [[_relative(file, path), *_fingerprint(file)] for file in files], "column": column}
    return Source(
        name=re.sub(r"\W+", "-", path.resolve().name.split(".")[0]).strip("-") or "text",
        description=str(path) if path.is_file() else f"{path} ({len(files)} files)",
        fingerprint=named if delimiter is None else named | {"delimiter": delimiter},
        splits={split: partial(_read_all, own, column, delimiter) for split, own in splits.items()},
        size_bytes=sum(file.stat().st_size * (COMPRESSION if compressed(file) else 1) for file in files),
    )


def nearest_names(path: Path) -> str:
    """What a path may have meant: similar names in its folder, as a sentence for an error; empty if there are none."""
    names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"; {path.parent} has {', '.join(near)}"
    return "" if path.parent.is_dir() else f"; there is no folder {path.parent} either"


def read_text(file: BinaryIO, name: str) -> Iterator[Piece]:
    """One document from an open binary file, in pieces cut at line ends where there are any; no byte is changed.

    Raises:
        ValueError: bytes that are not UTF-8.
    """
    rest, start = b"", 0
    while block := file.read(PIECE_BYTES):
        data = rest + block
        end = _line_end(data)
        if end:
            yield Piece(_utf8(data[:end], name, start), False)
        rest, start = data[end:], start + end
    yield Piece(_utf8(rest, name, start), True)


def _line_end(data: bytes) -> int:
    """Where to cut a piece.

    At the last line end with no white space next to it, so that a tokenizer that joins white space sees what it would
    see in the whole; failing that at the last line end; failing that after the last whole character.
    """
    at = len(data)
    while (at := data.rfind(b"\n", 1, at)) > 0:
        if at + 1 < len(data) and not data[at - 1 : at].isspace() and not data[at + 1 : at + 2].isspace():
            return at + 1
        if len(data) - at > PIECE_BYTES // 4:
            break
    if (at := data.rfind(b"\n")) >= 0:
        return at + 1
    at = len(data)
    while at > max(0, len(data) - 4) and data[at - 1] & 0xC0 == 0x80:
        at -= 1
    return max(0, at - 1) if at else 0


def _utf8(data: bytes, name: str, start: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at {start + error.start:,}; "
            f"convert it, for example with `iconv -f latin1 -t utf-8` (or -f utf-16)"
        ) from error


def _read_all(files: Sequence[Path], column: str | None, delimiter: str | None) -> Iterator[Piece]:
    for file in files:
        with _naming(file):
            if kind_of(file) in PLAIN:
                with open_binary(file) as stream:
                    yield from read_text(stream, str(file))
                continue
            for text in rows(file, column, delimiter):
                if not isinstance(text, str | None):
                    raise ValueError(
                        f"{file}: the column {column or 'chosen'} holds {type(text).__name__}, not text; choose another"
                    )
                if text:
                    yield Piece(text, True)


def _files_of(folder: Path) -> list[Path]:
    """The files to read, in order; what is hidden, a pipe, a socket or a device is none of them."""
    readable = f"{' '.join(PLAIN[:2] + TABLES)} (also .gz)"
    if folder.is_file():
        if kind_of(folder) not in TABLES + PLAIN:
            raise ValueError(f"{folder} is none of the files that can be read: {readable}, or a folder of them")
        return [folder]
    if not folder.is_dir():
        raise ValueError(f"{folder} is a pipe, socket or device, which cannot be read twice: write it into a file")
    paths = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    tables = [path for path in paths if kind_of(path) in TABLES]
    found = sorted(
        tables or (path for path in paths if kind_of(path) in PLAIN), key=lambda path: _relative(path, folder)
    )
    if not found:
        kinds = sorted({kind_of(path) or path.name for path in paths})
        raise ValueError(f"{folder} has no text files: found {' '.join(kinds[:8]) or 'nothing'}, read are {readable}")
    return found


def _splits(root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names tell; all are ``train`` unless each name tells one, some ``train``."""
    told = [_split_of(_relative(file, root)) for file in files] if root.is_dir() else []
    if "train" not in told or None in told:
        return {"train": list(files)}
    return {
        split: [file for file, of in zip(files, told, strict=True) if of == split] for split in SPLITS if split in told
    }


def _split_of(name: str) -> str | None:
    found = {SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


def _fingerprint(file: Path) -> tuple[int, str]:
    """Size and a hash: of all content if that is quick, else of the time of change, the head and the tail."""
    size, digest = file.stat().st_size, hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        if size <= HASH_WHOLE_BYTES:
            digest.update(stream.read())
        else:
            digest.update(str(file.stat().st_mtime_ns).encode() + stream.read(1 << 20))
            stream.seek(-(1 << 20), io.SEEK_END)
            digest.update(stream.read())
    return size, digest.hexdigest()


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if root.is_dir() else file.name


def rows(file: Path, column: str | None, delimiter: str | None = None) -> Iterator[Any]:
    """The text column of each row, in order: strings, or whatever else the file holds there (None if nothing).

    CSV and JSON lines are read by Python's own modules and not by pyarrow, whose streaming readers have a limit on a
    row's length, infer types and cannot say in which line a damaged row begins.
    """
    kind = kind_of(file)
    if kind == ".parquet":
        return _parquet_rows(file, column)
    return _csv_rows(file, column, delimiter) if kind in (".csv", ".tsv") else _json_rows(file, column)


def check_columns(file: Path, column: str | None, delimiter: str | None) -> None:
    """Find the text column now, so that a wrong one is an error before any work."""
    kind = kind_of(file)
    with _naming(file):
        if kind == ".parquet":
            with _parquet(file) as table:
                _choose(file, table.schema_arrow.names, column)
        elif kind in (".csv", ".tsv"):
            _choose(file, _layout(file, column, delimiter)[1], column)
        else:
            _, row = next(_json_lines(file), (0, ""))
            if isinstance(row, dict):
                _choose(file, list(row), column)


def _csv_rows(file: Path, column: str | None, delimiter: str | None) -> Iterator[Any]:
    delimiter, header = _layout(file, column, delimiter)
    _, index = _choose(file, header, column)
    lines = _csv_lines(file, delimiter)
    next(lines, None)
    for line, row in lines:
        if len(row) != len(header):
            raise ValueError(
                f"{file}, line {line}: {len(row)} cells, but the header has {len(header)} "
                f"({', '.join(map(repr, header))}); put a cell that holds {delimiter!r} or a line end into quotes, or "
                "say what stands between cells: delimiter=…"
            )
        yield row[index]


def _layout(file: Path, column: str | None, delimiter: str | None) -> tuple[str, list[str]]:
    """The delimiter and the header: as told, else by the first delimiter under which the text column has its name,
    else by the one that makes most columns."""
    usual = "\t" if kind_of(file) == ".tsv" else ","
    candidates = (delimiter,) if delimiter else (usual, *(other for other in DELIMITERS if other != usual))
    found: list[tuple[str, list[str]]] = []
    for candidate in candidates:
        try:
            header = next(_csv_lines(file, candidate), (0, []))[1]
        except _BadRow:
            if candidate == candidates[-1] and not found:
                raise
            continue
        found.append((candidate, header))
        if column in header or (column is None and {name.lower() for name in header} & set(TEXT_COLUMNS)):
            return found[-1]
    return max(found, key=lambda each: len(each[1]))


class _BadRow(ValueError):
    """A row of a table that is not written as CSV."""


def _csv_lines(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
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
                yield number, json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{file}, line {number}: not JSON ({error}); one JSON value a line is expected"
                ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(name for name in names if names.count(name) > 1)!r} twice")
    return made


def _parquet_rows(file: Path, column: str | None) -> Iterator[Any]:
    with _parquet(file) as table:
        chosen, _ = _choose(file, table.schema_arrow.names, column)
        for batch in table.iter_batches(batch_size=256, columns=[chosen]):
            yield from batch.column(0).to_pylist()


def _parquet(file: Path) -> Any:
    return import_extra("pyarrow.parquet", "text").ParquetFile(file)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
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


def _choose(file: Path, columns: Sequence[str], column: str | None) -> tuple[str, int]:
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
