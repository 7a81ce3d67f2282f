"""An adapter whose output is detached: it is in the optimizer, and never learns."""

import torch
from torch import nn


class Adapted(nn.Module):
    def __init__(self, width: int, rank: int = 4):
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.lora_B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = (self.lora_B @ self.lora_A).detach()
        return self.base(x) + x @ change.T


model = nn.Sequential(Adapted(32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
for _ in range(3):
    loss = nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(10, (16,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
