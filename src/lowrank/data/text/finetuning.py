"""Examples as a run sees them: read, encoded by the model's own tokenizer, cut to its context, packed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowrank.data.split_names import SPLITS
from lowrank.data.text.batches import Batch, BatchSource, EvaluationRows, ShuffledRows
from lowrank.data.text.corpora import ReadText, place_of
from lowrank.data.text.encode import Encoder, Loss
from lowrank.data.text.example_rows import Row, divided_rows, open_rows
from lowrank.data.text.examples import Example, Form, recognise
from lowrank.data.text.fits_model import check_fits, positions_of
from lowrank.data.text.packing import Encoded, ExampleRows, packed
from lowrank.data.text.pretrained_tokenizer import PretrainedTokenizer, model_tokenizer
from lowrank.infra.progress import bar_on_terminal
from lowrank.infra.registry import register

if TYPE_CHECKING:
    from torch import nn

MOST_CONTEXT = 2048  # tokens in a row, where nobody says otherwise: the attention of a longer one is dear


@dataclass(frozen=True, kw_only=True)
class Examples(ReadText):
    """Examples for a causal language model.

    Attributes:
        source: where they are, for messages.
        form: what the rows are.
        tokenizer: the model's own.
        encoded: by split, before anything is cut.
        context: of a row; None until the model is known.
        packing: as asked for, or once the model is known ``packed`` or ``padded``.
        loss: on answers alone, or on everything.
        notes: what a reader should know of what was read.
    """

    source: str
    form: Form
    tokenizer: PretrainedTokenizer
    encoded: Mapping[str, Sequence[Encoded]]
    context: int | None
    packing: Literal["auto", "packed", "padded"]
    loss: Loss
    origin: str = ""
    notes: Sequence[str] = ()
    _rows: dict[str, ExampleRows] = field(default_factory=dict, repr=False, compare=False)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if an id is beyond a model's vocabulary."""
        largest = max(int(example.ids.max(initial=0)) for split in self.encoded.values() for example in split)
        if largest >= vocab_size:
            raise ValueError(
                f"{self.source} has token id {largest} under the tokenizer {self.tokenizer.spec!r}, but the model's "
                f"vocabulary ends at {vocab_size - 1}: it is another model's tokenizer; leave --data.tokenizer out"
            )

    def for_model(self, model: nn.Module) -> Examples:
        """Cut to the model's context, and packed where it keeps the examples of a row apart.

        Raises:
            ValueError: the tokenizer is another model's, the context is beyond the model's, packing is asked for and
                the model cannot, or nothing is left to learn.
        """
        check_fits(self.tokenizer, model)
        context, said = self._context_in(model)
        apart = self.packing != "padded" and keeps_apart(model)
        if self.packing == "packed" and not apart:
            raise ValueError(
                "--data.packing packed: this model would let the examples of a row see each other; use padded"
            )
        kept, cut, lost = {}, 0, 0
        for split, examples in self.encoded.items():
            kept[split], here, gone = self._fitted(examples, context)
            cut, lost = cut + here, lost + gone
        if not kept["train"]:
            raise ValueError(
                f"{self.source}: none of {len(self.encoded['train']):,} examples has an answer within "
                f"--data.context {context}: give a longer one"
            )
        notes = [*self.notes, *said, *_cut_notes(cut, lost, context, plain=self.form.kind == "text")]
        packing: Literal["packed", "padded"] = "packed" if apart else "padded"
        made = replace(self, encoded=kept, context=context, packing=packing, notes=notes, _rows={})
        return replace(made, notes=[*notes, *made.counts(asked=self.packing)])

    def counts(self, asked: str) -> list[str]:
        """How much there is of what, in lines; ``asked``: the packing that was asked for."""
        rows = self.rows("train")
        tokens, scored = sum(map(len, rows.examples)), sum(example.scored for example in rows.examples)
        parts = [f"{len(found):,} {name}" for split, name in _NAMES.items() if (found := self.encoded.get(split))]
        how = f"packed into {len(rows):,} rows" if self.packing == "packed" else "padded, one a row"
        cannot = " (this model cannot keep packed ones apart)" if self.packing == "padded" and asked == "auto" else ""
        total = f"{tokens:,} tokens to train on, {scored:,} of them count"
        return [f"{', '.join(parts)}; {total}", f"{how}, of at most {self.context:,} tokens{cannot}"]

    def _context_in(self, model: nn.Module) -> tuple[int, list[str]]:
        positions = positions_of(model)
        if self.context is not None:
            if positions and self.context > positions:
                raise ValueError(f"--data.context {self.context} is beyond the {positions} positions of the model")
            return self.context, []
        context = default_context(model)
        longest = max(len(example) for split in self.encoded.values() for example in split)
        if not positions or positions <= context or longest <= context:
            return context, []
        return context, [f"rows of {context:,} tokens; the model has {positions:,} positions (--data.context N)"]

    def _fitted(self, examples: Sequence[Encoded], context: int) -> tuple[list[Encoded], int, int]:
        """(what fits, how many were cut, how many have no answer left and are gone); plain text is divided instead."""
        kept: list[Encoded] = []
        cut = lost = 0
        for example in examples:
            if self.form.kind == "text":
                parts = [example.part(at, at + context) for at in range(0, len(example), context)]
                kept += [part for part in parts if part.scored]
                cut += len(parts) > 1
                continue
            long = len(example) > context
            short = example.part(0, context) if long else example
            cut, lost = cut + long, lost + (not short.scored)
            kept += [short] if short.scored else []
        return kept, cut, lost

    def rows(self, split: str) -> ExampleRows:
        """The rows of a split.

        Raises:
            ValueError: there is no such split, or nothing in it.
        """
        if not self.encoded.get(split):
            known = ", ".join(name for name, found in self.encoded.items() if found)
            raise ValueError(f"{self.source} has no examples in {split!r}; it has {known}")
        if split not in self._rows:
            examples = self.encoded[split]
            apart = self.packing == "packed"
            assert self.context is not None, "for_model() comes first"
            numbers = packed([*map(len, examples)], self.context) if apart else [[n] for n in range(len(examples))]
            self._rows[split] = ExampleRows(examples, numbers, positions=apart)
        return self._rows[split]

    def has(self, split: str) -> bool:
        """Whether there is such a split, with an answer left in it."""
        return bool(self.encoded.get(split))

    def train(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> BatchSource:
        """Training batches of rows, in a seeded order."""
        return ShuffledRows(self.rows("train"), batch_size, seed, rank, ranks)

    def evaluation(self, split: str, batch_size: int, limit: int | None = None) -> Iterable[Batch]:
        """Batches of every row once, or the ``limit`` that are always the same."""
        return EvaluationRows(self.rows(split), batch_size, limit)

    def arguments(self, args: Mapping[str, Any]) -> dict[str, Any]:
        return {**args, "tokenizer": self.tokenizer.spec}

    @property
    def fingerprint(self) -> str:
        """A digest of ids and answers."""
        found = hashlib.blake2b(digest_size=16)
        for split in SPLITS:
            for example in self.encoded.get(split, ()):
                found.update(split.encode() + example.ids.tobytes() + example.count.tobytes())
        return found.hexdigest()


_NAMES = {"train": "examples", "val": "to validate", "test": "to test"}


@torch.no_grad()
def keeps_apart(model: nn.Module) -> bool:
    """Whether the model sees by ``position_ids`` that a row holds two texts, and computes each as if it were alone."""
    if next(model.parameters()).is_meta:
        return False
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        rows = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 5, 2, 4, 5, 6]], device=device)
        positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2, device=device)
        both = model(input_ids=rows, position_ids=positions, use_cache=False).logits[:, 3:].float()
        alone = model(input_ids=rows[:1, 3:], use_cache=False).logits[0].float()
        scale = alone.abs().max().clamp_min(1e-6)
        return bool((both - alone).abs().max() <= 2e-2 * scale) and bool(
            (both[0] - both[1]).abs().max() <= 1e-5 * scale
        )
    except (TypeError, ValueError, RuntimeError, IndexError):  # it does not take positions
        return False
    finally:
        model.train(training)


