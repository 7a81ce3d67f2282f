"""``Projected`` against the papers' formulas in float64; law 5: within a window GaLore is LoRA with a frozen basis."""

import pytest
import torch
from tests.reference import galore

from lowrank.optim import SGD, SVD, AdamW, ErrorFeedback, GaLore, Gaussian, Projected, Rescale, Residual
from lowrank.optim.state import leaves

SLOTS = {
    "galore": {"lift": GaLore()},
    "apollo": {"lift": Rescale()},
    "fira": {"lift": Residual()},
    "error feedback": {"error_feedback": ErrorFeedback()},
    "dion's share": {"error_feedback": ErrorFeedback(share=0.1)},
}


def gradients(shape, count):
    noise = torch.Generator().manual_seed(1)
    mean = torch.randn(shape, generator=noise, dtype=torch.float64)
    return [mean + 0.5 * torch.randn(shape, generator=noise, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("method", SLOTS)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)], ids=str)
@pytest.mark.parametrize("in_place", [False, True], ids=["update", "apply_"])
def test_papers_formulas(method, shape, in_place):
    gs = gradients(shape, 12)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slots = SLOTS[method]
    share = slots["error_feedback"].share if "error_feedback" in slots else 0.0
    paper = "galore" if share else method
    expected = galore.train(weight, gs, method=paper, rank=3, every=5, scale=0.7, lr=0.02, decay=0.1, share=share)
    basis = SVD(align=False)
    rule = Projected(inner=AdamW(), rank=3, basis=basis, refresh_every=5, scale=0.7, stagger=False, **slots)
    state, p = rule.init(weight), weight.clone()
    for g in gs:
        if in_place:
            rule.apply_([p], [g], [state], lr=0.02, decay=0.1)
        else:
            direction, gain = rule.update(g, state)
            p = p * (1 - 0.02 * 0.1) - 0.02 * gain * direction
    torch.testing.assert_close(p, expected, rtol=1e-10, atol=1e-12)


def test_within_one_window_galore_is_lora_with_a_frozen_basis():
    weight, target = torch.randn(2, 8, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = Projected(inner=SGD(), rank=3, basis=SVD(), refresh_every=100, scale=1.0)
    state, p = rule.init(weight), weight.clone()
    for _ in range(20):
        rule.apply_([p], [p - target], [state], lr=0.1, decay=0.0)
    basis = state["basis"]["left"]
    expected = galore.lora_with_frozen_basis(weight, target, basis, steps=20, lr=0.1)
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)
    assert (p - weight).norm() > 0.1 * (target - weight).norm()


def test_error_feedback_costs_its_bytes_and_none_costs_nothing():
    like = torch.empty(6, 9, device="meta")
    held = {f: dict(leaves(Projected(rank=3, error_feedback=f).init(like))) for f in (None, ErrorFeedback())}
    assert held[ErrorFeedback()].keys() - held[None].keys() == {"error"}
    assert held[ErrorFeedback()]["error"].shape == (6, 9)
    assert "error_feedback" not in repr(Projected(rank=3))  # so that states saved before there was any are found
    for options in ({"lift": Residual()}, {"basis": Gaussian()}):
        with pytest.raises(ValueError, match="error_feedback= keeps what an orthonormal basis leaves out"):
            Projected(error_feedback=ErrorFeedback(), **options)
    with pytest.raises(ValueError, match="share=0 must lie in"):
        ErrorFeedback(share=0)
