"""Text to token files, once: in parallel, in bounded memory, safe to interrupt.

Pieces of text (``source.py``) are gathered into groups of about a megabyte, each of one split; groups are tokenised by
worker processes and written in the order in which they were read, so that the files do not depend on the number of
workers. Only a few groups exist at a time, whatever the size of the corpus. The folder appears under its name when
everything is in it (``cache.py``).
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lowrank.data.text.cache import cache_root, locked, published, remove_leftovers
from lowrank.data.text.encode import SplitWriter, encoded, grouped
from lowrank.data.text.source import SPLITS, Source
from lowrank.data.text.splits import Splitting, check_fractions, divided, limited, survey
from lowrank.data.text.text import NAMES, open_source
from lowrank.data.text.tokenizers import Tokenizer, check_tokenizer_spec, open_tokenizer, tokenizer_fingerprint
from lowrank.data.text.tokens import FORMAT, META, VERSION, Tokens, holds_tokens

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