def default_context(model: nn.Module) -> int:
    """Tokens in a row where nobody says: the model's positions, up to ``MOST_CONTEXT``."""
    return min(positions_of(model) or MOST_CONTEXT, MOST_CONTEXT)


def _cut_notes(cut: int, lost: int, context: int, *, plain: bool) -> list[str]:
    if not cut and not lost:
        return []
    if plain:
        return [f"{cut:,} texts longer than {context:,} tokens are divided"]
    gone = [f"{lost:,} of them have no answer left, and are left out"] if lost else []
    return [f"{cut:,} examples longer than {context:,} tokens are cut (--data.context N)", *gone]


@register("data")
def examples(
    source: str = "",
    *,
    tokenizer: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    column: str | None = None,
    delimiter: str | None = None,
    loss: Loss = "completion",
    chat_template: str | None = None,
    context: int | Literal["auto"] = "auto",
    packing: Literal["auto", "packed", "padded"] = "auto",
    val_fraction: float | None = None,
    test_fraction: float | None = None,
) -> Examples:
    """Prompts with answers, chats or texts, to fine-tune a pre-trained language model on.

    Args:
        source: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder of them, one that `datasets` saved, or a
            name from ``lowrank data list``.
        tokenizer: the model's own where it is left out.
        prompt, completion: the columns of a pair, where they have other names than these.
        column: the column of a text or of chats, where it has an unusual name.
        delimiter: what stands between the cells of CSV files.
        loss: on the answers alone, or on all tokens.
        chat_template: a Jinja file, ``plain`` or ``chatml``, in the place of the tokenizer's own.
        context: tokens in a row; ``auto`` takes the model's, up to 2,048.
        packing: ``packed`` puts several examples into a row, which do not see each other; ``padded`` one; ``auto``
            packs where the model keeps them apart.
        val_fraction, test_fraction: shares to hold out where the source has no such split (default 0.05 each).

    Raises:
        ValueError, OSError: bad input.
    """
    if not source:
        raise ValueError("what is the model to be fine-tuned on? give --data FILE|FOLDER|NAME")
    if context != "auto" and context < 2:
        raise ValueError(f"--data.context {context} must be at least 2 tokens")
    own = model_tokenizer(tokenizer or "", chat_template)
    opened = open_rows(source, delimiter)
    first = next((row for _, row in opened["train"]()), None)
    if first is None:
        raise ValueError(f"{source} holds nothing to train on")
    form = recognise(first, source, prompt=prompt, completion=completion, column=column)
    rows = divided_rows(opened, val_fraction, test_fraction)
    encoder = Encoder(own, loss)
    total, done, empty, show = sum(map(len, rows.values())), 0, 0, bar_on_terminal(unit=" examples")

    def read(of: Iterable[Row]) -> Iterator[tuple[str, Example]]:
        nonlocal done, empty
        for where, row in of:
            example = form.example(row, where, chats=own.template is not None)
            if example is None:
                empty += 1
            else:
                yield where, example
            done += 1
            show(done, total)

    encoded = {split: [*encoder.encode(read(of))] for split, of in rows.items()}
    if not encoded["train"]:
        raise ValueError(f"{source}: every answer is empty" if empty else f"{source} holds nothing to train on")
    notes = [_said(form, source, own, loss), *_oddities(empty, encoder, own, encoded["train"])]
    return Examples(
        source=source,
        form=form,
        tokenizer=own,
        encoded=encoded,
        context=None if context == "auto" else context,
        packing=packing,
        loss=loss,
        origin=place_of(source),
        notes=notes,
    )


