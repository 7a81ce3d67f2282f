"""The ledger of bytes, and how sizes and settings are written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.models import gpt2, mlp
from torch import nn

import lowrank
from lowrank.infra import environment
from lowrank.optim.rules import SGD, AdamW
from lowrank.plan.ledger import megabytes, state_bytes
from lowrank.plan.table import brief
from lowrank.run.overrides import TASKS
from lowrank.run.run import Call


def test_full_training_in_numbers() -> None:
    model = mlp()
    count = sum(p.numel() for p in model.parameters())
    sheet = lowrank.apply_(model, lowrank.methods.full()).ledger
    assert sheet.weights == sheet.gradients == 4 * count
    assert sheet.factors == sheet.kept == 0
    assert sheet.state == 8 * count + 4 * 7
    assert sheet.largest_gradient == 4 * 14 * 14
    assert sheet.total == 16 * count + 28
    assert sheet.total_per_layer == 12 * count + 28 + 4 * 14 * 14


def test_adapters_in_numbers() -> None:
    model = mlp()
    plan = lowrank.apply_(model, lowrank.methods.lte("fc2", rank=2, heads=3, rest="freeze"))
    numbers = 3 * 2 * (14 + 14)
    sheet = plan.ledger
    assert sheet.factors == sheet.gradients == 4 * numbers
    assert sheet.kept == 4 * numbers + 8
    assert sheet.state == 8 * numbers + 4 * 2
    assert (plan.state_bytes, plan.kept_bytes) == (sheet.state, sheet.kept)


def test_tied_and_buffers_count_once() -> None:
    model = gpt2()
    model.register_buffer("extra", torch.zeros(5, dtype=torch.float64))
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values()
    assert lowrank.apply_(model, lowrank.methods.full()).ledger.weights == sum(t.nbytes for t in tensors)


def test_tied_adapters_count_once() -> None:
    plan = lowrank.apply_(gpt2(), lowrank.methods.lora("lm_head", rank=2, rest="freeze"))
    assert plan.ledger.factors == 4 * 2 * (24 + 8)
    assert plan.parameters_trained == 2 * (24 + 8)


def test_mixed_dtypes() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4))
    sheet = lowrank.apply_(model, lowrank.methods.full()).ledger
    assert sheet.weights == sheet.gradients == 20 * 2 + 20 * 4
    assert sheet.state == 40 * 8 + 4 * 4


def test_state_is_counted_without_making_any() -> None:
    assert state_bytes(AdamW(), (10**6, 10**6), torch.float32) == 8 * 10**12 + 4


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 kB"), (1_234, "1.2 kB"), (999_999, "1000.0 kB"), (123_456_789, "123.5 MB"), (2_340_000_000, "2.34 GB")],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert megabytes(count) == text


def test_brief() -> None:
    assert brief(AdamW()) == "AdamW"
    assert brief(SGD(momentum=0.5)) == "SGD(momentum=0.5)"
    assert brief(lowrank.adapters.DoRA(lowrank.adapters.LoRA(rank=3))) == "DoRA(inner=LoRA(rank=3))"
    assert brief(3) == "3"


@pytest.mark.parametrize(("limit", "free"), [("1000", 1000 - 800 + 50), ("max", None)])
def test_what_is_free_is_also_what_a_container_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, free: int | None
) -> None:
    whole = environment.available_memory(torch.device("cpu")) or 0
    files = {"memory.max": limit, "memory.current": "800", "memory.stat": "anon 750\ninactive_file 50\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(environment, "_GROUPS", tmp_path)
    found = environment.available_memory(torch.device("cpu"))
    assert found == free if free is not None else found is not None and found > whole // 2


@pytest.mark.parametrize(
    ("task", "data", "model", "facts", "note"),
    [
        ("text", {}, {}, {"context": 1024, "vocab_size": 256}, None),
        ("text", {"context": 64, "tokenizer": "bpe:300"}, {}, {"context": 64, "vocab_size": 300}, None),
        ("text", {"context": "auto"}, {"vocab_size": 77}, {"context": None, "vocab_size": 77}, None),
        ("text", {"tokenizer": "chars"}, {}, {"vocab_size": 256}, "under the tokenizer chars is not known"),
        ("sequences", {}, {}, {"context": 512, "outputs": 2}, None),
        ("sequences", {"context": "128", "name": "mnli"}, {}, {"context": 128, "outputs": 3}, None),
        ("sequences", {"context": 900, "name": "stsb"}, {}, {"context": 900, "outputs": 1}, None),
        ("images", {"source": "pneumoniamnist"}, {}, {"classes": 2, "size": 28, "grey": True}, None),
        ("images", {"source": "in/bloodmnist_64.npz", "size": 64}, {}, {"classes": 8, "grey": False}, None),
        ("images", {"source": "digits"}, {}, {"classes": 10, "size": 28, "grey": True}, None),
        ("images", {"source": "photos", "size": 32}, {}, {"classes": 1000, "size": 32, "grey": False}, "1000 assumed"),
        ("segmentation", {"source": "mni152"}, {}, {"classes": 3, "size": 233, "grey": True}, None),
        ("segmentation", {"source": "a.csv", "size": 64}, {}, {"classes": 2, "size": 64, "grey": False}, "2 assumed"),
        ("segmentation", {"source": "a.csv", "classes": [*"abcd"]}, {}, {"classes": 4, "size": 224}, None),
    ],
)
def test_what_stands_for_data_that_a_plan_does_not_read(
    task: str, data: dict[str, Any], model: dict[str, Any], facts: dict[str, Any], note: str | None
) -> None:
    run = SimpleNamespace(data=Call(name="any", args=data), model=Call(name="any", args=model))
    found, notes = TASKS[task]().stand_in(run)
    if "classes" in facts:
        found = SimpleNamespace(classes=len(found.classes), size=found.spec.size, grey=found.reading.grey)
    assert {name: getattr(found, name) for name in facts} == facts
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]
