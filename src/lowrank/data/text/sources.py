"""Sources of text by name: what every Python has, and corpora from the hub; and local files, by their path.

``builtin`` is for trying things offline: Python's own language reference (``pydoc_data.topics``), some 465 KB of
English. The topics repeat each other, so that a held-out part would partly be training text. Here every paragraph
appears once, at its place in the longest topic that has it, which leaves about 375 KB, in passages of about 1,500
characters: short enough that enough of them can be held out. The text differs a little between versions of Python.

Corpora are downloaded through `datasets` (which keeps its own cache) or, for C4, streamed, each read as its
publications read it: the text column, the original splits, one document an article. WikiText's rows are lines; they are
put together again into articles, which begin at a heading of the first level.
"""

import difflib
import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lowrank.data.cache import cache_root
from lowrank.data.text.files import nearest_names, open_files
from lowrank.data.text.source import SOURCES, Piece, Source, SourceInfo, text_source
from lowrank.data.text.token_files import FORMAT, META
from lowrank.infra.extras import import_extra
from lowrank.infra.hub import ask_hub

PASSAGE = 1500
SHORT = 20  # headings and single words may repeat
ROWS = 256  # rows fetched at a time


def open_source(
    name_or_path: str | Path,
    *,
    column: str | None = None,
    delimiter: str | None = None,
    separator: str | None = None,
) -> Source:
    """A source of text by name, or from a local file or folder (one that is called like a source is written ``./c4``).

    Args:
        name_or_path: ``builtin``, a corpus of ``list_sources``, or a path.
        column: the text's column in tables.
        delimiter: what stands between the cells of CSV files; by default what their header says.
        separator: what stands between the documents of plain files; by default each file is one.

    Raises:
        FileNotFoundError: neither a name nor a path.
        ValueError: not readable as text; see ``files.open_files``.
    """
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    if name in SOURCES:
        for option, value in (("column", column), ("delimiter", delimiter), ("separator", separator)):
            if value is not None:
                raise ValueError(f"{name} has its own text column and documents: leave {option}={value!r} out")
        return SOURCES[name].open()
    if path.exists():
        return open_files(path, column=column, delimiter=delimiter, separator=separator)
    near = difflib.get_close_matches(name, SOURCES, n=1)
    raise FileNotFoundError(
        f"no file or folder {name!r} and no source of that name{nearest_names(path)}"
        f"{f'; did you mean {near[0]!r}?' if near else ''} (sources: {', '.join(SOURCES)})"
    )


def list_sources() -> list[SourceInfo]:
    """Every source with a name, what it is, and where it lies prepared."""
    prepared = _prepared()
    return [replace(info, prepared=tuple(prepared.get(name, ()))) for name, info in SOURCES.items()]


def _prepared() -> dict[str, list[Path]]:
    """Token folders in the cache by the name of their source; folders that are damaged or not ours are left out."""
    found: dict[str, list[Path]] = {}
    for file in sorted((cache_root() / "tokens").glob(f"[!.]*/{META}")):
        try:
            meta = json.loads(file.read_text(encoding="utf-8"))
            fingerprint = meta["source"]["fingerprint"]
            if meta["format"] == FORMAT and ("hub" in fingerprint or "files" not in fingerprint):  # no local files
                found.setdefault(meta["source"]["name"], []).append(file.parent)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


@text_source(
    name="builtin",
    about="Python's own language reference",
    size="0.4 MB",
    licence="PSF-2.0",
    needs_network=False,
)
def builtin() -> Source:
    """Python's language reference as a source of passages."""
    passages = list(_passages())
    text = "\0".join(passages).encode()
    return Source(
        name="builtin",
        description=f"the language reference of Python {platform.python_version()} (pydoc_data.topics)",
        fingerprint={"builtin": hashlib.blake2b(text, digest_size=16).hexdigest()},
        splits={"train": lambda: (Piece(passage, True) for passage in passages)},
        size_bytes=len(text),
    )


def _passages() -> Iterator[str]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        passage = ""
        for paragraph in re.split(r"\n\s*\n", topics[name].strip("\n")):
            if paragraph.strip() in seen:
                continue
            if len(paragraph) > SHORT:
                seen.add(paragraph.strip())
            passage += paragraph + "\n\n"
            if len(passage) >= PASSAGE:
                yield passage
                passage = ""
        if len(passage) > PASSAGE // 10:  # not the headings of a topic that stands elsewhere
            yield passage


def _one_a_row(texts: Iterable[str]) -> Iterator[Piece]:
    return (Piece(text, True) for text in texts)


