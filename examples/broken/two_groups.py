"""The head is in the optimizer of the body and in its own: it is stepped twice."""

import torch
from torch import nn

model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
body = torch.optim.AdamW(model.parameters(), lr=1e-3)
head = torch.optim.AdamW(model[2].parameters(), lr=1e-2)
for _ in range(3):
    loss = nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(10, (16,)))
    loss.backward()
    body.step()
    head.step()
    model.zero_grad()
