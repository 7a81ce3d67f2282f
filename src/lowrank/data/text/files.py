"""Local files of text: plain, tables, and folders of them, each read in bounded memory.

A plain text file is one document, losslessly: its pieces put together are the file, to the byte; with a ``separator``,
what stands between two of them is a document. A table's row (CSV, TSV, JSON or Parquet, gzipped or not) is one
document, taken from its text column, and so is a row of a folder that `datasets` saved. A folder's files are read in
the order of their names; a folder with tables is read as tables alone (a README beside them is about the data, not part
of it). Names such as ``train-00001.parquet`` or ``validation.csv``, or folders called so, make the source's own splits
when they say so for every file.
"""

import difflib
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lowrank.data.split_names import SPLIT_NAMES, SPLITS
from lowrank.data.text.source import Piece, Source
from lowrank.data.text.tables import (
    TABLES,
    check_columns,
    choose,
    compressed,
    kind_of,
    naming,
    open_binary,
    rows,
    saved_dataset,
)

PIECE_BYTES = 1 << 18  # a large text file is cut into pieces of about this size
HASH_WHOLE_BYTES = 1 << 26  # up to this size a file is known by its content, above it by size, time, head and tail
COMPRESSION = 3  # how much larger text is than its gzip or Parquet, roughly
PLAIN = (
    *(".txt", ".md", ".rst", ".text", ".tex", ".html", ".htm", ".xml"),
    *(".py", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs"),
)


def open_files(path: Path, *, column: str | None, delimiter: str | None = None, separator: str | None = None) -> Source:
    """A file or folder as a source.

    Raises:
        ValueError: nothing readable or empty, a missing text column, a column told for plain text.
    """
    if (saved := saved_dataset(path)) is not None:
        return _saved(path, saved, column)
    files = files_of(path)
    kinds = {kind_of(file) for file in files}
    if not sum(file.stat().st_size for file in files):
        raise ValueError(f"{path} is empty: there is nothing to train on")
    if column is not None and not kinds & set(TABLES):
        raise ValueError(f"{path} is plain text and has no columns: leave column={column!r} out")
    if delimiter is not None and (not kinds & {".csv", ".tsv"} or len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ValueError(f"delimiter={delimiter!r}: it is one character that stands between the cells of CSV files")
    if separator == "" or (separator is not None and not kinds & set(PLAIN)):
        raise ValueError(f"{path} is a table, whose rows are its documents: leave separator={separator!r} out")
    if separator is not None:
        _mark(separator)
    for file in files:
        if kind_of(file) in TABLES:
            check_columns(file, column, delimiter)
    splits = by_split(path, files)
    told = {"delimiter": delimiter, "separator": separator}
    named = {"files": files_fingerprint(path, files), "column": column}
    return Source(
        name=_name(path),
        description=str(path) if path.is_file() else f"{path} ({len(files)} files)",
        fingerprint=named | {name: value for name, value in told.items() if value is not None},
        splits={split: partial(_read_all, own, column, delimiter, separator) for split, own in splits.items()},
        size_bytes=sum(file.stat().st_size * (COMPRESSION if compressed(file) else 1) for file in files),
    )


def _saved(folder: Path, splits: Mapping[str, Any], column: str | None) -> Source:
    """A folder of `datasets`."""
    chosen, _ = choose(folder, splits["train"].column_names, column)

    def pieces(split: str) -> Iterator[Piece]:
        for batch in splits[split].select_columns([chosen]).iter(batch_size=256):
            yield from (Piece(text, True) for text in checked_texts(folder, batch[chosen], chosen))

    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return Source(
        name=_name(folder),
        description=f"{folder} (saved by datasets)",
        fingerprint={"files": files_fingerprint(folder, files), "column": column},
        splits={split: partial(pieces, split) for split in SPLITS if split in splits},
        size_bytes=sum(file.stat().st_size for file in files),
    )


def checked_texts(file: Path, values: Iterable[Any], column: str | None) -> Iterator[str]:
    """The texts that are not empty.

    Raises:
        ValueError: one is no text.
    """
    for text in values:
        if not isinstance(text, str | None):
            raise ValueError(
                f"{file}: the column {column or 'chosen'} holds {type(text).__name__}, not text; choose another"
            )
        if text:
            yield text


def _name(path: Path) -> str:
    return re.sub(r"\W+", "-", path.resolve().name.split(".")[0]).strip("-") or "text"


def files_fingerprint(root: Path, files: Sequence[Path]) -> list[list[Any]]:
    """Name, size and a hash of each."""
    return [[_relative(file, root), *_fingerprint(file)] for file in files]


def nearest_names(path: Path) -> str:
    """What a path may have meant: similar names in its folder, as a sentence for an error; empty if there are none."""
    if path.is_symlink():
        return f": {path} is a link to {path.readlink()}, which is not there"
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


def _read_all(
    files: Sequence[Path], column: str | None, delimiter: str | None, separator: str | None
) -> Iterator[Piece]:
    for file in files:
        with naming(file):
            if kind_of(file) in PLAIN:
                with open_binary(file) as stream:
                    pieces = read_text(stream, str(file))
                    yield from pieces if separator is None else separated(pieces, separator)
                continue
            yield from (Piece(text, True) for text in checked_texts(file, rows(file, column, delimiter), column))


def separated(pieces: Iterable[Piece], separator: str) -> Iterator[Piece]:
    """What stands between separators as documents of their own, each in pieces; ``separator`` may be written with
    escapes, as in ``\\n`` for one document a line."""
    mark = _mark(separator)
    rest = ""
    for text, ends in pieces:
        *whole, rest = (rest + text).split(mark)
        yield from (Piece(document, True) for document in whole)
        if ends:
            yield Piece(rest, True)
            rest = ""
        elif len(rest) > PIECE_BYTES:  # all but what may be the beginning of a separator
            cut = len(rest) - len(mark) + 1
            yield Piece(rest[:cut], False)
            rest = rest[cut:]


def _mark(separator: str) -> str:
    """A separator as it stands in the text.

    Raises:
        ValueError: a backslash in it begins no escape.
    """
    try:
        return separator.encode().decode("unicode_escape") if separator.isascii() else separator
    except UnicodeDecodeError as error:
        raise ValueError(
            f"separator={separator!r}: {error.reason}; a backslash is written twice, a new line \\n"
        ) from error


def files_of(folder: Path) -> list[Path]:
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


def by_split(root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
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
