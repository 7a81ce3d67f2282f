"""Batches of tokens, each a pure function of (seed, n), so that resuming needs no state.

**Packed windows.** An epoch is a seeded permutation of windows that do not overlap, all moved by a seeded offset below
the context, so that later epochs cut the text at other places. Window i of an epoch starts at s = offset + i·context
and holds ``ids[s : s + context]`` as inputs and the same moved by one as labels. The permutation is a Feistel network
walked until it falls inside the range (Black & Rogaway 2002): any position of a corpus of any size costs a few
multiplications and no memory. Evaluation takes consecutive windows, the last one shorter, so that every token but the
split's first (which nothing precedes) is scored once.

**One document a sequence**, as in GaLore's C4 runs (``torchrun_main.py``, T5's tokenizer): a sequence is a document's
first tokens, at most ``context``, the last one the end-of-document id also where the document was cut; the rest is
padding. Position t predicts position t + 1, so that a full sequence scores context − 1 tokens, and padding is not
scored. ``Streamed`` tokenises as it goes, for corpora too large to prepare; its documents pass through a shuffle buffer
as in `datasets`. It is as much a function of (seed, n) as the others, but to come to batch n it must read all that lies
before: resuming costs the download again.

Shapes: input_ids, labels (batch, context) int64; labels are already shifted; −100 is not scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lowrank.data.text.source import Source
from lowrank.data.text.token_files import Tokens
from lowrank.data.text.tokenizers import Tokenizer

Batch = dict[str, Tensor]


class BatchSource(Protocol):
    """Resuming needs no state: ``batch(n)`` is the same whenever it is asked for."""

    @property
    def batches_per_epoch(self) -> int: ...

    def batch(self, n: int) -> Batch: ...


IGNORED = -100
_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's rows of a global batch of ``batch_size``: consecutive, disjoint, as even as it goes."""

    batch_size: int
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank must be in 0 … {self.ranks - 1} for ranks={self.ranks}, not {self.rank}")
        if self.batch_size < self.ranks:
            raise ValueError(
                f"a batch of {self.batch_size} does not go round {self.ranks} ranks: give batch_size={self.ranks} or "
                f"more"
            )

    def rows(self, size: int | None = None) -> slice:
        """This rank's rows of a batch of ``size`` (the full batch by default)."""
        size = self.batch_size if size is None else size
        return slice(self.rank * size // self.ranks, (self.rank + 1) * size // self.ranks)


class Windows:
    """Training batches of windows of a split; ``batch_size`` counts the rows of all ranks together.

    Raises:
        ValueError: the split is too short for one window, or sizes are not positive.
    """

    def __init__(
        self, tokens: Tokens, split: str, context: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ):
        check_context(context)
        self.tokens, self.split, self.context, self.seed = tokens, split, context, seed
        self.share = Share(batch_size=batch_size, rank=rank, ranks=ranks)
        count = tokens.count(split)
        if count < context + 1:
            raise ValueError(
                f"{split} of {tokens.folder} has {count:,} tokens, too few for one window of context {context:,} (and "
                f"the token after it): give more text or a context of at most {max(count - 1, 0):,}"
            )
        self._windows = max(1, (count - context) // context)
        self._offsets = min(context, count - self._windows * context)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every window appears about once; epochs follow without a gap, also inside a batch."""
        return max(1, self._windows // self.share.batch_size)

    def batch(self, n: int) -> dict[str, Tensor]:
        """Batch n ≥ 0: {"input_ids", "labels"}, this rank's rows."""
        rows = np.arange(self.share.batch_size, dtype=np.uint64)[self.share.rows()] + np.uint64(
            n * self.share.batch_size
        )
        return gather(self.tokens.ids(self.split), self._starts(rows), self.context)

    def _starts(self, positions: np.ndarray) -> np.ndarray:
        """Where the windows at these positions of the endless sequence of epochs begin."""
        epochs, places = np.divmod(positions, np.uint64(self._windows))
        starts = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            offset = int(mixed(np.array([epoch], np.uint64), self.seed)[0]) % self._offsets
            windows = permuted(places[here], self._windows, key=(self.seed, int(epoch)))
            starts[here] = windows.astype(np.int64) * self.context + offset
        return starts


class ConsecutiveWindows:
    """The windows of a split by number, in order; the last one is shorter."""

    def __init__(self, tokens: Tokens, split: str, context: int):
        self.tokens, self.split, self.context = tokens, split, context

    def __len__(self) -> int:
        return -(-(self.tokens.count(self.split) - 1) // self.context)

    def rows(self, numbers: np.ndarray) -> Batch:
        starts = numbers * self.context
        lengths = np.minimum(self.context, self.tokens.count(self.split) - 1 - starts)
        return gather(self.tokens.ids(self.split), starts, self.context, lengths)


def evaluation_batches(
    tokens: Tokens, split: str, context: int, batch_size: int, limit: int | None = None, rank: int = 0, ranks: int = 1
) -> EvaluationRows:
    """Batches in which every token of the split (but the first) is scored exactly once.

    Args:
        tokens: the prepared corpus.
        split: one of its splits.
        context: window length; the last window is padded with labels −100.
        batch_size: rows of all ranks together.
        limit: only so many batches; always the same windows, spread evenly over the split.
        rank, ranks: this process's number, and how many share each batch.

    Raises:
        ValueError: fewer than two tokens, or sizes that are not positive.
    """
    check_context(context)
    if tokens.count(split) < 2:
        raise ValueError(
            f"{split} of {tokens.folder} has {tokens.count(split)} tokens: at least 2 are needed to predict one"
        )
    return EvaluationRows(ConsecutiveWindows(tokens, split, context), batch_size, limit, rank, ranks)


def spread(size: int, batch_size: int, limit: int | None) -> np.ndarray:
    """The numbers 0 … size − 1, or if ``limit`` batches hold fewer, that many of them.

    They are taken evenly from beginning to end rather than from the beginning alone: texts change along a corpus.

    Raises:
        ValueError: a limit below one batch.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 batch, not {limit}; leave it out for the whole split")
    chosen = size if limit is None else min(size, limit * batch_size)
    return np.arange(chosen, dtype=np.int64) * size // chosen


def gather(ids: np.ndarray, starts: np.ndarray, width: int, lengths: np.ndarray | None = None) -> dict[str, Tensor]:
    """Rows of ``width`` inputs from ``starts`` on and what follows each; row r scores its first ``lengths[r]`` only."""
    places = starts[:, None] + np.arange(width + 1)
    rows = torch.from_numpy(ids[np.minimum(places, len(ids) - 1)].astype(np.int64))
    inputs, labels = shifted(rows)
    if lengths is not None:
        padding = torch.arange(width) >= torch.from_numpy(lengths)[:, None]
        labels[padding] = IGNORED
        inputs[padding] = 0
    return {"input_ids": inputs, "labels": labels}


def shifted(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and labels of rows of tokens, as copies: views of a single row would share its memory."""
    inputs, labels = (part.clone(memory_format=torch.contiguous_format) for part in (rows[:, :-1], rows[:, 1:]))
    return inputs, labels


def permuted(places: np.ndarray, size: int, key: tuple[int, int]) -> np.ndarray:
    """A permutation of 0 … size − 1 chosen by ``key``, at some of its places: (places,) of uint64.

    A balanced Feistel network permutes the 4^b ≥ size numbers of 2b bits; a result outside the range goes through again
    until it is inside, which takes fewer than 4 rounds on average because 4^b < 4·size.
    """
    bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << bits) - np.uint64(1)
    keys = mixed(np.arange(_ROUNDS, dtype=np.uint64) + mixed(np.array([key[1]], np.uint64), key[0]), 1)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        left, right = result[outside] >> bits, result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (mixed(right ^ round_key, 2) & mask)
        result[outside] = left << bits | right
        outside = result >= np.uint64(size)
    return result


def mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """A 64-bit hash of each value (the finaliser of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = values + np.uint64(((seed + 1) * 0x9E3779B97F4A7C15) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def check_context(context: int) -> None:
    """Raise ValueError unless a window has at least one token."""
    if context < 1:
        raise ValueError(f"context must be at least 1 token, not {context}")


SHUFFLE_DOCUMENTS = 10_000


class Rows(Protocol):
    """Rows of a batch by number."""

    def __len__(self) -> int: ...

    def rows(self, numbers: np.ndarray) -> Batch: ...


class ShuffledRows:
    """Training batches of rows, each epoch in another seeded order; ``batch_size`` counts the rows of all ranks."""

    def __init__(self, rows: Rows, batch_size: int, seed: int, rank: int = 0, ranks: int = 1):
        self.share, self.seed = Share(batch_size=batch_size, rank=rank, ranks=ranks), seed
        self._rows = rows

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every row appears about once; epochs follow without a gap, also inside a batch."""
        return max(1, len(self._rows) // self.share.batch_size)

    def batch(self, n: int) -> Batch:
        """Batch n ≥ 0, this rank's rows."""
        size = len(self._rows)
        rows = np.arange(self.share.batch_size, dtype=np.uint64)[self.share.rows()]
        epochs, places = np.divmod(rows + np.uint64(n * self.share.batch_size), np.uint64(size))
        chosen = np.empty(len(rows), np.int64)
        for epoch in np.unique(epochs):
            chosen[epochs == epoch] = permuted(places[epochs == epoch], size, key=(self.seed, int(epoch)))
        return self._rows.rows(chosen)


class EvaluationRows:
    """Batches of each row once, in order, or of a fixed part: ``len``, iteration, ``batch(n)``.

    Raises:
        ValueError: a limit below one batch.
    """

    def __init__(self, rows: Rows, batch_size: int, limit: int | None = None, rank: int = 0, ranks: int = 1):
        self.share = Share(batch_size=batch_size, rank=rank, ranks=ranks)
        self._rows = rows
        self._chosen = spread(len(rows), batch_size, limit)

    def __len__(self) -> int:
        return -(-len(self._chosen) // self.share.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(n) for n in range(len(self)))

    def batch(self, n: int) -> Batch:
        """Batch n, this rank's rows (the last batch may have fewer, and a rank none)."""
        if not 0 <= n < len(self):
            raise IndexError(f"batch {n} of {len(self)}")
        chosen = self._chosen[n * self.share.batch_size : (n + 1) * self.share.batch_size]
        return self._rows.rows(chosen[self.share.rows(len(chosen))])


class Documents:
    """The documents of a split by number, as padded rows.

    Raises:
        ValueError: no documents, document ends that are not known, or sizes that are not positive.
    """

    def __init__(self, tokens: Tokens, split: str, context: int):
        check_document_context(context)
        self.tokens, self.split, self.context = tokens, split, context
        self.ends = tokens.document_ends(split)
        if not len(self.ends):
            raise ValueError(f"{split} of {tokens.folder} holds no documents")

    def __len__(self) -> int:
        return len(self.ends)

    def rows(self, numbers: np.ndarray) -> dict[str, Tensor]:
        return padded([self.document(int(n)) for n in numbers], self.context, self.tokens.end_of_document)

    def document(self, number: int) -> np.ndarray:
        start = int(self.ends[number - 1]) if number else 0
        # One token more than fits, so that a document that is cut can be told from one that ends there.
        return self.tokens.ids(self.split)[start : min(int(self.ends[number]), start + self.context + 1)]


class Streamed:
    """Batches from a source that is read and tokenised as it goes, endlessly; ``batch_size`` counts all ranks' rows.

    Args:
        packed: False: one document a sequence. True: documents one after the other, each ended, cut into windows.
        vocab_size: the model's; an id beyond it is an error when it comes.
        shuffle_documents: documents held to draw the next one from (1: the source's own order).

    Raises:
        ValueError: no text, a tokenizer without an end of document where documents are packed, sizes not positive.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        split: str,
        context: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        packed: bool = False,
        vocab_size: int | None = None,
        shuffle_documents: int = SHUFFLE_DOCUMENTS,
    ):
        (check_context if packed else check_document_context)(context)
        if shuffle_documents < 1:
            raise ValueError(f"shuffle_documents must be at least 1 (1: no shuffling), not {shuffle_documents}")
        if packed and tokenizer.end_of_document is None:
            raise ValueError(
                f"tokenizer {tokenizer.spec!r} has no id that ends a document: packed=True would join them"
            )
        self.source, self.tokenizer, self.split, self.context, self.seed = source, tokenizer, split, context, seed
        self.packed, self.vocab_size, self.shuffle_documents = packed, vocab_size, shuffle_documents
        self.share = Share(batch_size=batch_size, rank=rank, ranks=ranks)
        self._next = 0
        self._rows: Iterator[Any] = iter(())

    @property
    def batches_per_epoch(self) -> int:
        """A stream does not know its length.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.source.name} is streamed, so that its length is not known: say steps instead of epochs"
        )

    def batch(self, n: int) -> dict[str, Tensor]:
        """Batch n ≥ 0: {"input_ids", "labels"}, this rank's rows; quick for the next n, others are read up to."""
        if n < self._next or not self._next:
            self._next, self._rows = 0, self._sequences()
        for _ in islice(self._rows, (n - self._next) * self.share.batch_size):
            pass
        rows = list(islice(self._rows, self.share.batch_size))[self.share.rows()]
        self._next = n + 1
        if self.packed:
            windows = torch.from_numpy(np.stack([self._checked(row) for row in rows]).astype(np.int64))
            inputs, labels = shifted(windows)
            return {"input_ids": inputs, "labels": labels}
        return padded([self._checked(row) for row in self._encoded(rows)], self.context, self.tokenizer.end_of_document)

    def _sequences(self) -> Iterator[Any]:
        """Endless rows of the global batches: texts, or windows of context + 1 tokens if packed."""
        texts = self._texts()
        if not self.packed:
            yield from texts
            return
        rest = np.empty(0, np.int64)
        while True:
            for ids in self._encoded(list(islice(texts, 64))):
                rest = np.concatenate([rest, ids.astype(np.int64)])
            while len(rest) > self.context:
                yield rest[: self.context + 1]
                rest = rest[self.context :]

    def _texts(self) -> Iterator[str]:
        """Documents without end: epoch after epoch, each drawn from a buffer that the next document refills."""
        epoch = 0
        while True:
            generator = np.random.default_rng([self.seed, epoch])
            buffer: list[str] = []
            for document in self.source.documents(self.split):
                if len(buffer) < self.shuffle_documents:
                    buffer.append(document)
                    continue
                place = int(generator.integers(len(buffer)))
                yield buffer[place]
                buffer[place] = document
            if not epoch and not buffer:
                raise ValueError(f"{self.split} of {self.source.description} holds no text")
            order = generator.permutation(len(buffer)) if self.shuffle_documents > 1 else range(len(buffer))
            yield from (buffer[place] for place in order)
            epoch += 1

    def _encoded(self, texts: list[str]) -> list[np.ndarray]:
        end = [] if self.tokenizer.end_of_document is None else [self.tokenizer.end_of_document]
        return [np.append(ids, np.array(end, ids.dtype)) for ids in self.tokenizer.encode_batch(texts)]

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        if self.vocab_size is not None and len(ids) and int(ids.max()) >= self.vocab_size:
            raise ValueError(
                f"{self.source.name} with tokenizer {self.tokenizer.spec!r} has token id {int(ids.max())}, but the "
                f"model's vocabulary ends at {self.vocab_size - 1}; give the model "
                f"vocab_size={self.tokenizer.vocab_size}"
            )
        return ids


def padded(documents: list[np.ndarray], context: int, end: int | None) -> dict[str, Tensor]:
    """Documents as rows of at most ``context`` tokens; a longer one is cut, and ends in ``end`` (if there is one)."""
    inputs = torch.zeros(len(documents), context, dtype=torch.int64)
    labels = torch.full((len(documents), context), IGNORED, dtype=torch.int64)
    for row, document in enumerate(documents):
        ids = torch.from_numpy(document[:context].astype(np.int64))
        if len(document) > context and end is not None:
            ids[-1] = end
        inputs[row, : len(ids)] = ids
        labels[row, : len(ids) - 1] = ids[1:]
    return {"input_ids": inputs, "labels": labels}


def check_document_context(context: int) -> None:
    """Raise ValueError unless a sequence has a token and one that follows it."""
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens for one document a sequence, not {context}")
