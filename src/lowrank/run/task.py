"""What is learnt: how a task turns a batch into a loss, and predictions into metrics.

The loop and the evaluator use a task only through :class:`Task`, so that text and images share both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lowrank.data.text.finetuning import default_context

if TYPE_CHECKING:
    from lowrank.run.run import Run

Batch = dict[str, Tensor]


class Tally(Protocol):
    """Collects what an evaluation sees, batch by batch."""

    def add(self, model: nn.Module, batch: Batch) -> None: ...

    def counted(self) -> Any:
        """What it has seen so far, as numbers, texts, tensors, and lists and dicts of them: ranks send it."""
        ...

    def absorb(self, counted: Any) -> None:
        """Count what another tally of the same task has ``counted`` as well."""
        ...

    def result(self) -> dict[str, float]: ...


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Files that a model is to answer, ``batch_size`` at once; ``out``: where the answers go, if anywhere.

    ``skip_damaged``: files that cannot be read are left out, and otherwise an error.
    """

    files: Sequence[Path]
    batch_size: int
    out: Path | None = None
    skip_damaged: bool = False


class Task(ABC):
    """What the loop and the evaluator ask of a task: a loss and a tally; the rest has defaults.

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
    judged: bool = False

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the loss over the batch, a float32 scalar."""

    @abstractmethod
    def tally(self) -> Tally:
        """An empty tally of an evaluation."""

    def count(self, batch: Batch) -> int:
        """How many predictions the loss of this batch sums over; by default its rows."""
        return len(batch["labels"])

    def size(self, batch: Batch) -> int:
        """How many units (tokens, images) the batch holds; by default its rows."""
        return len(batch["labels"])

    def shaped_by_data(self, run: Run) -> bool:
        """Whether a run's data must be read to know what its model is like: its vocabulary, its classes."""
        return True

    def stand_in(self, run: Run) -> tuple[Any, list[str]]:
        """(what stands for a run's data in a plan of it, what was assumed of it); nothing is opened."""
        raise ValueError(f"the task {run.task} says of no data what stands for it (stand_in): no plan can be made")

    def learnt(self, facts: Mapping[str, Any], folders: Sequence[Path]) -> Any:
        """What stands for the data of which a run has learnt ``facts`` (``Data.to_json``), where a model needs no more;
        None, as by default: the data is opened anew.

        Args:
            folders: where the data's own files may lie (``Data.write_facts``), the likeliest first.
        """
        return None

    def any_batch(self, model: nn.Module, data: Any, rows: int) -> Batch:
        """A batch of ``rows`` of what a model takes, of the data (or what stands for it); its numbers do not matter."""
        raise ValueError(f"{type(self).__name__} does not say what a batch is like (any_batch): no plan can be made")

    def report(self, data: Any, tally: Any, folder: Path, split: str) -> list[str]:
        """Where it is ``judged``: write into a run's ``folder`` what the ``tally`` of a split shows beyond its metrics;
        gives what is worth saying."""
        return []

    def predict(self, model: nn.Module, data: Any, asked: Asked) -> list[Any]:
        """What a model in evaluation mode, with what it has learnt of its ``data``, says of files: an answer each,
        which prints as a line, and is written to ``asked.out``.

        Raises:
            ValueError: damaged files (named, counted); a place that cannot be written; a task that answers no files.
        """
        raise ValueError(f"{type(self).__name__} answers no files: only models of images predict")


@dataclass(frozen=True)
class Unread:
    """Stands for text that a plan need not look at; its context may be left to the model."""

    context: int | None
    vocab_size: int = 0
    outputs: int = 1  # of a model of sequences
    end_of_document: int | None = None

    def check_vocabulary(self, vocab_size: int) -> None:
        pass  # there are no ids to check

    def for_model(self, model: nn.Module) -> Unread:
        return self if self.context is not None else replace(self, context=default_context(model))


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
