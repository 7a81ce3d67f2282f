"""Text to token files, once: in parallel, in bounded memory, safe to interrupt.

Pieces of text (``source.py``) are gathered into groups of about a megabyte, each of one split; groups are tokenised by
worker processes and written in the order in which they were read, so that the files do not depend on the number of
workers. Only a few groups exist at a time, whatever the size of the corpus. The folder appears under its name when
everything is in it (``cache.py``).

Splits never share a document and never depend on chance. The source's own are used where it has them. What is missing
is cut out of its training split: by a hash of each document where there are many (so that a document's split does not
depend on the others, and a copy of a document lands on the same side), and by position where there are few or only one
(the first part trains, then comes ``val``, then ``test``, as in nanoGPT's Shakespeare).
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lowrank.data.cache import cache_root, locked, published, remove_leftovers
from lowrank.data.text.source import SPLITS, Piece, Source
from lowrank.data.text.sources import NAMES, open_source
from lowrank.data.text.token_files import FORMAT, META, VERSION, Tokens, holds_tokens
from lowrank.data.text.tokenizers import (
    Tokenizer,
    check_tokenizer_spec,
    load_tokenizer,
    open_tokenizer,
    tokenizer_fingerprint,
)

DEFAULT_FRACTION = 0.05
FEW_DOCUMENTS = 200  # below this a hash would give splits of very uneven size: cut by position instead
LINE_REACH = 4096  # bytes that a cut by position may move on to reach the end of a line


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """How a source is divided.

    Attributes:
        rule: ``own`` (as the source has it), ``hash`` or ``position``.
        val_fraction, test_fraction: shares of the source's training split, in documents or (``position``) in bytes.
        several: there is more than one document, so that each is ended.
        train_bytes: UTF-8 bytes of the training split, counted only for ``position``.
    """

    rule: str
    val_fraction: float
    test_fraction: float
    several: bool
    train_bytes: int

    def described(self) -> dict[str, Any]:
        """For ``meta.json``."""
        return asdict(self)


def check_fractions(source: Source, val_fraction: float | None, test_fraction: float | None) -> tuple[float, float]:
    """The shares of the training split that become ``val`` and ``test``, with the defaults filled in.

    A missing ``val`` is cut out by default; a missing ``test`` only where the source has no splits of its own at all.

    Raises:
        ValueError: a fraction for a split that the source already has, or fractions out of range.
    """
    for split, fraction in (("val", val_fraction), ("test", test_fraction)):
        if fraction is not None and split in source.splits:
            raise ValueError(f"{source.name} has its own {split} split: leave {split}_fraction out")
        if fraction is not None and not 0 <= fraction < 1:
            raise ValueError(f"{split}_fraction must be at least 0 and below 1, not {fraction!r}")
    undivided = set(source.splits) == {"train"}
    val = (0.0 if "val" in source.splits else DEFAULT_FRACTION) if val_fraction is None else float(val_fraction)
    test = (DEFAULT_FRACTION if undivided else 0.0) if test_fraction is None else float(test_fraction)
    if val + test >= 1:
        raise ValueError(
            f"val_fraction {val} and test_fraction {test} leave nothing to train on: together they must be below 1"
        )
    return val, test


def survey(source: Source, fractions: tuple[float, float], limit: int | None) -> Splitting:
    """Choose the rule, reading at most the first ``FEW_DOCUMENTS`` documents of the training split.

    Raises:
        ValueError: there is no text at all.
    """
    documents = size = 0
    divided = sum(fractions) > 0
    enough = FEW_DOCUMENTS if divided else 2
    for text, ends in limited(source.pieces("train"), limit):
        size += len(text.encode())
        documents += ends
        if documents >= enough:
            break
    if not size:
        raise ValueError(f"{source.description} holds no text: nothing to train on")
    rule = "own" if not divided else "hash" if documents >= enough else "position"
    val, test = fractions
    return Splitting(
        rule=rule,
        val_fraction=val,
        test_fraction=test,
        several=documents > 1,
        train_bytes=size if rule == "position" else 0,
    )


def divided(source: Source, splitting: Splitting, limit: int | None) -> Iterator[tuple[str, Piece]]:
    """Every piece of the source with its split, each split in the source's order."""
    for own in source.splits:
        pieces = limited(source.pieces(own), limit)
        if own != "train" or splitting.rule == "own":
            yield from ((own, piece) for piece in pieces)
        elif splitting.rule == "hash":
            yield from _by_hash(pieces, splitting)
        else:
            yield from _by_position(pieces, splitting)