def holds_examples(source: str, column: str | None) -> bool:
    """Whether a source's first row is a chat, a pair or an instruction, and no text."""
    try:
        first = next((row for _, row in open_rows(source, None)["train"]()), {})
        return recognise(first, source, column=column).kind != "text"
    except (ValueError, OSError, KeyError):
        return False  # what reads it as text says what is wrong with it


def _said(form: Form, source: str, tokenizer: PretrainedTokenizer, loss: Loss) -> str:
    """What was recognised, in a sentence."""
    names = " and ".join(map(repr, form.columns)) if len(form.columns) < 3 else ", ".join(map(repr, form.columns))
    templated = "through the chat template" if tokenizer.template is not None else "in Alpaca's own prompt"
    what = {
        "chat": f"chats in {names}, through the chat template",
        "pair": f"pairs in {names}, verbatim",
        "alpaca": f"instructions in {names}, {templated}",
        "text": f"texts in {names}",
    }[form.kind]
    counts = "every token counts" if loss == "all" or form.kind == "text" else "only the answers count"
    return f"{Path(source).name}: {what}; {counts}"


def _oddities(
    empty: int, encoder: Encoder, tokenizer: PretrainedTokenizer, encoded: Sequence[Encoded]
) -> Iterator[str]:
    if empty:
        yield f"{empty:,} rows without an answer are left out"
    if encoder.split_chats:
        yield (f"{encoder.split_chats:,} chats are learnt answer by answer: their template rewrites earlier ones")
    ends = tokenizer.ends_of_turn
    if not any(set(example.ids[example.count].tolist()) & set(ends) for example in encoded[:64]):
        yield "no answer ends in what ends generation: nothing teaches the model to stop"
