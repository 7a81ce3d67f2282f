"""LTE and ReLoRA follow the float64 loops written from the papers, through several merges."""

import pytest
import torch
import torch.nn.functional as F
from tests.reference.lte import Adam, Descent, Reference
from torch import nn

import lowrank
from lowrank.adapters import LoRA, Merge, Site
from lowrank.adapters.adapter import shard_sizes
from lowrank.methods import Adapt, Method, Use
from lowrank.methods.schedule import Rewarm
from lowrank.optim.rules import SGD, AdamW

RULES = {"adamw": (AdamW(), lambda: Adam(3e-3), 3e-3), "sgd": (SGD(), lambda: Descent(0.05), 0.05)}
BATCH, WIDE, OUT = 7, 6, 5


def problem() -> tuple[nn.Sequential, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(WIDE, OUT)).double()
    data = [(torch.randn(BATCH, WIDE).double(), torch.randn(BATCH, OUT).double()) for _ in range(12)]
    return model, data


def new_factors(config: LoRA, merge: Merge):
    """A(head, merges) as the adapter draws it, which is what the reference cannot know."""

    def draw(head: int, merges: int) -> torch.Tensor:
        adapter = config(Site("0", torch.zeros(OUT, WIDE, dtype=torch.float64), 7, merge.keep))
        return adapter._draw_head(head, merges).double()

    return draw


@pytest.mark.parametrize("per_layer", [False, True], ids=["ordinary", "per layer"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("heads", "split", "merge", "rewarm"),
    [
        (4, True, Merge(3, keep=True), 0),
        (4, True, Merge(1, keep=True), 0),
        (4, True, Merge(3, keep=False), 0),
        (4, True, Merge(4, keep=False, forget=0.9), 0),
        (3, True, Merge(2, keep=True, forget=0.5), 1),
        (1, False, Merge(3, keep=False, forget=0.9), 2),
    ],
    ids=["lte", "lte T=1", "lte reset", "lte reset, forget", "lte keep, forget, re-warm", "relora"],
)
def test_trajectory(heads: int, split: bool, merge: Merge, rewarm: int, rule: str, per_layer: bool) -> None:
    ours, theirs, lr = RULES[rule]
    model, data = problem()
    config = LoRA(rank=2, alpha=5, heads=heads, split=split, init="orthogonal")
    schedule = Rewarm(every=merge.merge_every, warmup=rewarm)
    method = Method(adapt=(Adapt("0", config),), rules=(Use("*", ours),), merge=merge, lr=schedule, rest="train")
    reference = Reference(
        W=model[0].weight.detach().clone(),
        b=model[0].bias.detach().clone(),
        heads=heads,
        s=5 / 2,
        new_A=new_factors(config, merge),
        rule=theirs,
        merge_every=merge.merge_every,
        keep=merge.keep,
        forget=merge.forget,
        lr_factor=schedule,
    )
    plan = lowrank.apply_(model, method, seed=7)
    opt = plan.optimizer(lr=lr, per_layer=per_layer)
    for x, y in data:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        sizes = shard_sizes(BATCH, heads)
        assert loss.item() == pytest.approx(
            reference.step(list(zip(x.split(sizes), y.split(sizes), strict=True))), rel=1e-6
        )
        torch.testing.assert_close(model[0].weight, reference.W, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(model[0].bias, reference.b, rtol=1e-6, atol=1e-7)
        model.eval()
        torch.testing.assert_close(model(x), x @ reference.merged().T + reference.b, rtol=1e-6, atol=1e-7)
        model.train()
    assert reference.merges == len(data) // merge.merge_every
