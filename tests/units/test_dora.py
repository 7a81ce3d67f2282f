"""DoRA: the magnitude and the direction apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank
from lowrank.adapters import Dense, DoRA, LoRA, Site


def dense(adapter: torch.nn.Module, W: torch.Tensor) -> torch.Tensor:
    """m · V/‖V‖ with ‖V‖ a constant of the backward pass, as in the paper's section 4.3."""
    V = W + adapter.inner.config.scale * (adapter.inner.B @ adapter.inner.A).mean(dim=0)
    return adapter.magnitude[:, None] * V / V.norm(dim=1, keepdim=True).detach()


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("use", ["linear", "rows"])
def test_is_the_papers_formula(heads: int, use: str) -> None:
    torch.manual_seed(0)
    W = torch.randn(7, 5, dtype=torch.float64)
    adapter = DoRA(LoRA(rank=2, alpha=3, heads=heads))(Site("x", W))
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.5 * torch.randn_like(p)
    if use == "linear":
        x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
        y, expected, inputs = adapter(x, W), F.linear(x, dense(adapter, W)), [x, *adapter.parameters()]
    else:
        ids = torch.randint(0, 7, (6, 4))
        y, expected, inputs = adapter.rows(ids, W), F.embedding(ids, dense(adapter, W)), list(adapter.parameters())
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(adapter.merged(W), dense(adapter, W))
    g = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        torch.testing.assert_close(a, b)


def test_magnitude_is_float32_or_wider() -> None:
    for inner in (LoRA(rank=2), Dense(split=False)):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            adapter = DoRA(inner)(Site("x", torch.randn(7, 5).to(dtype)))
            assert adapter.magnitude.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_a_row_of_zeros_stays_and_can_leave() -> None:
    W = torch.randn(4, 3)
    W[1] = 0
    adapter = DoRA(LoRA(rank=2))(Site("x", W))
    x = torch.randn(5, 3)
    assert torch.equal(adapter(x, W), F.linear(x, W))
    adapter(x, W).sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


def test_a_negative_magnitude_survives_a_merge() -> None:
    W = torch.randn(4, 3)
    adapter = DoRA(LoRA(rank=2))(Site("x", W))
    with torch.no_grad():
        adapter.magnitude[2] *= -1.5
        merged = adapter.merged(W)
    torch.testing.assert_close(merged[2], -1.5 * W[2])
    adapter.settle_()
    torch.testing.assert_close(adapter.merged(merged), merged)


def test_split_heads_are_refused() -> None:
    for inner in (LoRA(rank=2, heads=2, split=True), Dense(heads=2)):
        with pytest.raises(ValueError, match=r"one magnitude for all heads.*use split=False"):
            DoRA(inner)


def test_makes_no_matrix_of_the_weights_size_for_backward() -> None:
    layer = nn.Sequential(nn.Linear(64, 96, bias=False))
    lowrank.apply_(layer, lowrank.methods.dora("0", rank=2))
    sizes: list[int] = []
    own = {layer[0].weight.untyped_storage().data_ptr()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(3, 64)).sum().backward()
    assert max(sizes) < 64 * 96 // 4
