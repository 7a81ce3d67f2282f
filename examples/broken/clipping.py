"""A generator of parameters is used up by the optimizer, so that clip_grad_norm_ gets nothing."""

import torch
from torch import nn

model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
trained = (p for p in model.parameters() if p.requires_grad)
optimizer = torch.optim.AdamW(trained, lr=1e-3)
for _ in range(3):
    loss = nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(10, (16,)))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
