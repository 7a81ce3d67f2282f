"""The one evaluator: exact, over every prediction once, always on the merged weights.

In evaluation mode an adapter computes with ``merged(W)``, the mean of its heads, so the model that is scored is the one
that ``merge_and_unload`` would give, whatever has happened since the last merge. Sums are taken over predictions and
not over batches, so the result does not depend on the batch size, nor on how many ranks share the batches: rank r of R
scores the batches r, r + R, …, and what all have counted is put together. All run equally many batches, as a sharded
model needs: who has none left runs one whose result nobody counts. Where ranks, or workers, have data of their own,
each scores all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn

from lowrank.distributed.process_group import ProcessGroup
from lowrank.run.task import Batch, Tally, Task, to_device


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    *,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ranks: ProcessGroup | None = None,
    sharing: ProcessGroup | None = None,
) -> dict[str, float]:
    """Metrics of ``model`` over ``batches``, the same on all ``ranks``; the model's mode is put back afterwards.

    ``sharing``: the ranks that have the same ``batches``, and divide them: all, some of them, or None, where these are
    this rank's own.

    Raises:
        ValueError: there was nothing to score.
    """
    mine: Iterable[tuple[Batch, bool]] = ((batch, True) for batch in batches)
    if sharing is not None:
        mine = _share(batches, sharing.rank, sharing.count)
    tally, seen = _count(model, mine, task, torch.device(device), autocast)
    if ranks is not None:
        everyone = ranks.gather_objects((tally.counted(), seen))
        tally, seen = task.tally(), sum(n for _, n in everyone)
        for counted, n in everyone:
            if n:
                tally.absorb(counted)
    _check_seen(seen)
    return tally.result()


def tallied(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    *,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tally:
    """The tally from which :func:`evaluate` takes its metrics, for callers that want the single answers too."""
    tally, seen = _count(model, ((batch, True) for batch in batches), task, torch.device(device), autocast)
    _check_seen(seen)
    return tally


@torch.no_grad()
def _count(
    model: nn.Module,
    batches: Iterable[tuple[Batch, bool]],
    task: Task,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[Tally, int]:
    """The tally of the batches that count, and how many they are."""
    training, tally, seen = model.training, task.tally(), 0
    model.eval()
    try:
        for batch, counts in batches:
            with autocast():
                (tally if counts else task.tally()).add(model, to_device(batch, device))
            seen += counts
    finally:
        model.train(training)
    return tally, seen


def _check_seen(seen: int) -> None:
    if not seen:
        raise ValueError("there is nothing to evaluate: the split is empty")


def _share(batches: Iterable[Batch], rank: int, ranks: int) -> Iterator[tuple[Batch, bool]]:
    """(batch, True) for the batches rank, rank + ranks, …; in the last round (the round's first batch, False) for who
    has none. The others are not made where batches can be asked for by number."""
    if hasattr(batches, "batch") and hasattr(batches, "__len__"):
        by_number: Any = batches
        for first in range(0, len(by_number), ranks):
            counts = first + rank < len(by_number)
            yield by_number.batch(first + rank if counts else first), counts
        return
    every = iter(batches)
    while present := list(islice(every, ranks)):
        counts = rank < len(present)
        yield present[rank if counts else 0], counts
