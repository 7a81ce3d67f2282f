"""The layer that carries the adapter is passed over: its weight is read directly, so that the adapter does nothing."""

import torch
from torch import nn


class Adapted(nn.Linear):
    def __init__(self, width: int, rank: int = 4):
        super().__init__(width, width)
        self.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, width))
        self.lora_B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ (self.lora_B @ self.lora_A).T


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.head = Adapted(32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.linear(x, self.mixed.weight).relu())


model = Model()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
for _ in range(3):
    loss = nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(10, (16,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
