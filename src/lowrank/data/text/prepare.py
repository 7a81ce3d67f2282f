"""Text to token files, once: in bounded memory, safe to interrupt.

Pieces of text (``source.py``) are gathered into groups of about two megabytes, each of one split, tokenised (fast
tokenizers use all cores by themselves, in Rust) and written in the order in which they were read. The folder appears
under its name when everything is in it (``data/cache.py``).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from lowrank.data.cache import cache_root, locked, published, remove_leftovers
from lowrank.data.split_names import SPLITS
from lowrank.data.text.source import SOURCES, Piece, Source
from lowrank.data.text.sources import open_source
from lowrank.data.text.splits import Splitting, check_fractions, divided, limited, survey
from lowrank.data.text.token_files import FORMAT, META, VERSION, Tokens, holds_tokens
from lowrank.data.text.tokenizers import (
    Tokenizer,
    check_tokenizer_spec,
    open_tokenizer,
    saved_tokenizer,
    tokenizer_fingerprint,
)
from lowrank.infra.files import write_json
from lowrank.infra.progress import bar_on_terminal

BPE_BYTES = 1 << 28  # text that a BPE is trained on; more would change few merges and no longer fit in memory
GROUP_BYTES = 1 << 21  # text tokenised in one go


ProgressCallback = Callable[[int, int | None], None]


def prepare(
    source: str | Path | Source,
    *,
    tokenizer: str | None = None,
    column: str | None = None,
    delimiter: str | None = None,
    separator: str | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> Tokens:
    """Tokenise a source of text into memory-mapped files, or return what an earlier call left in the cache.

    Args:
        source: a name from ``list_sources``, a file, a folder, or a ``Source``. A folder of tokens (ours or nanoGPT's)
            is used as it is.
        tokenizer: ``bytes`` (the default), ``chars``, ``bpe:N``, or a tokenizer of transformers by name or folder.
        column: the text's column in tables; by default the first of text, article, content, … that there is.
        delimiter: what stands between the cells of CSV files; by default what their header says.
        separator: what stands between the documents of plain text, such as <|endoftext|>, or \\n for one document a
            line; by default each file is one document.
        val_fraction, test_fraction: shares to hold out where the source has no such split (default 0.05 each).
        limit: at most so many UTF-8 bytes of each of the source's own splits.
        out: a folder to write instead of the cache.
        progress: called with UTF-8 bytes done and in total (roughly, or None if unknown; both equal at the end); by
            default one line on a terminal, nothing elsewhere.

    Raises:
        ValueError, FileNotFoundError: bad input, before any work.
        OSError: a download that failed, a place that cannot be written, a full disk.
    """
    if not isinstance(source, Source) and str(source) not in SOURCES and holds_tokens(Path(source).expanduser()):
        given = {"column": column, "delimiter": delimiter, "separator": separator, "val_fraction": val_fraction}
        for name, value in (given | {"test_fraction": test_fraction, "limit": limit, "out": out}).items():
            if value is not None:
                raise ValueError(
                    f"{source} holds tokens already, so that {name} cannot apply: leave it out, or give the text itself"
                )
        return Tokens.load(source, tokenizer=tokenizer)
    check_tokenizer_spec(tokenizer or "bytes")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit!r}")
    how = {"column": column, "delimiter": delimiter, "separator": separator}
    opened = source if isinstance(source, Source) else open_source(source, **how)
    if opened is source and any(value is not None for value in how.values()):
        raise ValueError(f"{', '.join(how)} are chosen when a source is opened: open_source(path, column=…)")
    request = Request(
        source=opened,
        tokenizer=tokenizer or "bytes",
        fractions=check_fractions(opened.name, opened.splits, val_fraction, test_fraction),
        limit=limit,
        progress=progress or bar_on_terminal(),
    )
    if out is not None:
        return _prepare(request, Path(out).expanduser(), in_cache=False)
    return _by_a_saved_tokenizer(request) or _prepare(request, request.folder, in_cache=True)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be prepared: all that the result depends on."""

    source: Source
    tokenizer: str
    fractions: tuple[float, float]
    limit: int | None
    progress: ProgressCallback

    @property
    def key(self) -> str:
        """Hash of everything that the result depends on."""
        own = [FORMAT, VERSION, self.source.fingerprint, tokenizer_fingerprint(self.tokenizer)]
        text = json.dumps([*own, self.fractions, self.limit], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def folder(self) -> Path:
        """Where the result lives unless told otherwise."""
        learnt = self.tokenizer.startswith("bpe:")
        words = [self.source.name, self.tokenizer if learnt else Path(self.tokenizer).name]
        name = "-".join(re.sub(r"[^A-Za-z0-9]+", "-", word).strip("-")[:40] for word in words)
        return cache_root() / "tokens" / f"{name}-{self.key[:12]}"

    @property
    def size(self) -> int | None:
        """UTF-8 bytes to come, roughly; None if nobody knows."""
        limit = None if self.limit is None else self.limit * len(self.source.splits)
        return min((size for size in (self.source.size_bytes, limit) if size is not None), default=None)


def _by_a_saved_tokenizer(request: Request) -> Tokens | None:
    """Tokens that lie prepared by the very tokenizer that the request's folder holds, under the name it was made by."""
    saved = saved_tokenizer(request.tokenizer)
    if saved is None:
        return None
    first = replace(request, tokenizer=saved.spec)
    found = _found(first.folder, first.key, in_cache=True)
    return found if found is not None and found.tokenizer.fingerprint == saved.fingerprint else None


def _prepare(request: Request, final: Path, in_cache: bool) -> Tokens:
    if found := _found(final, request.key, in_cache):
        return found
    with locked(final) as alone:
        if found := _found(final, request.key, in_cache, repair=True):
            return found
        if alone:
            remove_leftovers(final)
        with published(final) as folder:
            _write(request, folder)
    return Tokens.load(final)


def _found(final: Path, key: str, in_cache: bool, repair: bool = False) -> Tokens | None:
    """Tokens that are there already. Damaged ones in the cache make way; a folder of the user's is never touched."""
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return None
    if not in_cache and not (final / META).is_file():
        raise ValueError(f"{final} holds something else than prepared tokens; give another folder")
    try:
        tokens = Tokens.load(final)
    except (ValueError, FileNotFoundError) as error:
        if not in_cache:
            raise
        if repair:
            print(f"{error}; preparing again", file=sys.stderr)
            shutil.rmtree(final)
        return None
    if tokens.meta.get("key") != key:
        raise ValueError(f"{final} holds other tokens ({tokens.meta['source']['description']}); give another folder")
    return tokens


def _write(request: Request, folder: Path) -> None:
    """Tokenise everything into ``folder``, the description last."""
    source, limit = request.source, request.limit
    splitting = survey(source, request.fractions, limit)
    tokenizer = _tokenizer(request, splitting)
    tokenizer.save(folder)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    done = 0
    with ExitStack() as stack:
        writers = {}
        for split in splitting.splits(source):
            ids, ends = (stack.enter_context(open(folder / f"{split}{end}", "wb")) for end in (".bin", ".ends.bin"))
            writers[split] = SplitWriter(ids, ends, dtype)
        for group in grouped(divided(source, splitting, limit)):
            writers[group.split].add(group, encode_group(tokenizer, group, splitting.several))
            done += group.utf8_bytes
            request.progress(done, request.size)
        request.progress(done, done)
        counts = {split: writer.finish() for split, writer in writers.items()}
    _check_counts(source, counts)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "key": request.key,
        "source": {"name": source.name, "description": source.description, "fingerprint": dict(source.fingerprint)},
        "limit": limit,
        "tokenizer": {key: value for key, value in tokenizer.described().items() if key != "characters"},
        "dtype": dtype,
        "split_rule": asdict(splitting),
        "splits": counts,
    }
    write_json(folder / META, meta, indent=1)


def _check_counts(source: Source, counts: Mapping[str, Mapping[str, int]]) -> None:
    for split, count in counts.items():
        if not count["tokens"]:
            raise ValueError(
                f"the {split} split of {source.description} would be empty ({counts['train']['tokens']:,} tokens in "
                f"train): set {split}_fraction, 0 for none, or give more text"
            )


def _tokenizer(request: Request, splitting: Splitting) -> Tokenizer:
    source, limit = request.source, request.limit

    def corpus() -> Iterator[str]:
        return (piece.text for _, piece in divided(source, splitting, limit))

    def training() -> Iterator[str]:
        texts = (piece for split, piece in divided(source, splitting, limit) if split == "train")
        # Of a corpus that is too large, every k-th piece from beginning to end rather than the beginning alone.
        every = -(-(request.size or 1) // BPE_BYTES)
        thinned = (piece for number, piece in enumerate(texts) if number % every == 0)
        return (piece.text for piece in limited(thinned, BPE_BYTES))

    return open_tokenizer(request.tokenizer, corpus, training, splitting.several)


class Group(NamedTuple):
    """Pieces of one split, to be encoded at once."""

    split: str
    texts: list[str]
    ends: list[bool]
    utf8_bytes: int


class Encoded(NamedTuple):
    """A group's tokens, and the indices in them after which a document ends."""

    ids: np.ndarray
    ends: np.ndarray


def grouped(pieces: Iterable[tuple[str, Piece]]) -> Iterator[Group]:
    """Pieces in groups of one split; a split's groups follow its order. Documents without text are left out."""
    groups = {split: Group(split, [], [], 0) for split in SPLITS}
    is_open = dict.fromkeys(SPLITS, False)
    for split, (text, ends) in pieces:
        if not text and not is_open[split]:
            continue
        is_open[split] = not ends
        group = groups[split]
        group.texts.append(text)
        group.ends.append(ends)
        groups[split] = group = group._replace(utf8_bytes=group.utf8_bytes + len(text.encode()))
        if group.utf8_bytes >= GROUP_BYTES:
            yield group
            groups[split] = Group(split, [], [], 0)
    yield from (group for group in groups.values() if group.texts)


def encode_group(tokenizer: Tokenizer, group: Group, several: bool) -> Encoded:
    """Tokens of a group, each document that ends followed by the tokenizer's end where there are several documents."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = np.array([tokenizer.end_of_document] if several and tokenizer.end_of_document is not None else [], dtype)
    parts: list[np.ndarray] = []
    ends: list[int] = []
    length = 0
    for ids, ended in zip(tokenizer.encode_batch(group.texts), group.ends, strict=True):
        parts.extend([ids.astype(dtype), end] if ended else [ids.astype(dtype)])
        length += len(ids) + (len(end) if ended else 0)
        if ended:
            ends.append(length)
    return Encoded(np.concatenate(parts), np.array(ends, np.uint64))


class SplitWriter:
    """Appends groups to ``<split>.bin`` and ``<split>.ends.bin`` and keeps the counts."""

    def __init__(self, ids: BinaryIO, ends: BinaryIO, dtype: str):
        self.ids, self.ends, self.dtype = ids, ends, np.dtype(dtype).newbyteorder("<")
        self.tokens = self.documents = self.utf8_bytes = self.last_end = 0
        self.maximum_id = -1

    def add(self, group: Group, encoded: Encoded) -> None:
        self.ids.write(encoded.ids.astype(self.dtype).tobytes())
        self._end(encoded.ends + np.uint64(self.tokens))
        self.tokens += len(encoded.ids)
        self.utf8_bytes += group.utf8_bytes
        self.maximum_id = max(self.maximum_id, int(encoded.ids.max(initial=0)))

    def finish(self) -> dict[str, int]:
        """The split's counts. A document that was cut by the split or by the limit ends here."""
        if self.last_end < self.tokens:
            self._end(np.array([self.tokens], np.uint64))
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "utf8_bytes": self.utf8_bytes,
            "maximum_id": self.maximum_id,
        }

    def _end(self, ends: np.ndarray) -> None:
        self.ends.write(ends.astype("<u8").tobytes())
        self.documents += len(ends)
        if len(ends):
            self.last_end = int(ends[-1])
