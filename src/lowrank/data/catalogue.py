"""The data that a run can name: functions that return a ``Data``, whose arguments are the run's ``--data.…`` options.

A batch is a pure function of (seed, n), so that a resumed run needs to know its step and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank.infra.registry import Registry

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

DATA = Registry(
    "data",
    "lowrank.data.text.corpora",
    "lowrank.data.text.finetuning",
    "lowrank.data.text.glue",
    "lowrank.data.images.source",
    "lowrank.data.images.masks",
)


class Data(ABC):
    """What a run learns from, whatever it is made of. Models may ask more of it: a vocabulary, classes."""

    @abstractmethod
    def train(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> Any:
        """A source of training batches: ``batch(n)``, rank's rows of the n-th, and ``batches_per_epoch``."""

    @abstractmethod
    def evaluation(self, split: str, batch_size: int, limit: int | None = None) -> Iterable[Any]:
        """The batches of ``train``, ``val`` or ``test`` that score everything once; with ``limit`` as many of them."""

    def has(self, split: str) -> bool:
        """Whether there is anything to score in a split; a run without ``val`` trains without evaluation."""
        return True

    def for_model(self, model: nn.Module) -> Self:
        """The same data as ``model`` wants it."""
        return self

    @property
    def unread(self) -> bool:
        """Whether it only stands for data that is not here: enough for a model, and nothing to train on or score."""
        return False

    notes: Sequence[str] = ()  # what a reader should know of it before the first step

    @property
    def fingerprint(self) -> str:
        """A digest of the content, by which a run knows its data again; empty: not known."""
        return ""

    def arguments(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by which the function that made this makes data under what the run has learnt of this."""
        return dict(args)

    def learnt_by(self, run: Any, *, whole: bool = False) -> Self:
        """The same data under what a run has learnt, ``run`` being the data of its facts; ``whole``: to train on it."""
        return self

    def to_json(self) -> dict[str, Any]:
        """What a run has learnt of its data, for its checkpoints, in plain JSON; empty: nothing."""
        return {}

    def write_facts(self, folder: Path) -> None:
        """Write into a run's folder, or an exported model's, what the model must know when the data is gone."""
        return

    def write_beside(self, model: nn.Module, folder: Path, origins: Sequence[str]) -> None:
        """Write beside an exported model what its library needs of the data, such as a tokenizer.

        Args:
            model: as it lies there.
            folder: where.
            origins: folders and names where a tokenizer may be whole: the base model's.
        """
        self.write_facts(folder)

    def bytes_per_token(self, split: str) -> float | None:
        """Of text: UTF-8 bytes for one token, to turn nats a token into bits a byte; None where not known."""
        return None
