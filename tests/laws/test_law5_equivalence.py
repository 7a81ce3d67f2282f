"""Law 5 for adapters: LTE with ``merge_every=1``, its heads all fed the same batch, is multi-head LoRA.

The loss is then the mean over the replicated batch.
"""

import pytest
import torch
import torch.nn.functional as F
from tests.models import features, gpt2, mlp, text_loss, tokens

import lowrank
from lowrank.adapters import LoRA, Merge
from lowrank.methods import Adapt, Method, Use
from lowrank.optim.rules import SGD, AdamW

HEADS = 3


def method(split: bool, rule: object, targets: object) -> Method:
    make = LoRA(rank=2, alpha=6, heads=HEADS, split=split, init="orthogonal")
    merge = Merge(1, keep=True) if split else None
    return Method(adapt=(Adapt(targets, make),), rules=(Use("*", rule),), merge=merge, rest="train")


@pytest.mark.parametrize("rule", [SGD(), SGD(momentum=0.9), AdamW()], ids=repr)
def test_mlp(rule: object) -> None:
    lr = 1e-2 if isinstance(rule, AdamW) else 0.3
    models = [mlp(torch.float64), mlp(torch.float64)]
    plans = [
        lowrank.apply_(model, method(split, rule, "all-linear"))
        for model, split in zip(models, (True, False), strict=True)
    ]
    opts = [plan.optimizer(lr=lr, weight_decay=0.1) for plan in plans]
    for step in range(8):
        x, y = features(5, dtype=torch.float64, seed=step), torch.arange(5) % 4
        losses = []
        for model, opt in zip(models, opts, strict=True):
            loss = F.cross_entropy(model.train()(x.repeat(HEADS, 1)), y.repeat(HEADS))
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        outputs = [model.eval()(x) for model in models]
        torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-9)
    lte, multihead = (model.fc1.adapters["all"] for model in models)
    assert int(lte.merges) == 8
    assert int(multihead.merges) == 0
    torch.testing.assert_close(lte.B, multihead.B, rtol=1e-6, atol=1e-9)


def test_gpt2_with_its_tied_head() -> None:
    models = [gpt2().double(), gpt2().double()]
    for model, split in zip(models, (True, False), strict=True):
        plan = lowrank.apply_(model, method(split, AdamW(), ("attention", "mlp", "lm_head")))
        opt = plan.optimizer(lr=1e-2)
        for step in range(4):
            text_loss(model, tokens(2, seed=step).repeat(HEADS, 1)).backward()
            opt.step()
            opt.zero_grad()
    ids = tokens(3, seed=9)
    torch.testing.assert_close(*(model.eval()(ids).logits for model in models), rtol=1e-4, atol=1e-5)


def test_different_batches_part_the_ways() -> None:
    """The law is about the replicated batch alone: on different shards the local models differ."""
    models = [mlp(torch.float64), mlp(torch.float64)]
    for model, split in zip(models, (True, False), strict=True):
        opt = lowrank.apply_(model, method(split, SGD(), "all-linear")).optimizer(lr=0.3)
        for step in range(3):
            x = features(6, dtype=torch.float64, seed=step)
            F.cross_entropy(model(x), torch.arange(6) % 4).backward()
            opt.step()
            opt.zero_grad()
    first, second = (model.eval()(features(6, dtype=torch.float64)) for model in models)
    assert not torch.allclose(first, second, rtol=1e-4)