def _articles(lines: Iterable[str]) -> Iterator[Piece]:
    """WikiText: lines to articles. The data set on the hub holds blank lines as empty strings."""
    started = False
    for line in lines:
        if started and re.fullmatch(r" = [^=].*[^=] = \n", line):
            yield Piece("", True)
        started = True
        yield Piece(line or " \n", False)
    if started:
        yield Piece("", True)


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A corpus on the hub and how it is read. ``splits`` maps our names to its own. Opening one loads nothing."""

    name: str
    path: str
    config: str | None = None
    data_files: Mapping[str, str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    column: str = "text"
    splits: Mapping[str, str]
    streaming: bool = False
    pieces: Callable[[Iterable[str]], Iterator[Piece]] = _one_a_row
    about: str
    size: str
    size_bytes: int | None = None
    licence: str

    def __call__(self) -> Source:
        files = dict(self.data_files or {})
        return Source(
            name=self.name,
            description=f"{self.about} ({self.path}{f', {self.config}' if self.config else ''})",
            fingerprint={"hub": self.path, "config": self.config, "files": files, "column": self.column},
            splits={ours: partial(self.read, theirs) for ours, theirs in self.splits.items()},
            size_bytes=self.size_bytes,
        )

    def read(self, split: str) -> Iterator[Piece]:
        """Pieces of a split by the hub's name for it."""
        data = self._load(split)
        if data.column_names is not None and self.column not in data.column_names:
            raise ValueError(
                f"{self.name} ({self.path}) has no column {self.column!r} any more; it has "
                f"{', '.join(data.column_names)}"
            )
        texts = (
            text
            for rows in data.select_columns([self.column]).iter(batch_size=ROWS)
            for text in rows[self.column]
            if text is not None
        )
        yield from self.pieces(texts)

    def _load(self, split: str) -> Any:
        datasets = import_extra("datasets", "text")
        ask_hub()
        options = {"data_files": None if self.data_files is None else dict(self.data_files), **self.options}
        try:
            return datasets.load_dataset(
                self.path, self.config, split=split, streaming=self.streaming, trust_remote_code=False, **options
            )
        except (OSError, ValueError, RuntimeError) as error:
            scripts = "; its loading script needs datasets<4" if "script" in str(error) else ""
            raise OSError(
                f"{self.name} could not be loaded through datasets ({type(error).__name__}: {error}){scripts}. Without "
                "a network give a local copy as a file or folder (.txt .csv .jsonl .parquet), or a folder of prepared "
                "tokens; 'builtin' needs nothing"
            ) from error


_THREE = {"train": "train", "val": "validation", "test": "test"}
_CORPORA = (
    Hub(
        name="tiny-shakespeare",
        path="text",
        data_files={
            "train": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
        },
        options={"sample_by": "document"},
        splits={"train": "train"},
        about="Shakespeare's plays, the toy corpus of char-rnn and nanoGPT",
        size_bytes=1_115_394,
        size="1.1 MB",
        licence="public domain",
    ),
    Hub(
        name="wikitext",
        path="Salesforce/wikitext",
        config="wikitext-103-raw-v1",
        splits=_THREE,
        pieces=_articles,
        about="WikiText-103 (1609.07843): 28,000 good and featured articles of Wikipedia",
        size_bytes=545_000_000,
        size="545 MB",
        licence="CC BY-SA 3.0, GFDL",
    ),
    Hub(
        name="cnn_dailymail",
        path="abisee/cnn_dailymail",
        config="3.0.0",
        column="article",
        splits=_THREE,
        about="CNN/DailyMail 3.0.0 (1704.04368): 312,000 news articles",
        size_bytes=1_260_000_000,
        size="1.3 GB",
        licence="Apache-2.0",
    ),
    Hub(
        name="openwebtext",
        path="Skylion007/openwebtext",
        splits={"train": "train"},
        about="OpenWebText: 8 million pages linked from Reddit, GPT-2's corpus rebuilt",
        size_bytes=39_800_000_000,
        size="40 GB",
        licence="CC0-1.0 (the pages keep their own)",
    ),
    Hub(
        name="c4",
        path="allenai/c4",
        config="en",
        splits={"train": "train", "val": "validation"},
        streaming=True,
        about="C4 en (1910.10683): 365 million pages of Common Crawl; streamed, so that a part can be used",
        size="305 GB compressed",
        licence="ODC-BY",
    ),
)
for _hub in _CORPORA:
    text_source(name=_hub.name, about=_hub.about, size=_hub.size, licence=_hub.licence)(_hub)
