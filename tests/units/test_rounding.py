"""Stochastic rounding into bfloat16: exact where it can be, unbiased where it cannot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.linalg.rounding import round_into_


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rounded(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return round_into_(torch.empty(x.shape, dtype=torch.bfloat16), x, noise(seed))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.integers(0, 5))
def test_one_of_the_two_neighbours(values: list[float], seed: int) -> None:
    x = torch.tensor(values)
    y = rounded(x, seed).float()
    finite = x.isfinite()
    down = ((x.view(torch.int32) & -65536).view(torch.float32))[finite]
    up = (((x.view(torch.int32) & -65536) + 65536).view(torch.float32))[finite]
    assert ((y[finite] == down) | (y[finite] == up)).all()
    assert torch.equal(y[~finite], x[~finite]) or y[~finite].isnan().any()
    assert torch.equal(y.isnan(), x.isnan())


def test_representable_numbers_stay() -> None:
    x = torch.randn(1000).bfloat16()
    assert torch.equal(rounded(x.float()), x)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, 3.3895e38])
    kept = rounded(special.bfloat16().float())
    assert torch.equal(kept, special.bfloat16())
    assert torch.equal(kept.signbit(), special.signbit())
    assert rounded(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("value", [1.001, -1.001, 3.1e-5, -7.7e12, 0.4999])
def test_unbiased(value: float) -> None:
    y = rounded(torch.full((200_000,), value)).float()
    gap = float(y.max() - y.min())
    assert y.unique().numel() == 2
    assert float(y.double().mean()) == pytest.approx(value, abs=0.01 * gap)


def test_small_updates_survive() -> None:
    """A thousand steps of a tenth of a gap: rounded to the nearest, nothing would ever move."""
    weight = torch.ones(2000, dtype=torch.bfloat16)
    nearest = weight.clone()
    for step in range(1000):
        round_into_(weight, weight.float() + 1e-4, noise(step))
        nearest.copy_(nearest.float() + 1e-4)
    assert float(weight.float().mean()) == pytest.approx(1.1, abs=2e-3)
    assert torch.equal(nearest, torch.ones_like(nearest))


def test_depends_on_the_generator_alone() -> None:
    x = torch.randn(100)
    assert torch.equal(rounded(x, 1), rounded(x, 1))
    assert not torch.equal(rounded(x, 1), rounded(x, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    x = torch.randn(50, dtype=torch.float64)
    assert torch.equal(round_into_(torch.empty(50, dtype=dtype), x), x.to(dtype))


def test_into_a_transposed_view_and_a_parameter() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))
    source = torch.randn(5, 3)
    round_into_(weight.mT, source, noise())
    assert torch.equal(weight.mT.detach(), rounded(source))
    assert weight.grad_fn is None
