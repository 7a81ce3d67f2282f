"""The task of predicting the next token: its loss, and what an evaluation of it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowrank.infra.registry import register
from lowrank.models.text import next_token_loss
from lowrank.run.task import Batch


@register("task", "text")
class TextTask:
    """Next-token prediction; the loss in nats a token."""

    unit, metric, lower = "tokens", "loss", True
    shown: tuple[str, ...] = ("loss", "perplexity")
    judged: bool = False

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != -100).sum())

    def size(self, batch: Batch) -> int:
        return batch["input_ids"].numel()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return next_token_loss(model, batch)

    def tally(self) -> TextTally:
        return TextTally(self)

    def report(self, data: Any, tally: TextTally, folder: Path, split: str) -> list[str]:
        return []


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

    def counted(self) -> list[float]:
        return [self.total, self.tokens, self.means, self.batches]

    def absorb(self, counted: list[float]) -> None:
        total, tokens, means, batches = counted
        self.total, self.tokens = self.total + total, self.tokens + int(tokens)
        self.means, self.batches = self.means + means, self.batches + int(batches)

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
