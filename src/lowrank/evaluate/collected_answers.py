"""What tallies of whole splits share: answers and labels, collected batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Collected:
    """Loss, answers and labels of a split: its metrics are of all of it and not means over batches."""

    def __init__(self) -> None:
        self.total = 0.0
        self._answers: list[Tensor] = []
        self._labels: list[Tensor] = []

    def keep(self, loss: Tensor, answers: Tensor, labels: Tensor) -> None:
        """Of a batch: the sum of its losses, and its answers (batch, …) beside the labels (batch, …)."""
        self.total += float(loss)
        self._answers.append(answers.cpu())
        self._labels.append(labels.cpu())

    def counted(self) -> dict[str, Any]:
        return {"total": self.total, "answers": self._answers, "labels": self._labels}

    def absorb(self, counted: dict[str, Any]) -> None:
        self.total += counted["total"]
        self._answers += counted["answers"]
        self._labels += counted["labels"]

    def answers(self, of: str) -> np.ndarray:
        """All of them, float32, in the order in which they were kept.

        Raises:
            FloatingPointError: the model gave NaN (to ``of``, such as "images").
        """
        answers = torch.cat(self._answers)
        check_finite(answers, of)
        return answers.numpy()


def defined_mean(figures: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """The mean over the first dimension of what is defined (finite); NaN where nothing is."""
    figures = np.asarray(figures)
    there = np.isfinite(figures)
    with np.errstate(invalid="ignore"):
        means: np.ndarray = np.where(there, figures, 0.0).sum(axis=0) / there.sum(axis=0)
    return means


def check_finite(answers: Tensor, of: str) -> None:
    """Raise FloatingPointError where a model's answers (n, …) are not numbers."""
    wrong = int((~torch.isfinite(answers).flatten(1).all(dim=1)).sum())
    if wrong:
        raise FloatingPointError(
            f"the model's answers to {wrong} of {len(answers)} {of} are not finite: a weight of it, or a product of "
            "them, is NaN or infinite; use an earlier checkpoint, or --precision fp32"
        )
