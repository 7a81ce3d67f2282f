"""Per-layer steps by hooks run in every backward pass: with accumulation the weights move at each micro-batch."""

import torch
from torch import nn

accumulation_steps = 4
model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
optimizers = {p: torch.optim.AdamW([p], lr=1e-3) for p in model.parameters()}


def step(p: torch.Tensor) -> None:
    optimizers[p].step()
    optimizers[p].zero_grad()


for p in model.parameters():
    p.register_post_accumulate_grad_hook(step)
for _ in range(3 * accumulation_steps):
    loss = nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(10, (16,)))
    (loss / accumulation_steps).backward()
