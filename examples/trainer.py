"""In transformers' Trainer: a small GPT-2 learns this repository's README by its bytes, with multi-head LoRA.

    python examples/trainer.py

The checkpoint that the Trainer leaves opens with ``from_pretrained`` as the trained model, adapters merged.
"""

import sys
import tempfile
from pathlib import Path

del sys.path[0]  # this folder, in which files are named as libraries are

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import lowrank
from lowrank.interop import MergeOnSave, trainer

text = torch.tensor(list((Path(__file__).parents[1] / "README.md").read_bytes()))
rows = [{"input_ids": row, "labels": row} for row in text[: len(text) // 64 * 64].view(-1, 64)]

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4))
with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder,
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        save_steps=60,
        logging_steps=20,
        disable_tqdm=True,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    method = lowrank.methods.multihead_lora(target_modules="all-linear", rank=4, heads=4, rest="train")
    run = Trainer(
        model,
        args,
        train_dataset=rows,
        optimizers=trainer(model, args, method),
        callbacks=[MergeOnSave()],
    )
    run.train()
    opened = GPT2LMHeadModel.from_pretrained(f"{folder}/checkpoint-60")
    batch = torch.stack([row["input_ids"] for row in rows[:16]])
    with torch.no_grad():
        here, there = (m.eval().cpu()(batch, labels=batch).loss for m in (model, opened))
    print(f"loss of the model {here:.4f}, of its checkpoint, opened by transformers alone {there:.4f}")
