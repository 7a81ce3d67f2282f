"""GaLore on the factors of LoRA: a rank of 128 for a matrix of 8 rows projects it onto all of it."""

import torch
from torch import nn

import lowrank

model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
lowrank.apply_(model, lowrank.methods.lora(target_modules="0", rank=8, rest="train"))
factors = [p for name, p in model.named_parameters() if name.endswith(("A", "B"))]
rest = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith(("A", "B"))]
optimizer = torch.optim.AdamW([{"params": factors, "rank": 128}, {"params": rest}], lr=1e-3, weight_decay=0.0)
for _ in range(3):
    loss = nn.functional.cross_entropy(model(torch.randn(16, 256)), torch.randint(10, (16,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
