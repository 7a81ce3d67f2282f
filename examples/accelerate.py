"""In accelerate: LoRA-the-Explorer in a loop of one's own, with accumulation, clipping and a saved state.

    python examples/accelerate.py

``save_state`` and ``load_state`` keep model and optimizer; merges go on at their time.
"""

import sys
import tempfile

del sys.path[0]  # this folder, in which files are named as libraries are

import torch
from accelerate import Accelerator
from torch import nn

import lowrank

accelerator = Accelerator(gradient_accumulation_steps=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
method = lowrank.methods.lte(target_modules=["0", "2"], rank=8, heads=4, merge_every=10, rest="train")
optimizer = lowrank.apply_(model, method).optimizer(lr=3e-3)
inputs = torch.randn(640, 64)
targets = (inputs @ torch.randn(64, 10)).argmax(1)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=32, shuffle=True)
model, optimizer, data = accelerator.prepare(model, optimizer, data)

losses = []
for _ in range(6):
    for x, y in data:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())

with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    accelerator.load_state(folder)
plain = lowrank.merge_and_unload(accelerator.unwrap_model(model))
print(f"loss {losses[0]:.3f} at first, {sum(losses[-10:]) / 10:.3f} at the end; merged: {plain[0]}")
