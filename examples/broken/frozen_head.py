"""Everything but the adapters is frozen, the new output layer too: the model answers through random numbers."""

import timm
import torch
from torch import nn

import lowrank

model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3, num_classes=10)
lowrank.mark_loaded_(model, [n for n, _ in model.named_parameters() if "head" not in n])  # stands for pre-training
lowrank.apply_(model, lowrank.methods.lora(rank=4, rest="freeze"))
for name, p in model.named_parameters():
    if "adapter" not in name:
        p.requires_grad = False
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
for _ in range(3):
    loss = nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.randint(10, (2,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
