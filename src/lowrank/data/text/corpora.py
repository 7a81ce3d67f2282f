"""Text as a run sees it: a corpus with the context in which it is read.

``text`` is tokenised once into files and then read from there; ``stream`` tokenises as it reads, for what is too large
to prepare (C4). Both read packed windows, or one document a sequence as the GaLore papers do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lowrank.data.catalogue import Data
from lowrank.data.text.batches import (
    Batch,
    BatchSource,
    Documents,
    EvaluationRows,
    ShuffledRows,
    Streamed,
    Windows,
    evaluation_batches,
)
from lowrank.data.text.fits_model import check_fits, positions_of
from lowrank.data.text.prepare import prepare
from lowrank.data.text.run_tokenizer import RUN_TOKENIZER, save_run_tokenizer
from lowrank.data.text.source import SOURCES, Source
from lowrank.data.text.sources import open_source
from lowrank.data.text.token_files import Tokens, check_vocabulary
from lowrank.data.text.tokenizer_export import save_for_transformers
from lowrank.data.text.tokenizers import Tokenizer, pretrained_tokenizer
from lowrank.infra.registry import register

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

Packing = Literal["packed", "documents"]


class Corpus(Protocol):
    """What a language model must know of its data."""

    @property
    def context(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_document(self) -> int | None: ...

    def check_vocabulary(self, vocab_size: int) -> None: ...


class Tokenised(Data):
    """Text of any kind, in the ids of its ``tokenizer``, which goes with a model."""

    tokenizer: Any

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.vocab_size)

    @property
    def end_of_document(self) -> int | None:
        end: int | None = self.tokenizer.end_of_document
        return end

    def write_beside(self, model: nn.Module, folder: Path, origins: Sequence[str]) -> None:
        save_for_transformers(self.tokenizer, folder, origins=origins, context=positions_of(model))


class ReadText(Tokenised):
    """What all text that a language model reads has in common for a model and a run."""

    context: Any  # tokens in a sequence; None until the model is known
    origin: str  # the full path of a local source; empty for a name

    def learnt_by(self, run: Any, *, whole: bool = False) -> Self:
        """Raise ValueError unless the run's tokenizer is the one that has read this."""
        if self.tokenizer.fingerprint != run.tokenizer.fingerprint:
            raise ValueError(
                f"this text was read by tokenizer {self.tokenizer.spec!r} and the run was trained with another "
                f"({run.tokenizer.spec!r}, {run.vocab_size:,} ids): give the text itself, or tokens that the run's made"
            )
        return self

    def to_json(self) -> dict[str, Any]:
        return {"context": self.context, "fingerprint": self.fingerprint, "origin": self.origin}

    def write_facts(self, folder: Path) -> None:
        save_run_tokenizer(self.tokenizer, folder)

    def for_model(self, model: nn.Module) -> Self:
        """Raise ValueError where a sequence is longer than the positions that the model has."""
        positions = positions_of(model)
        if positions and self.context > positions:
            raise ValueError(f"data.context={self.context} is beyond the {positions} positions of the model")
        if (tokenizer := self._known_tokenizer()) is not None:
            check_fits(tokenizer, model, size=False)
        return self

    def _known_tokenizer(self) -> Tokenizer | None:
        """None of nanoGPT's tokens that do not say it."""
        found: Tokenizer | None = None
        with contextlib.suppress(ValueError):
            found = self.tokenizer
        return found


