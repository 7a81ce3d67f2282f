"""In a loop as nanoGPT's: its model's sizes, its schedule, its clipping; two lines are other than there.

    python examples/nanogpt.py

A ``ckpt.pt`` of nanoGPT's is read by ``lowrank train gpt2-finetune --model.path ckpt.pt``, and written by
``lowrank export RUN OUT --format nanogpt``.
"""

import sys

del sys.path[0]  # this folder, in which files are named as libraries are

import math
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import lowrank

learning_rate, min_lr, warmup_iters, max_iters, grad_clip = 6e-3, 6e-4, 10, 80, 1.0
batch_size, block_size, gradient_accumulation_steps = 8, 64, 2
device = "cuda" if torch.cuda.is_available() else "cpu"
data = torch.tensor(list((Path(__file__).parents[1] / "README.md").read_bytes()))
torch.manual_seed(1337)


def get_batch() -> torch.Tensor:
    starts = torch.randint(len(data) - block_size, (batch_size,))
    return torch.stack([data[i : i + block_size] for i in starts]).to(device)


def get_lr(it: int) -> float:
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    ratio = (it - warmup_iters) / (max_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=block_size, n_embd=64, n_layer=2, n_head=4)).to(device)
plan = lowrank.apply_(model, lowrank.methods.galore(rank=16, refresh_every=20))  # in place of configure_optimizers
optimizer = plan.optimizer(lr=learning_rate, weight_decay=0.1)
for iter_num in range(max_iters):
    for group in optimizer.param_groups:
        group["lr"] = get_lr(iter_num)
    for _ in range(gradient_accumulation_steps):
        ids = get_batch()
        loss = model(ids, labels=ids).loss / gradient_accumulation_steps
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if iter_num % 20 == 0 or iter_num == max_iters - 1:
        print(f"iter {iter_num}: loss {loss.item() * gradient_accumulation_steps:.4f}")
