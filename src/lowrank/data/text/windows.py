"""Batches of tokens, each a pure function of (seed, n), so that resuming needs no state.

Training: an epoch is a seeded permutation of windows that do not overlap, all moved by a seeded offset below the
context, so that later epochs cut the text at other places. Window i of an epoch starts at s = offset + i·context and
holds ``ids[s : s + context]`` as inputs and the same moved by one as labels. The permutation is a Feistel network
walked until it falls inside the range (Black & Rogaway 2002): any position of a corpus of any size costs a few
multiplications and no memory, where a stored permutation of OpenWebText's windows would take 70 MB an epoch and as long
as a few hundred steps to draw.

Evaluation: consecutive windows, the last one shorter, so that every token but the split's first (which nothing
precedes) is scored once.

Shapes: input_ids, labels (batch, context) int64; labels are already shifted; −100 is not scored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank.data.text.tokens import Tokens

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
                f"the token after it): "
                f"give more text or a context of at most {max(count - 1, 0):,}"
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


class EvaluationBatches:
    """Batches that score a split in order, each token once, or a fixed part of it: ``len``, iteration, ``batch(n)``."""

    def __init__(self, tokens: Tokens, split: str, context: int, share: Share, limit: int | None):
        self.tokens, self.split, self.context, self.share = tokens, split, context, share
        self._windows = spread(-(-(tokens.count(split) - 1) // context), share.batch_size, limit)

    def __len__(self) -> int:
        return -(-len(self._windows) // self.share.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.batch(n) for n in range(len(self)))

    def batch(self, n: int) -> dict[str, Tensor]:
        """Batch n: {"input_ids", "labels"}, this rank's rows (the last batch may have fewer, and a rank none)."""
        if not 0 <= n < len(self):
            raise IndexError(f"batch {n} of {len(self)}")
        windows = self._windows[n * self.share.batch_size : (n + 1) * self.share.batch_size]
        starts = windows[self.share.rows(len(windows))] * self.context
        lengths = np.minimum(self.context, self.tokens.count(self.split) - 1 - starts)
        return gather(self.tokens.ids(self.split), starts, self.context, lengths)


def evaluation_batches(
    tokens: Tokens, split: str, context: int, batch_size: int, limit: int | None = None, rank: int = 0, ranks: int = 1
) -> EvaluationBatches:
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
    return EvaluationBatches(tokens, split, context, Share(batch_size=batch_size, rank=rank, ranks=ranks), limit)


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
