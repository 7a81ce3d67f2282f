"""The task of predicting the next token: its loss, and what an evaluation of it says."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.data.text.corpora import UnreadText
from lowrank.data.text.run_tokenizer import open_run_tokenizer
from lowrank.infra.registry import register
from lowrank.models.text import next_token_loss
from lowrank.run.run import Run
from lowrank.run.task import Batch, Task, Unread

ASSUMED_CHARACTERS = 256
_IDS = {"bytes": 256, "gpt2": 50257, "t5-base": 32100}  # of tokenizers by name


@register("task", "text")
class TextTask(Task):
    """Next-token prediction; the loss in nats a token."""

    unit, metric, lower = "tokens", "loss", True
    shown: tuple[str, ...] = ("loss", "perplexity")

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != -100).sum())

    def size(self, batch: Batch) -> int:
        return batch["input_ids"].numel()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return next_token_loss(model, batch)

    def tally(self) -> TextTally:
        return TextTally(self)

    def shaped_by_data(self, run: Run) -> bool:
        return run.model.name != "pretrained" and not isinstance(run.model.args.get("vocab_size"), int)

    def stand_in(self, run: Run) -> tuple[Unread, list[str]]:
        args = run.data.args
        told = args.get("context") or 1024
        context = None if told == "auto" else int(str(told))
        given = run.model.args.get("vocab_size")
        if isinstance(given, int) or run.model.name == "pretrained":
            return Unread(context, given if isinstance(given, int) else 0), []
        ids, notes = _vocabulary(str(args.get("tokenizer", "bytes")))
        return Unread(context, ids), notes

    def learnt(self, facts: Mapping[str, Any], folders: Sequence[Path]) -> UnreadText | None:
        for folder in folders if "context" in facts else ():
            if (tokenizer := open_run_tokenizer(folder)) is not None:
                known = {name: facts[name] for name in ("context", "fingerprint", "origin")}
                return UnreadText(folder=folder, tokenizer=tokenizer, **known)
        return None

    def any_batch(self, model: nn.Module, data: Any, rows: int) -> Batch:
        ids = torch.zeros(rows, data.context, dtype=torch.int64)
        return {"input_ids": ids, "labels": torch.zeros_like(ids)}


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


def _vocabulary(tokenizer: str) -> tuple[int, list[str]]:
    if tokenizer in _IDS:
        return _IDS[tokenizer], []
    if match := re.fullmatch(r"bpe:(\d+)", tokenizer):
        return int(match[1]), []
    what = f"the data's vocabulary under the tokenizer {tokenizer} is not known before it is read: "
    return ASSUMED_CHARACTERS, [f"{what}{ASSUMED_CHARACTERS} ids are assumed; --model.vocab_size N says it"]


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
