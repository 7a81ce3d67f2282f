"""GLUE (Wang et al., arXiv 1804.07461): sentences, or pairs of them, with a class or a score each.

A folder in GLUE's own layout (``train.tsv``, ``dev.tsv``) is recognised by the columns of its files; without one the
tables come from the hub. GLUE keeps the labels of its test split to itself, so that ``dev`` is what is reported: it is
``test`` here, and ``val``, by which the best checkpoint is chosen, is a seeded part of ``train``.

Shapes of a batch: input_ids, attention_mask (and what else the tokenizer gives) (batch, longest) int64; labels (batch,)
int64 for classes, float32 for scores.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lowrank.data.text.batches import Batch, BatchSource, EvaluationRows, ShuffledRows
from lowrank.data.text.corpora import Tokenised
from lowrank.data.text.fits_model import check_fits, positions_of
from lowrank.data.text.pretrained_tokenizer import PretrainedTokenizer, model_tokenizer
from lowrank.infra.extras import import_extra
from lowrank.infra.hub import ask_hub
from lowrank.infra.registry import register

if TYPE_CHECKING:
    from torch import nn

Name = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A task of GLUE: its ``columns`` of text, the column of its ``label``, and the ``classes`` in the hub's order
    (none: a score). ``header`` is False where the files have none; columns are then numbers."""

    columns: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    dev: str = "dev.tsv"
    header: bool = True


_ENTAILS = ("entailment", "not_entailment")
TABLES: Mapping[str, Table] = {
    "cola": Table(columns=("3",), label="1", classes=("0", "1"), header=False),
    "sst2": Table(columns=("sentence",), label="label", classes=("0", "1")),
    "mrpc": Table(columns=("#1 String", "#2 String"), label="Quality", classes=("0", "1")),
    "stsb": Table(columns=("sentence1", "sentence2"), label="score", classes=()),
    "qqp": Table(columns=("question1", "question2"), label="is_duplicate", classes=("0", "1")),
    "mnli": Table(
        columns=("sentence1", "sentence2"),
        label="gold_label",
        classes=("entailment", "neutral", "contradiction"),
        dev="dev_matched.tsv",
    ),
    "qnli": Table(columns=("question", "sentence"), label="label", classes=_ENTAILS),
    "rte": Table(columns=("sentence1", "sentence2"), label="label", classes=_ENTAILS),
    "wnli": Table(columns=("sentence1", "sentence2"), label="label", classes=("0", "1")),
}
Row = tuple[tuple[str, ...], float]


class SequenceRows:
    """Encoded sequences with their labels, as :class:`lowrank.data.text.batches.Rows`."""

    def __init__(self, backend: Any, encoded: Sequence[Mapping[str, Any]], labels: np.ndarray):
        self._backend, self._encoded, self.labels = backend, encoded, labels

    def __len__(self) -> int:
        return len(self._encoded)

    def rows(self, numbers: np.ndarray) -> Batch:
        """These rows, padded to the longest of them."""
        chosen = [self._encoded[int(n)] for n in numbers]
        if not chosen:  # a rank without a share of the last batch
            empty = torch.zeros(0, 1, dtype=torch.int64)
            return {"input_ids": empty, "attention_mask": empty, "labels": torch.tensor(self.labels[:0])}
        padded: dict[str, Tensor] = dict(self._backend.pad(chosen, return_tensors="pt"))
        return {**padded, "labels": torch.tensor(self.labels[numbers])}


