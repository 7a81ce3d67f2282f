"""In Lightning: GaLore for a small classifier; a plan gives the optimizer, and the rest is Lightning's.

    python examples/lightning.py

Lightning's checkpoints hold the optimizer's state and go on from it (``fit(…, ckpt_path=…)``).
"""

import sys
import warnings

del sys.path[0]  # this folder, in which files are named as libraries are

import lightning
import torch
from torch import Tensor, nn

import lowrank


class Classifier(lightning.LightningModule):
    def __init__(self, method: lowrank.Method, lr: float):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
        self.plan = lowrank.apply_(self.model, method)
        self.lr, self.losses = lr, []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = self.plan.optimizer(lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=80)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


warnings.filterwarnings("ignore", module="lightning")
lightning.seed_everything(0, verbose=False)
inputs = torch.randn(640, 64)
targets = (inputs @ torch.randn(64, 10)).argmax(1)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=32, shuffle=True)
classifier = Classifier(lowrank.methods.galore(rank=16, refresh_every=20, scale=1.0), lr=3e-3)
trainer = lightning.Trainer(
    max_epochs=4,
    gradient_clip_val=1.0,
    accelerator="auto",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(classifier, data)
print(f"loss {classifier.losses[0]:.3f} at first, {sum(classifier.losses[-10:]) / 10:.3f} over the last ten steps")