@dataclass(frozen=True)
class TextData(ReadText):
    """Tokenised text."""

    tokens: Tokens
    context: int
    packing: Packing = "packed"
    origin: str = ""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.tokens.tokenizer

    def has(self, split: str) -> bool:
        return split in self.tokens.splits

    def arguments(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """A tokenizer that was learnt from this text lies beside its tokens."""
        spec = self.tokenizer.spec
        learnt = spec == "chars" or spec.startswith("bpe:")
        return {**args, "tokenizer": str(self.tokens.folder) if learnt else spec}

    def write_facts(self, folder: Path) -> None:
        """The tokenizer; of nanoGPT's folders it may not be known."""
        with contextlib.suppress(ValueError):
            super().write_facts(folder)

    @property
    def vocab_size(self) -> int:
        return self.tokens.vocab_size

    @property
    def end_of_document(self) -> int | None:
        return self.tokens.end_of_document

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if an id is beyond a model's vocabulary."""
        check_vocabulary(self.tokens, vocab_size)

    @property
    def fingerprint(self) -> str:
        """A digest of the tokens: equal where, and only where, training would read the same."""
        return self.tokens.fingerprint

    def bytes_per_token(self, split: str) -> float | None:
        return self.tokens.bytes_per_token(split)

    def train(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> BatchSource:
        if self.packing == "packed":
            return Windows(self.tokens, "train", self.context, batch_size, seed, rank, ranks)
        return ShuffledRows(Documents(self.tokens, "train", self.context), batch_size, seed, rank, ranks)

    def evaluation(self, split: str, batch_size: int, limit: int | None = None) -> Iterable[Batch]:
        """Batches that score every token (or document) of ``split`` once, or the ``limit`` that are always the same."""
        if self.packing == "packed":
            return evaluation_batches(self.tokens, split, self.context, batch_size, limit)
        return EvaluationRows(Documents(self.tokens, split, self.context), batch_size, limit)


@dataclass
class StreamedText(ReadText):
    """Text that is tokenised as it is read; its length is not known, so runs say ``steps`` and ``eval_batches``."""

    source: Source
    tokenizer: Tokenizer
    context: int
    packing: Packing = "documents"
    origin: str = ""
    _vocabulary: int | None = field(default=None, init=False)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Ids are checked against this vocabulary as they come: T5's 32,100 hold sentinels that no text has."""
        self._vocabulary = vocab_size

    @property
    def fingerprint(self) -> str:
        """A digest of what is known of the source before it is read (files: their content), and of the tokenizer."""
        known = json.dumps([self.source.fingerprint, self.tokenizer.fingerprint], sort_keys=True)
        return hashlib.blake2b(known.encode(), digest_size=16).hexdigest()

    def has(self, split: str) -> bool:
        return split in self.source.splits

    def train(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> BatchSource:
        """Training batches, shuffled within a buffer."""
        return self._read("train", batch_size, seed, rank, ranks)

    def evaluation(self, split: str, batch_size: int, limit: int | None = None) -> Iterable[Batch]:
        """The first ``limit`` batches of the split, in the source's order."""
        if limit is None:
            raise ValueError(f"{self.source.name} is streamed: say how many batches to evaluate on (--eval-batches)")
        reader = self._read(split, batch_size, seed=0, rank=0, ranks=1, shuffle_documents=1)
        return (reader.batch(n) for n in range(limit))

    def _read(self, split: str, batch_size: int, seed: int, rank: int, ranks: int, **shuffle: int) -> Streamed:
        return Streamed(
            self.source,
            self.tokenizer,
            split,
            self.context,
            batch_size,
            seed,
            rank,
            ranks,
            packed=self.packing == "packed",
            vocab_size=self._vocabulary,
            **shuffle,
        )


@dataclass(frozen=True, kw_only=True)
class UnreadText(Tokenised):
    """What a run has learnt of its text: the tokenizer, in the run's ``folder``, and how the text was read.

    Enough to make the model, to generate and to export; text that is scored or trained on further is made with it.
    """

    folder: Path
    context: int
    fingerprint: str = ""
    origin: str = ""
    tokenizer: Tokenizer

    unread = True

    def check_vocabulary(self, vocab_size: int) -> None:
        """There are no ids to check."""

    def arguments(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """The tokenizer by its folder; it holds its chat template."""
        own = {"tokenizer": str(self.folder / RUN_TOKENIZER), "chat_template": None}
        return {**args, **{name: value for name, value in own.items() if name in args}}

    def write_facts(self, folder: Path) -> None:
        save_run_tokenizer(self.tokenizer, folder)

    def train(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> BatchSource:
        """ValueError: there is nothing to read."""
        raise ValueError(f"the text that {self.folder} was trained on has not been opened: give it with --data")

    def evaluation(self, split: str, batch_size: int, limit: int | None = None) -> Iterable[Batch]:
        return self.train(batch_size, 0)  # type: ignore[return-value]


def place_of(source: str) -> str:
    """The full path of a local source, so that another working directory changes nothing; empty for a name."""
    path = Path(source).expanduser()
    return str(path.resolve()) if source not in SOURCES and path.exists() else ""


@register("data")
def text(
    source: str = "builtin",
    *,
    tokenizer: str | None = None,
    column: str | None = None,
    delimiter: str | None = None,
    separator: str | None = None,
    context: int = 128,
    packing: Packing = "packed",
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    limit: int | None = None,
) -> TextData:
    """Text to model, tokenised at first use.

    Args:
        source: a name from ``lowrank data list``, a file, a folder, or a folder of tokens.
        context: tokens in a sequence.
        packing: ``packed`` cuts the text into windows; ``documents`` takes one document a sequence, cut or padded.
        tokenizer, column, delimiter, separator, val_fraction, test_fraction, limit: as in :func:`lowrank.data.prepare`.

    Raises:
        ValueError, OSError: as in :func:`lowrank.data.prepare`.
    """
    if context < 1:
        raise ValueError(f"data.context={context} must be at least 1")
    tokens = prepare(
        source,
        tokenizer=tokenizer,
        column=column,
        delimiter=delimiter,
        separator=separator,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        limit=limit,
    )
    return TextData(tokens, context, packing, place_of(source))


@register("data")
def stream(
    source: str = "c4",
    *,
    tokenizer: str = "t5-base",
    column: str | None = None,
    delimiter: str | None = None,
    separator: str | None = None,
    context: int = 256,
    packing: Packing = "documents",
) -> StreamedText:
    """Text that is never prepared: read, tokenised and shuffled in a buffer as training goes.

    Resuming reads the source again up to its place.

    Args:
        source, column, delimiter, separator: as in ``text``.
        tokenizer: one that exists already (``bytes``, or transformers'); the papers' is T5's.
        context, packing: as in ``text``; the papers' are 256 and one document a sequence.
    """
    if tokenizer == "chars" or tokenizer.startswith("bpe:"):
        raise ValueError(f"data.tokenizer={tokenizer!r} is learnt from the whole text, which a stream does not have")
    opened = open_source(source, column=column, delimiter=delimiter, separator=separator)
    return StreamedText(opened, pretrained_tokenizer(tokenizer), context, packing, place_of(source))
