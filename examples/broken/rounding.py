"""Weights in bfloat16 at a small rate: a step of 1e-5 is below half a unit in the last place of almost all of them."""

import torch
from torch import nn

model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).bfloat16()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
for _ in range(3):
    loss = nn.functional.cross_entropy(model(torch.randn(16, 32).bfloat16()), torch.randint(10, (16,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
