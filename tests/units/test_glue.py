"""GLUE: its own layout is read row by row, its metrics are scikit-learn's and scipy's, and a run goes end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from lowrank.cli import main
from lowrank.data.text.glue import Glue, glue
from lowrank.evaluate.sequence_task import SequenceTask, class_metrics, score_metrics

COLA = 'gj04\t1\t\tThe sailors rode the breeze.\ngj04\t0\t*\tThe sailors rode breeze "the.\n' * 20
RTE = "index\tsentence1\tsentence2\tlabel\n"
STSB = "index\tsentence1\tsentence2\tscore\n" + "0\tA plane.\tAn air plane.\t5.000\n1\tA man.\tA flute.\t0.5\n" * 10


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RoBERTa with a tokenizer of bytes, saved as transformers saves them."""
    folder = tmp_path_factory.mktemp("roberta")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="<s>", sep_token="</s>", **names)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    RobertaForMaskedLM(RobertaConfig(vocab_size=len(letters), max_position_embeddings=66, **sizes)).save_pretrained(
        folder
    )
    return folder


def read(folder: Path, roberta: Path, **options: Any) -> Glue:
    return glue(str(folder), tokenizer=str(roberta), **options)


def spelt(found: Glue, ids: torch.Tensor) -> str:
    return "".join(found.tokenizer.backend.convert_ids_to_tokens(ids.tolist())).replace("Ġ", " ")


def test_its_layout(write: Callable[[str, str], Path], roberta: Path) -> None:
    folder = write("CoLA/train.tsv", COLA).parent
    write("CoLA/dev.tsv", COLA[: len(COLA) // 2])
    found = read(folder, roberta, val_fraction=0.25)
    assert {split: len(rows) for split, rows in found.tables.items()} == {"train": 30, "val": 10, "test": 20}
    assert set(found.tables["train"]) == {
        (("The sailors rode the breeze.",), 1),
        (('The sailors rode breeze "the.',), 0),
    }
    batch = found.rows("test").rows(np.array([0, 1]))
    assert spelt(found, batch["input_ids"][0]).startswith("<s>The sailors rode the breeze.</s>")
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].sum(1).tolist() == [len("The sailors rode the breeze.") + 2, 31]

    folder = write("STS-B/train.tsv", STSB).parent
    write("STS-B/dev.tsv", STSB)
    found = read(folder, roberta)
    assert found.outputs == 1
    batch = found.rows("test").rows(np.array([1, 0]))
    assert batch["labels"].tolist() == [0.5, 5.0]
    assert spelt(found, batch["input_ids"][0]).startswith("<s>A man.</s></s>A flute.</s>")


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        (
            "RTE",
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tperhaps\n",
            {},
            "line 2: the label 'perhaps' is none of ent",
        ),
        ("RTE", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\n", {}, "line 2: 3 cells, and the first line has 4"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\tfive\n", {}, "line 2: the score 'five' is no number"),
        ("mine", "sentence1\tsentence2\tlabel\na\tb\t0\n", {}, "rte or wnli by its columns: say which"),
        ("mine", "a\tb\n", {}, "none of GLUE's tasks"),
        ("RTE", "a\tb\n", {}, "has no column label, sentence1, sentence2"),
        ("CoLA", COLA, {"context": 1}, "at least 2 tokens"),
        ("CoLA", COLA, {"val_fraction": 1.0}, "val_fraction"),
        ("CoLA", COLA, {"name": "snli"}, "is none of cola"),
    ],
)
def test_bad_input(
    name: str, content: str, options: dict[str, Any], words: str, write: Callable[[str, str], Path], roberta: Path
) -> None:
    folder = write(f"{name}/train.tsv", content).parent
    with pytest.raises(ValueError, match=words):
        read(folder, roberta, **options)


def test_no_folder(tmp_path: Path, roberta: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read(tmp_path / "none", roberta)
    with pytest.raises(FileNotFoundError, match=r"train\.tsv is not there"):
        read(tmp_path, roberta)
    with pytest.raises(ValueError, match="which task of GLUE"):
        glue("", tokenizer=str(roberta))


def test_its_metrics_are_those_of_the_libraries() -> None:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    noise = np.random.default_rng(0)
    outputs, labels = noise.normal(size=(50, 2)), noise.integers(2, size=50)
    found, answers = class_metrics(outputs, labels), outputs.argmax(1)
    assert found["score"] == matthews_corrcoef(labels, answers)
    assert (found["accuracy"], found["f1"]) == (accuracy_score(labels, answers), f1_score(labels, answers))
    x = noise.normal(size=50).round(1)
    y = (x + noise.normal(size=50)).round(1).astype(np.float32)
    found = score_metrics(x, y)
    np.testing.assert_allclose(found["pearson"], pearsonr(x, y)[0], rtol=1e-12)
    np.testing.assert_allclose(found["spearman"], spearmanr(x, y)[0], rtol=1e-12)
    assert score_metrics(np.zeros(3), np.arange(3.0))["score"] == 0.0


def test_a_tally_in_parts_is_the_whole() -> None:
    class Answers(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return type("Out", (), {"logits": torch.nn.functional.one_hot(input_ids[:, 0], 3) * 2.0})

    ids, labels = torch.arange(12).reshape(12, 1) % 3, torch.tensor([0, 1, 2, 1] * 3)
    task, model = SequenceTask(), Answers()
    whole, parts, other = task.tally(), task.tally(), task.tally()
    whole.add(model, {"input_ids": ids, "labels": labels})
    parts.add(model, {"input_ids": ids[:5], "labels": labels[:5]})
    other.add(model, {"input_ids": ids[5:], "labels": labels[5:]})
    parts.absorb(other.counted())
    assert parts.result() == pytest.approx(whole.result())


def test_a_run_from_end_to_end(
    shared_data: Path, roberta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, few = tmp_path / "cola", tmp_path / "CoLA"
    few.mkdir()
    for split in ("train", "dev"):  # as many lines as take a second
        lines = (shared_data / "glue" / "CoLA" / f"{split}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        (few / f"{split}.tsv").write_text("".join(lines[:: len(lines) // 160]), encoding="utf-8")
    options = ["--data", str(few), "--model.path", str(roberta), "--epochs", "1", "--batch-size", "16", "--quiet"]
    assert main(["train", "glue-cola", *options, "--method", "galore", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert {"test_score", "test_accuracy", "test_f1"} <= summary.keys()
    assert main(["eval", str(out), "--split", "test"]) == 0
    assert f"{summary['test_accuracy']:.4f}"[:5] in capsys.readouterr().out
    assert main(["train", "glue-cola", *options, "--dry-run"]) == 0
    assert "needs" in capsys.readouterr().out
    assert main(["export", str(out), str(tmp_path / "plain")]) == 0
    assert RobertaForSequenceClassification.from_pretrained(tmp_path / "plain").config.label2id == {"0": 0, "1": 1}
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("It is.")["input_ids"][0] == 0
