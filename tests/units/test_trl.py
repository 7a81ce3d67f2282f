"""The same labels and the same loss as TRL's ``SFTTrainer`` on the same examples; skipped where there is no TRL."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.chats import CHATML, FAMILIES, MARKED, THINKING, TURNS, saved

from lowrank.data.text.finetuning import Examples, examples
from lowrank.models.text import load_pretrained, next_token_loss

pytest.importorskip("trl")

PAIRS = [
    {"prompt": "Question: what is light?\nAnswer:", "completion": " A picture on film."},
    {"prompt": "What is the capital of France?", "completion": "Paris is the capital"},
    {"prompt": "Write </s> and go on", "completion": " a photograph</s>"},
    {"prompt": "Cut me. " * 40, "completion": " no answer is left"},
    {"prompt": "Cut my answer.", "completion": " light on film" * 40},
]
ASKED, ANSWERED = {"role": "user", "content": "What is light?"}, {"role": "assistant", "content": "A picture"}
TURN = {"prompt": [ASKED], "completion": [ANSWERED]}
TALK = {"messages": [ASKED, ANSWERED, {"role": "user", "content": "Why?"}, ANSWERED]}
TEXT = [{"text": "A photograph is a picture."}, {"text": "Paris is the capital of France"}]
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "pairs": (PAIRS, {}, {}),
    "pairs, every token": (PAIRS, {"completion_only_loss": False}, {"loss": "all"}),
    "turns": ([TURN] * 3, {}, {}),
    "chats, every token": ([TALK] * 2, {}, {"loss": "all"}),
    "texts": (TEXT, {}, {}),
}


def theirs(folder: Path, rows: list[dict[str, Any]], tmp_path: Path, **options: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    quiet = {"report_to": [], "use_cpu": True, "bf16": False}
    config = SFTConfig(output_dir=str(tmp_path / "trl"), max_length=64, **quiet, **options)
    trainer = SFTTrainer(model=str(folder), args=config, train_dataset=Dataset.from_list(rows))
    return trainer.data_collator([trainer.train_dataset[n] for n in range(len(trainer.train_dataset))])


def ours(folder: Path, rows: list[dict[str, Any]], tmp_path: Path, **options: Any) -> Examples:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"val_fraction": 0.0, "test_fraction": 0.0, "packing": "padded", "context": 64}
    return examples(str(file), tokenizer=str(folder), **how | options).for_model(load_pretrained(str(folder)))


def compare(folder: Path, batch: Any, data: Examples) -> None:
    rows = data.rows("train")
    mine = rows.rows(torch.arange(len(rows)).numpy())
    width = mine["input_ids"].shape[1]
    assert batch["input_ids"].shape == mine["input_ids"].shape
    assert torch.equal(torch.where(batch["attention_mask"] == 1, batch["input_ids"], 0), mine["input_ids"])
    assert torch.equal(batch["labels"][:, 1:], mine["labels"][:, : width - 1])
    model = load_pretrained(str(folder)).eval()
    count = (mine["labels"] != -100).sum()
    with torch.no_grad():
        expected = float(model(**batch).loss)
        assert float(next_token_loss(model, mine) / count) == pytest.approx(expected, abs=1e-5)
        assert float(next_token_loss(model, packed_rows(data, model)) / count) == pytest.approx(expected, abs=1e-5)


def packed_rows(data: Examples, model: Any) -> Any:
    """The same examples, several in a row that do not see each other."""

    rows = replace(data, packing="packed", context=200, _rows={}).rows("train")
    assert len(rows) < len(data.encoded["train"])
    return rows.rows(torch.arange(len(rows)).numpy())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_labels_and_loss_are_trl_s(family: str, case: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", family)
    rows, their_options, our_options = CASES[case]
    compare(folder, theirs(folder, rows, tmp_path, **their_options), ours(folder, rows, tmp_path, **our_options))


def test_what_a_template_marks_counts_as_in_trl(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", template=MARKED)
    batch = theirs(folder, [TALK] * 2, tmp_path, assistant_only_loss=True)
    compare(folder, batch, ours(folder, [TALK] * 2, tmp_path))


@pytest.mark.parametrize("template", [CHATML, TURNS, THINKING])
def test_unmarked_answers_are_those_of_prompt_and_completion(template: str, tmp_path: Path) -> None:
    """A conversation of one answer as ``messages`` counts what TRL counts where it is prompt and completion."""
    folder = saved(tmp_path / "model", "llama", template=template)
    chats = [{"messages": [ASKED, ANSWERED]}] * 2
    compare(folder, theirs(folder, [TURN] * 2, tmp_path), ours(folder, chats, tmp_path))
