"""DiLoCo against its paper's algorithm in float64: local weights, an inner optimizer each, an outer Nesterov step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.reference.baselines import newton_schulz
from tests.reference.lte import Adam
from torch import Tensor, nn

import lowrank
from lowrank.adapters.adapter import shard_sizes

BATCH, WIDE, HEADS, EVERY = 7, 4, 3, 3
LR, OUTER_LR, MOMENTUM = 1e-2, 0.7, 0.9


class Muon:
    """Jordan et al. 2024, on each of three fused matrices by itself."""

    kept: Tensor | float = 0.0

    def step(self, p: Tensor, g: Tensor) -> Tensor:
        self.kept = 0.95 * self.kept + 0.05 * g
        ahead = 0.95 * self.kept + 0.05 * g
        steps = [torch.from_numpy(newton_schulz(part.numpy())) for part in ahead.chunk(3)]
        return p - LR * 0.2 * WIDE**0.5 * torch.cat(steps)


def reference(
    W: Tensor, shards: list[list[tuple[Tensor, Tensor]]], rule: Callable[[], Adam | Muon]
) -> list[tuple[Tensor, float]]:
    """(W, loss) after every step, by arXiv 2311.08105, algorithm 1, whose workers are the columns of ``shards``."""
    rules = [rule() for _ in range(HEADS)]
    local, outer, found = [W.clone() for _ in range(HEADS)], torch.zeros_like(W), []
    for count, step in enumerate(shards, start=1):
        numbers, loss = sum(y.numel() for _, y in step), 0.0
        for i, (x, y) in enumerate(step):
            error = x @ local[i].T - y
            loss += float((error**2).sum()) / numbers
            local[i] = rules[i].step(local[i], 2 * error.T @ x / numbers)
        if count % EVERY == 0:
            gradient = W - sum(local) / HEADS
            outer = MOMENTUM * outer + gradient
            W = W - OUTER_LR * (gradient + MOMENTUM * outer)
            local = [W.clone() for _ in range(HEADS)]
        found.append((W, loss))
    return found


class Block(nn.Module):
    """A fused projection, as transformers' and timm's have it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDE, 3 * WIDE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)


@pytest.mark.parametrize(("inner", "rule"), [("adamw", lambda: Adam(LR)), ("muon", Muon)])
def test_trajectory(inner: str, rule: Callable[[], Adam | Muon]) -> None:
    torch.manual_seed(3)
    model = Block().double()
    data = [(torch.randn(BATCH, WIDE).double(), torch.randn(BATCH, 3 * WIDE).double()) for _ in range(10)]
    sizes = shard_sizes(BATCH, HEADS)
    shards = [list(zip(x.split(sizes), y.split(sizes), strict=True)) for x, y in data]
    expected = reference(model.qkv.weight.detach().clone(), shards, rule)
    method = lowrank.methods.diloco("qkv", inner=inner, heads=HEADS, merge_every=EVERY)
    opt = lowrank.apply_(model, method).optimizer(lr=LR, weight_decay=0.1)
    for (x, y), (W, theirs) in zip(data, expected, strict=True):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        assert loss.item() == pytest.approx(theirs, rel=1e-6)
        torch.testing.assert_close(model.qkv.weight, W, rtol=1e-6, atol=1e-7)


def test_an_unknown_inner_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inner='moun' .*muon"):
        lowrank.methods.diloco(inner="moun")  # type: ignore[arg-type]
