"""Weight decay on the factors: it pulls their product to zero, and LTE merges the decay into the weights."""

import torch
from torch import nn

import lowrank

model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
lowrank.apply_(model, lowrank.methods.lora(target_modules="0", rank=4, rest="train"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
for _ in range(3):
    loss = nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(10, (16,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