def limited(pieces: Iterator[Piece], limit: int | None) -> Iterator[Piece]:
    """The first ``limit`` UTF-8 bytes of the pieces; the document that crosses the limit is cut there."""
    if limit is None:
        yield from pieces
        return
    for piece in pieces:
        data = piece.text.encode()
        if len(data) >= limit:
            yield Piece(data[:limit].decode("utf-8", "ignore"), True)
            return
        limit -= len(data)
        yield piece


def _by_hash(pieces: Iterator[Piece], splitting: Splitting) -> Iterator[tuple[str, Piece]]:
    """A document goes where the hash of its first piece says (for all but huge documents, of all of it)."""
    split = None
    for piece in pieces:
        if split is None:
            digest = hashlib.blake2b(piece.text.encode(), digest_size=8).digest()
            place = int.from_bytes(digest, "big") / 2**64
            val, test = splitting.val_fraction, splitting.test_fraction
            split = "test" if place < test else "val" if place < test + val else "train"
        yield split, piece
        if piece.ends:
            split = None


def _by_position(pieces: Iterator[Piece], splitting: Splitting) -> Iterator[tuple[str, Piece]]:
    """The first bytes train, the next validate, the last test; each cut at the end of a line if one is near."""
    total, val, test = splitting.train_bytes, splitting.val_fraction, splitting.test_fraction
    stages = [("train", round(total * (1 - val - test))), ("val", round(total * (1 - test))), ("test", total)]
    stages = [stage for stage, wanted in zip(stages, (True, val > 0, test > 0), strict=True) if wanted]
    stages[-1] = (stages[-1][0], 2 * total)  # the last takes whatever rounding leaves
    done = 0
    for piece in pieces:
        data = piece.text.encode()
        while done + len(data) > stages[0][1]:
            at = _cut(data, max(0, stages[0][1] - done))
            if at:
                yield stages[0][0], Piece(data[:at].decode(), False)
            done, data = done + at, data[at:]
            stages.pop(0)
        if data or not piece.text:
            yield stages[0][0], Piece(data.decode(), piece.ends)
        done += len(data)


def _cut(data: bytes, at: int) -> int:
    """The first line end from ``at`` on if it is near and not the end of ``data``; else the next character's start."""
    if at == 0:
        return 0
    end = data.find(b"\n", at - 1, at + LINE_REACH) + 1
    if 0 < end < len(data):
        return end
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at += 1
    return at


GROUP_BYTES = 1 << 20  # text handed to a worker in one go


class Group(NamedTuple):
    """Pieces of one split on their way to a worker."""

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


def encoded(
    groups: Iterator[Group], folder: Path, tokenizer: Tokenizer, several: bool, workers: int
) -> Iterator[tuple[Group, Encoded]]:
    """Every group with its tokens, in the order of the groups; at most three groups a worker are under way."""
    if workers == 1:
        yield from ((group, encode_group(tokenizer, group, several)) for group in groups)
        return
    # Spawned, not forked: a fork of a process whose libraries run threads may never wake up.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (str(folder), several))
    waiting: deque[tuple[Group, Future[Encoded]]] = deque()
    try:
        for group in groups:
            waiting.append((group, pool.submit(_encode_in_worker, group)))
            if len(waiting) >= 3 * workers:
                group, future = waiting.popleft()
                yield group, future.result()
        while waiting:
            group, future = waiting.popleft()
            yield group, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "the processes that tokenise could not start or died; a script that calls prepare() with workers needs "
            "`if __name__ == '__main__':` round its work, or pass workers=1"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_in_worker: dict[str, Any] = {}


