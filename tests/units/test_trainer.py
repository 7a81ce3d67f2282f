"""In transformers' Trainer: what it saves opens as the trained model, and it goes on to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import lowrank
from lowrank.interop import MergeOnSave, trainer


def model() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=16, vocab_size=50, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config)


def rows(n: int = 64) -> list[dict[str, Tensor]]:
    ids = torch.randint(50, (n, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    fixed = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "seed": 3}
    return TrainingArguments(str(folder), max_steps=8, save_steps=4, use_cpu=True, disable_tqdm=True, **fixed | options)


def trained(
    folder: Path, method: lowrank.Method, *, per_layer: bool = False, resume: Any = None, **options: Any
) -> Any:
    args, base = arguments(folder, **options), model()
    optimizers = trainer(base, args, method, per_layer=per_layer)
    made = Trainer(base, args, train_dataset=rows(), optimizers=optimizers, callbacks=[MergeOnSave()])
    made.train(resume_from_checkpoint=resume)
    return made


METHODS = {
    "lora": lowrank.methods.lora(rank=2),
    "lte": lowrank.methods.lte(rank=2, heads=2, merge_every=3),
    "galore_8bit": lowrank.methods.galore_8bit(rank=2, refresh_every=3),
}


@pytest.mark.parametrize("name", METHODS)
def test_checkpoints_open_as_trained_and_go_on_to_the_last_bit(name: str, tmp_path: Path) -> None:
    first = trained(tmp_path / "first", METHODS[name], gradient_accumulation_steps=2)
    ids = rows(2)[0]["input_ids"][None]
    opened = GPT2LMHeadModel.from_pretrained(tmp_path / "first" / "checkpoint-8")
    before = model()(ids).logits
    torch.testing.assert_close(opened(ids).logits, first.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(opened(ids).logits, before, atol=1e-3)

    again = trained(
        tmp_path / "first", METHODS[name], gradient_accumulation_steps=2, resume=str(tmp_path / "first/checkpoint-4")
    )
    losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (first, again)]
    assert losses[0] == losses[1]
    for p, q in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_per_layer_and_betas(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "adam_beta2": 0.95}
    whole = trained(tmp_path / "whole", METHODS["galore_8bit"], save_strategy="no", **options)
    layered = trained(tmp_path / "layers", METHODS["galore_8bit"], per_layer=True, save_strategy="no", **options)
    rules = [group["rule"] for group in whole.optimizer.optimizer.param_groups]
    assert {getattr(rule, "inner", rule).betas for rule in rules} == {(0.9, 0.95)}
    for p, q in zip(whole.model.parameters(), layered.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_best_model_is_the_trained_one(tmp_path: Path) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True, learning_rate=0.3)
    base = model()
    optimizers = trainer(base, args, METHODS["lora"])
    made = Trainer(
        base, args, train_dataset=rows(), eval_dataset=rows(8), optimizers=optimizers, callbacks=[MergeOnSave()]
    )
    made.train()
    best, ids = made.state.best_model_checkpoint, rows(2)[0]["input_ids"][None]
    opened = GPT2LMHeadModel.from_pretrained(best)
    torch.testing.assert_close(made.model.eval()(ids).logits, opened(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "set max_grad_norm=0"),
        ({"max_grad_norm": 0.0, "fp16": True}, "bf16=True"),
    ],
)
def test_what_cannot_compose(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    for name, value in options.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=words):
        trainer(model(), args, METHODS["lora"], per_layer=True)


def test_a_checkpoint_without_training_state(tmp_path: Path) -> None:
    trained(tmp_path, METHODS["lora"])
    (tmp_path / "checkpoint-4" / "lowrank_training.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="saved without MergeOnSave"):
        trained(tmp_path, METHODS["lora"], resume=str(tmp_path / "checkpoint-4"))
