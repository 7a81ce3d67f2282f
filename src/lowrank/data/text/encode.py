"""Groups of text to groups of tokens, in parallel and in order, and the files that they are appended to."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lowrank.data.text.source import SPLITS, Piece
from lowrank.data.text.tokenizers import Tokenizer, load_tokenizer

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
