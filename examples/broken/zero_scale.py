"""LoRA whose scale is alpha // rank: 4 // 8 is 0, so that what trains is the head alone, a linear probe."""

import torch
from torch import nn


class LoRALinear(nn.Module):
    def __init__(self, base: nn.Linear, rank: int, alpha: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.linear_a = nn.Linear(base.in_features, rank, bias=False)
        self.linear_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.linear_b.weight)
        self.scale = alpha // rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.linear_b(self.linear_a(x)) * self.scale


model = nn.Sequential(LoRALinear(nn.Linear(32, 32), rank=8, alpha=4), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
for _ in range(3):
    loss = nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(10, (16,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
