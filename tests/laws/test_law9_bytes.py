"""Law 9: state bytes equal the ledger's, which allocates none (tests/contract: batched equals looped)."""

import pytest
import torch
from tests.models import gpt2, mlp, small_method, text_loss, tokens, train_text

import lowrank
from lowrank.optim.rules import SGD, AdamW
from lowrank.plan.ledger import state_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", lowrank.METHODS)
def test_plan_tells_the_bytes(name: str, dtype: torch.dtype) -> None:
    model = gpt2().to(dtype)
    plan = lowrank.apply_(model, small_method(name))
    opt = plan.optimizer(lr=1e-3)
    assert opt.state_bytes() == plan.state_bytes == plan.ledger.state
    train_text(model, opt, 4)
    assert opt.state_bytes() == plan.state_bytes
    sheet = plan.ledger
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    assert sheet.weights + sheet.factors + sheet.kept == sum(t.numel() * t.element_size() for t in tensors)
    text_loss(model, tokens()).backward()
    assert sheet.gradients == sum(
        p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None
    )
    assert sheet.total == sheet.weights + sheet.factors + sheet.kept + sheet.gradients + sheet.state
    assert sheet.total_per_layer <= sheet.total


def test_documented_formula() -> None:
    """AdamW: 8 bytes a number and 4 a parameter; SGD none, with momentum 4 a number."""
    for numbers, shape in ((12, (3, 4)), (24, (2, 3, 4)), (5, (5,))):
        assert state_bytes(AdamW(), shape, torch.float32) == 8 * numbers + 4
        assert state_bytes(AdamW(), shape, torch.bfloat16) == 8 * numbers + 4
        assert state_bytes(AdamW(), shape, torch.float64) == 16 * numbers + 4
        assert state_bytes(SGD(), shape, torch.float32) == 0
        assert state_bytes(SGD(momentum=0.9), shape, torch.bfloat16) == 4 * numbers


def test_kept_bytes_are_the_copies() -> None:
    """What a reset-less merge keeps: one copy of the factors, and a count for each adapter. No dense copy of W."""
    for keep in (True, False):
        model = mlp()
        plan = lowrank.apply_(model, lowrank.methods.lte("all-linear", rank=2, heads=3, merge_every=4, keep=keep))
        factors = sum(p.numel() * 4 for a in plan.adapters.values() for p in a.parameters())
        assert plan.ledger.factors == factors
        assert plan.kept_bytes == 8 * len(plan.adapters) + (factors if keep else 0)