def _start_worker(folder: str, several: bool) -> None:
    """Load the tokenizer once; leave Ctrl-C to the parent, and go when the parent is gone (however it went)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _in_worker.update(tokenizer=load_tokenizer(Path(folder)), several=several)


def _leave_with(parent: BaseProcess) -> None:
    """End this process when ``parent`` has ended: a killed parent cannot tell its workers to stop."""
    parent.join()
    os._exit(1)


def _encode_in_worker(group: Group) -> Encoded:
    return encode_group(_in_worker["tokenizer"], group, _in_worker["several"])


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


PARALLEL_BYTES = 1 << 25  # below this, starting processes takes longer than they save
BPE_BYTES = 1 << 28  # text that a BPE is trained on; more would change few merges and no longer fit in memory

ProgressCallback = Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be prepared (all that the result depends on) and how to go about it (``workers``, ``progress``)."""

    source: Source
    tokenizer: str
    fractions: tuple[float, float]
    limit: int | None
    workers: int | None
    progress: ProgressCallback

    @property
    def key(self) -> str:
        """Hash of everything that the result depends on."""
        parts = [
            FORMAT,
            VERSION,
            self.source.fingerprint,
            tokenizer_fingerprint(self.tokenizer),
            self.fractions,
            self.limit,
        ]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def folder(self) -> Path:
        """Where the result lives unless told otherwise."""
        words = [
            self.source.name,
            Path(self.tokenizer).name if not self.tokenizer.startswith("bpe:") else self.tokenizer,
        ]
        name = "-".join(re.sub(r"[^A-Za-z0-9]+", "-", word).strip("-")[:40] for word in words)
        return cache_root() / "tokens" / f"{name}-{self.key[:12]}"


def prepare(
    source: str | Path | Source,
    *,
    tokenizer: str | None = None,
    column: str | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    limit: int | None = None,
    workers: int | None = None,
    out: str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> Tokens:
    """Tokenise a source of text into memory-mapped files, or return what an earlier call left in the cache.

    Args:
        source: a name from ``list_sources``, a file, a folder, or a ``Source``. A folder of tokens (ours or nanoGPT's)
            is used as it is.
        tokenizer: ``bytes`` (the default), ``chars``, ``bpe:N``, or a tokenizer of transformers by name or folder.
        column: the text's column in tables; by default the first of text, article, content, … that there is.
        val_fraction, test_fraction: shares to hold out where the source has no such split (default 0.05 each).
        limit: at most so many UTF-8 bytes of each of the source's own splits.
        workers: processes that tokenise; by default one for small sources, else one a core. The result does not depend
            on it.
        out: a folder to write instead of the cache.
        progress: called with UTF-8 bytes done and in total (roughly, or None if unknown; both equal at the end); by
            default one line on a terminal, nothing elsewhere.

    Raises:
        ValueError, FileNotFoundError: bad input, before any work.
        OSError: a download that failed.
    """
    if not isinstance(source, Source) and str(source) not in NAMES and holds_tokens(Path(source).expanduser()):
        given = {
            "column": column,
            "val_fraction": val_fraction,
            "test_fraction": test_fraction,
            "limit": limit,
            "out": out,
        }
        _refuse_options(source, given)
        return Tokens.load(source, tokenizer=tokenizer)
    _check_options(tokenizer, limit, workers)
    opened = source if isinstance(source, Source) else open_source(source, column=column)
    if column is not None and opened is source:
        raise ValueError("column is chosen when a source is opened: open_source(path, column=…)")
    request = Request(
        source=opened,
        tokenizer=tokenizer or "bytes",
        fractions=check_fractions(opened, val_fraction, test_fraction),
        limit=limit,
        workers=workers,
        progress=progress or _terminal_progress(),
    )
    return _prepare(request, Path(out).expanduser() if out is not None else request.folder, in_cache=out is None)


def _check_options(tokenizer: str | None, limit: int | None, workers: int | None) -> None:
    check_tokenizer_spec(tokenizer or "bytes")
    for name, value in (("limit", limit), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value!r}")


def _prepare(request: Request, final: Path, in_cache: bool) -> Tokens:
    with locked(final) as alone:
        if found := _found(final, request.key, in_cache):
            return found
        if alone:
            remove_leftovers(final)
        with published(final) as folder:
            _write(request, folder)
    return Tokens.load(final)


def _found(final: Path, key: str, in_cache: bool) -> Tokens | None:
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
        print(f"{error}; preparing again", file=sys.stderr)
        shutil.rmtree(final)
        return None
    if tokens.meta["key"] != key:
        raise ValueError(f"{final} holds other tokens ({tokens.meta['source']['description']}); give another folder")
    return tokens


def _write(request: Request, folder: Path) -> None:
    """Tokenise everything into ``folder``, the description last."""
    source, limit = request.source, request.limit
    splitting = survey(source, request.fractions, limit)
    tokenizer = _tokenizer(request, splitting)
    tokenizer.save(folder)
    groups = grouped(divided(source, splitting, limit))
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    done, total = 0, _total(request)
    with ExitStack() as stack:
        expected = [split for split in SPLITS if split in _expected(source, splitting)]
        writers = {}
        for split in expected:
            ids, ends = (stack.enter_context(open(folder / f"{split}{end}", "wb")) for end in (".bin", ".ends.bin"))
            writers[split] = SplitWriter(ids, ends, dtype)
        for group, tokens in encoded(groups, folder, tokenizer, splitting.several, _workers(request)):
            writers[group.split].add(group, tokens)
            done += group.utf8_bytes
            request.progress(done, total)
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
        "split_rule": splitting.described(),
        "splits": counts,
    }
    (folder / META).write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_counts(source: Source, counts: Mapping[str, Mapping[str, int]]) -> None:
    for split, count in counts.items():
        if not count["tokens"]:
            raise ValueError(
                f"the {split} split of {source.description} would be empty ({counts['train']['tokens']:,} tokens in "
                f"train): set {split}_fraction, 0 for none, or give more text"
            )


