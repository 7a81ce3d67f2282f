"""A source of data in one file: sums such as ``17+25=42``, made up as training goes, read as bytes.

    lowrank train gpt-mini --data examples/new_dataset.py:data --data.digits 2 --steps 200

What a run needs of data is two sources of batches (``lowrank.data.Data``); a language model asks four things more:
how long a sequence is, how many tokens there are, which one ends a document, and whether a vocabulary is large enough.
A batch depends on nothing but (seed, n), so that a resumed run sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank.data import Data

SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Sums(Data):
    """Sums of two numbers below 10^digits, one after the other, in windows of ``context`` bytes."""

    digits: int
    context: int
    vocab_size: int = 256
    end_of_document: int | None = None

    def check_vocabulary(self, vocab_size: int) -> None:
        if vocab_size < self.vocab_size:
            raise ValueError(f"model.vocab_size={vocab_size} is smaller than the {self.vocab_size} bytes there are")

    def train(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> Batches:
        return Batches(self, batch_size, seed, rank, ranks)

    def evaluation(self, split: str, batch_size: int, limit: int | None = None) -> Iterator[dict[str, Tensor]]:
        return (self.rows(batch_size, SPLITS[split], 0, n) for n in range(limit or 16))

    def rows(self, count: int, *key: int) -> dict[str, Tensor]:
        """input_ids and labels, the ids shifted by one: (count, context) int64."""
        noise = np.random.default_rng(key)
        terms = noise.integers(10**self.digits, size=(count, self.context, 2))  # more than fill a window
        texts = ["".join(f"{a}+{b}={a + b}\n" for a, b in row)[: self.context + 1] for row in terms.tolist()]
        ids = torch.tensor([list(text.encode()) for text in texts])
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


@dataclass(frozen=True)
class Batches:
    """The training batches of one rank: its share of the rows of each."""

    sums: Sums
    batch_size: int
    seed: int
    rank: int
    ranks: int
    batches_per_epoch: int = 1000

    def batch(self, n: int) -> dict[str, Tensor]:
        whole = self.sums.rows(self.batch_size, SPLITS["train"], self.seed, n)
        return {name: rows[self.rank :: self.ranks] for name, rows in whole.items()}


def data(*, digits: int = 2, context: int = 64) -> Data:
    """Sums to learn.

    Args:
        digits: of each term, at most.
        context: bytes in a sequence.
    """
    if digits < 1 or context < 1:
        raise ValueError(f"data.digits={digits} and data.context={context} must be at least 1")
    return Sums(digits, context)
