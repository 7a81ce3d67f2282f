"""Encoded examples as rows of a batch: several put into one row, or one a row with padding.

**Packed.** Best-fit decreasing (Johnson 1974): the longest example first, each into the fullest row that still has
room. ``position_ids`` begin at 0 with every example, by which a model of transformers sees that a row holds several and
masks attention into blocks. A filling at a row's end is of blocks of one token each. **Padded.** One example a row;
what comes after it changes nothing before it, in a model that only looks back.

A position's label is the next token of the same example, where that token counts; −100 elsewhere, so at an example's
last token.

Shapes: input_ids, labels, position_ids (rows, width) int64, the width that of the longest row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank.data.text.batches import IGNORED


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """An example as ``ids`` (length,) int32, and which of them ``count`` as answers (length,) bool."""

    ids: np.ndarray
    count: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def scored(self) -> int:
        """Predictions that its loss sums over: the first token is never predicted."""
        return int(self.count[1:].sum())

    def part(self, start: int, end: int) -> Encoded:
        return Encoded(ids=self.ids[start:end], count=self.count[start:end])


def packed(lengths: Sequence[int], context: int) -> list[list[int]]:
    """Rows of numbers of examples, their lengths together at most ``context`` in each.

    >>> packed([2, 5, 3, 4], 7)
    [[1, 0], [3, 2]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, row), ascending
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        length = lengths[number]
        place = bisect_left(room, (length, -1))
        left, row = room.pop(place) if place < len(room) else (context, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        if left > length:
            insort(room, (left - length, row))
    return rows


class ExampleRows:
    """Rows of examples by number, as :class:`lowrank.data.text.batches.Rows`."""

    def __init__(self, examples: Sequence[Encoded], rows: Sequence[Sequence[int]], *, positions: bool):
        self.examples, self.numbers, self.positions = examples, rows, positions

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """These rows as a batch."""
        chosen = [[self.examples[k] for k in self.numbers[int(n)]] for n in numbers]
        width = max((sum(map(len, row)) for row in chosen), default=1)
        inputs = np.zeros((len(chosen), width), np.int64)
        labels = np.full((len(chosen), width), IGNORED, np.int64)
        positions = np.zeros((len(chosen), width), np.int64)
        for r, row in enumerate(chosen):
            start = 0
            for example in row:
                end = start + len(example)
                inputs[r, start:end] = example.ids
                labels[r, start : end - 1] = np.where(example.count[1:], example.ids[1:], IGNORED)
                positions[r, start:end] = np.arange(len(example))
                start = end
        batch = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
        return batch | ({"position_ids": torch.from_numpy(positions)} if self.positions else {})