def _expected(source: Source, splitting: Splitting) -> set[str]:
    held_out = {split for split in ("val", "test") if getattr(splitting, f"{split}_fraction") > 0}
    return set(source.splits) | held_out


def _tokenizer(request: Request, splitting: Splitting) -> Tokenizer:
    source, limit = request.source, request.limit

    def corpus() -> Iterator[str]:
        return (piece.text for _, piece in divided(source, splitting, limit))

    def training() -> Iterator[str]:
        texts = (piece for split, piece in divided(source, splitting, limit) if split == "train")
        # Of a corpus that is too large, every k-th piece from beginning to end rather than the beginning alone.
        every = -(-(_total(request) or 1) // BPE_BYTES)
        thinned = (piece for number, piece in enumerate(texts) if number % every == 0)
        return (piece.text for piece in limited(thinned, BPE_BYTES))

    return open_tokenizer(request.tokenizer, corpus, training, splitting.several)


def _total(request: Request) -> int | None:
    """UTF-8 bytes to come, roughly; None if nobody knows."""
    limit = None if request.limit is None else request.limit * len(request.source.splits)
    known = [size for size in (request.source.size_bytes, limit) if size is not None]
    return min(known, default=None)


def _workers(request: Request) -> int:
    """Worker processes: as told; else one a core for large texts, but one for small ones, bytes and characters.

    Bytes and characters are encoded faster than they are read.
    """
    if request.workers is not None:
        return request.workers
    size = _total(request)
    if (size is not None and size < PARALLEL_BYTES) or request.tokenizer in ("bytes", "chars"):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse_options(source: str | Path, options: Mapping[str, object]) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{source} holds tokens already, so that {name} cannot apply: leave it out, or give the text itself"
            )


def _terminal_progress() -> ProgressCallback:
    """One line on standard error that renews itself, if that is a terminal; otherwise silence."""
    if not sys.stderr.isatty():
        return lambda done, total: None
    started = last = time.monotonic()

    def show(done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        finished = done == total
        if now - last < 0.2 and not finished:
            return
        last = now
        share = f"{min(1, done / total):4.0%} of {total / 1e6:,.1f} MB" if total else f"{done / 1e6:,.1f} MB"
        rate = done / 1e6 / max(now - started, 1e-9)
        print(f"\rtokenising {share}, {rate:.1f} MB/s ", end="\n" if finished else "", file=sys.stderr, flush=True)

    return show
