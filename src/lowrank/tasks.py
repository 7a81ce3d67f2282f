"""What is learnt: how a task turns a batch into a loss, and predictions into metrics.

The loop and the evaluator use a task only through :class:`Task`, so that text and images share both.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowrank.models.text import next_token_loss
from lowrank.tasks_images import ImageTask

Batch = dict[str, Tensor]


class Tally(Protocol):
    """Collects what an evaluation sees, batch by batch."""

    def add(self, model: nn.Module, batch: Batch) -> None: ...

    def absorb(self, other: Any) -> None:
        """Count what another tally of the same task has seen as well."""
        ...

    def result(self) -> dict[str, float]: ...


class Task(Protocol):
    """What the loop and the evaluator need of a task.

    Attributes:
        unit: what throughput counts, such as "tokens".
        metric: the validation metric that decides which checkpoint is best.
        lower: whether less of it is better.
        shown: the metrics that an evaluation prints.
        judged: whether the best checkpoint is scored on the test split when the run ends.
    """

    unit: str
    metric: str
    lower: bool
    shown: tuple[str, ...]
    judged: bool

    def count(self, batch: Batch) -> int:
        """How many predictions the loss of this batch sums over."""
        ...

    def size(self, batch: Batch) -> int:
        """How many units (tokens, images) the batch holds."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the loss over the batch, a float32 scalar."""
        ...

    def tally(self) -> Tally: ...


class TextTask:
    """Next-token prediction; the loss in nats a token."""

    unit, metric, lower = "tokens", "loss", True
    shown: tuple[str, ...] = ()
    judged: bool = False

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != -100).sum())

    def size(self, batch: Batch) -> int:
        return batch["input_ids"].numel()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return next_token_loss(model, batch)

    def tally(self) -> Tally:
        return TextTally(self)


class TextTally:
    """Loss over all tokens, each counted once, and the figure that the GaLore family publishes.

    ``loss``                  Σ loss / Σ tokens, in nats
    ``perplexity``            exp(loss)
    ``published_convention``  exp(Σ batch means / (batches + 1)): GaLore's ``torchrun_main.py`` and its descendants
                              start counting batches at 1 and average batch means; it is too low, and here only to
                              compare with their tables
    """

    def __init__(self, task: TextTask):
        self.task = task
        self.total, self.tokens, self.means, self.batches = 0.0, 0, 0.0, 0

    def add(self, model: nn.Module, batch: Batch) -> None:
        count = int((batch["labels"] != -100).sum())
        loss = float(self.task.loss(model, batch))  # of every batch: a sharded model is computed by all ranks at once
        if count == 0:
            return
        self.total, self.tokens = self.total + loss, self.tokens + count
        self.means, self.batches = self.means + loss / count, self.batches + 1

    def absorb(self, other: TextTally) -> None:
        self.total, self.tokens = self.total + other.total, self.tokens + other.tokens
        self.means, self.batches = self.means + other.means, self.batches + other.batches

    def result(self) -> dict[str, float]:
        loss = self.total / max(self.tokens, 1)
        return {
            "loss": loss,
            "perplexity": _exp(loss),
            "published_convention": _exp(self.means / (self.batches + 1)),
            "tokens": self.tokens,
        }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def task_of(name: str) -> Task:
    """The task by a run's ``task``."""
    return TASKS[name]()


TASKS: dict[str, type[Task]] = {"text": TextTask, "images": ImageTask}


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