@dataclass(frozen=True, kw_only=True)
class Glue(Tokenised):
    """A task of GLUE under a model's tokenizer; ``context``: tokens of a sequence, None until the model is known."""

    name: str
    tokenizer: PretrainedTokenizer
    tables: Mapping[str, Sequence[Row]]
    context: int | None
    notes: Sequence[str] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes by number; none where a score is learnt."""
        return TABLES[self.name].classes

    @property
    def outputs(self) -> int:
        """Numbers that a model gives for a sequence."""
        return len(self.classes) or 1

    @property
    def padding(self) -> int:
        """The id that fills up a batch."""
        return int(self.tokenizer.backend.pad_token_id)

    def for_model(self, model: nn.Module) -> Glue:
        """Cut to the model's positions.

        Raises:
            ValueError: the tokenizer is another model's, or a context beyond the model's positions.
        """
        check_fits(self.tokenizer, model)
        most = self.tokenizer.backend.model_max_length
        positions = min(positions_of(model) or most, most)
        if self.context is not None and self.context > positions:
            raise ValueError(f"--data.context {self.context} is beyond the {positions} positions of the model")
        return replace(self, context=self.context or min(positions, 512))

    def rows(self, split: str) -> SequenceRows:
        """The sequences of a split, encoded.

        Raises:
            ValueError: there is no such split.
        """
        table = self.tables.get(split)
        if not table:
            raise ValueError(f"{self.name} has no {split!r}; it has {', '.join(self.tables)}")
        texts, labels = zip(*table, strict=True)
        first, *second = zip(*texts, strict=True)
        backend = self.tokenizer.backend
        found = backend(list(first), *map(list, second), truncation=True, max_length=self.context, verbose=False)
        encoded = [{key: values[n] for key, values in found.items()} for n in range(len(table))]
        return SequenceRows(backend, encoded, np.array(labels, np.int64 if self.classes else np.float32))

    def train(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> BatchSource:
        return ShuffledRows(self.rows("train"), batch_size, seed, rank, ranks)

    def evaluation(self, split: str, batch_size: int, limit: int | None = None) -> Iterable[Batch]:
        return EvaluationRows(self.rows(split), batch_size, limit)

    def has(self, split: str) -> bool:
        return bool(self.tables.get(split))

    @property
    def fingerprint(self) -> str:
        """A digest of texts and labels, by split."""
        return hashlib.blake2b(repr(sorted(self.tables.items())).encode(), digest_size=16).hexdigest()


@register("data")
def glue(
    source: str = "",
    *,
    name: Name | Literal["auto"] = "auto",
    tokenizer: str | None = None,
    context: int | Literal["auto"] = "auto",
    val_fraction: float = 0.1,
) -> Glue:
    """A task of GLUE, from a folder in its layout or from the hub.

    Args:
        source: the folder with train.tsv and dev.tsv; nothing takes it from the hub.
        name: which task; ``auto`` tells it by the files' columns.
        tokenizer: the model's own where it is left out.
        context: tokens of a sequence; ``auto`` takes the model's, up to 512.
        val_fraction: the share of ``train`` that chooses the best checkpoint; 0 trains on all of it.

    Raises:
        ValueError, OSError: bad input.
    """
    if context != "auto" and context < 2:
        raise ValueError(f"--data.context {context} must be at least 2 tokens")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"--data.val_fraction {val_fraction} must be at least 0 and below 1")
    if name != "auto" and name not in TABLES:
        raise ValueError(f"--data.name {name!r} is none of {', '.join(get_args(Name))}")
    folder = Path(source).expanduser()
    if source and not folder.is_dir():
        raise FileNotFoundError(f"--data {source} is no folder: give one with train.tsv and dev.tsv, in GLUE's layout")
    chosen = name if name != "auto" else _recognised(folder) if source else ""
    if not chosen:
        raise ValueError(f"which task of GLUE? give its folder by --data, or --data.name {'|'.join(TABLES)}")
    table = TABLES[chosen]
    if source:
        train, dev = (list(_read(folder / file, table)) for file in ("train.tsv", table.dev))
    else:
        train, dev = _from_hub(chosen, table)
    order = np.random.default_rng(0).permutation(len(train))
    held = {int(n) for n in order[: round(val_fraction * len(train))]}
    tables = {
        "train": [row for n, row in enumerate(train) if n not in held],
        "val": [row for n, row in enumerate(train) if n in held],
        "test": dev,
    }
    what = f"{len(table.classes)} classes" if table.classes else "scores"
    counts = f"{len(tables['train']):,} to train, {len(held):,} of train to choose by, {len(dev):,} of dev to report"
    own = model_tokenizer(tokenizer or "", None)
    if own.backend.pad_token_id is None:  # a decoder's: attention passes over it, and so does the loss
        own.backend.pad_token = own.backend.eos_token
    return Glue(
        name=chosen,
        tokenizer=own,
        tables={split: rows for split, rows in tables.items() if rows},
        context=None if context == "auto" else context,
        notes=[f"{chosen}, {what}: {counts}"],
    )


def _recognised(folder: Path) -> str:
    """Which task a folder holds: by its name where that is one of GLUE's, else by the columns of its files."""
    by_name = folder.name.lower().replace("-", "").replace("_", "")
    if by_name in TABLES:
        return by_name
    columns = set(_header(folder / "train.tsv"))
    fitting = [name for name, table in TABLES.items() if table.header and {*table.columns, table.label} <= columns]
    if len(fitting) == 1:
        return fitting[0]
    which = f"{' or '.join(fitting)}" if fitting else "none of GLUE's tasks"
    raise ValueError(f"{folder} is {which} by its columns: say which by --data.name {'|'.join(fitting or TABLES)}")


def _header(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: GLUE's folders have train.tsv and dev.tsv")
    with file.open(encoding="utf-8", newline="") as lines:
        return next(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), [])


def _read(file: Path, table: Table) -> Iterator[Row]:
    """The rows of a file; GLUE's quote nothing."""
    header = _header(file)
    names = header if table.header else [str(n) for n in range(len(header))]
    missing = {*table.columns, table.label} - set(names)
    if missing:
        raise ValueError(f"{file} has no column {', '.join(sorted(missing))}; it has {', '.join(names)}")
    columns, label = [names.index(column) for column in table.columns], names.index(table.label)
    with file.open(encoding="utf-8", newline="") as lines:
        for number, cells in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            if number == 1 and table.header:
                continue
            if len(cells) != len(names):
                raise ValueError(f"{file}, line {number}: {len(cells)} cells, and the first line has {len(names)}")
            yield tuple(cells[n] for n in columns), _label(cells[label], table, f"{file}, line {number}")


def _label(text: str, table: Table, where: str) -> float:
    if table.classes:
        if text not in table.classes:
            raise ValueError(f"{where}: the label {text!r} is none of {', '.join(table.classes)}")
        return table.classes.index(text)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: the score {text!r} is no number") from None


def _from_hub(name: str, table: Table) -> tuple[list[Row], list[Row]]:
    """(train, dev) of the hub's copy, whose columns have plainer names and whose labels are numbers."""
    datasets = import_extra("datasets", "text")
    ask_hub()
    try:
        found = datasets.load_dataset("nyu-mll/glue", name, trust_remote_code=False)
    except Exception as error:  # of many kinds: there is no network, or the hub has no answer
        raise FileNotFoundError(
            f"GLUE's {name} could not be had from the hub ({type(error).__name__}): give a folder with train.tsv and "
            f"{table.dev}, --data FOLDER"
        ) from error
    dev = "validation_matched" if name == "mnli" else "validation"

    def rows(split: str) -> list[Row]:
        columns = [column for column in found[split].column_names if column not in ("label", "idx")]
        return [(tuple(row[column] for column in columns), float(row["label"])) for row in found[split]]

    return rows("train"), rows(dev)
