"""The low-rank product: values, gradients, and the columns that it leaves alone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank.adapters import low_rank_product
from lowrank.adapters.low_rank_product import _add_plainly, add_low_rank_

SIZES = {"as it comes": low_rank_product.SMALL, "by hand": 0}  # below it ordinary operations are used


@pytest.fixture(params=SIZES)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank_product, "SMALL", SIZES[request.param])


def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, sizes: list[int], start: int) -> Tensor:
    """Example by example."""
    own = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = []
    for i, g in enumerate(own.tolist()):
        change = scale * (x[i] @ A[g].T @ B[g].T)
        before, after = start, y.shape[-1] - start - B.shape[1]
        rows.append(y[i] + torch.nn.functional.pad(change, (before, after)))
    return torch.stack(rows) if rows else y.clone()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_equals_the_plain_formula(data: st.DataObject) -> None:
    draw = data.draw
    wide, out, rank = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    more, start, after = draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    start, after = draw(st.sampled_from([(start, after), (0, 0)]))
    torch.manual_seed(0)
    kind = {"dtype": torch.float64}
    base = torch.randn(sum(sizes), *more, start + out + after, **kind).requires_grad_()
    x = torch.randn(sum(sizes), *more, wide, **kind).requires_grad_()
    A = torch.randn(len(sizes), rank, wide, **kind).requires_grad_()
    B = torch.randn(len(sizes), out, rank, **kind).requires_grad_()
    expected = plain(base, x, A, B, 1.7, sizes, start)
    with pytest.MonkeyPatch.context() as patch:
        found = [_add_plainly(base.clone(), x, A, B, 1.7, sizes, start)]
        for limit in SIZES.values():
            patch.setattr(low_rank_product, "SMALL", limit)
            found.append(add_low_rank_(base.clone(), x, A, B, 1.7, sizes, start))
    for ours in found:
        torch.testing.assert_close(ours, expected)
        g = torch.randn_like(expected)
        gradients = [
            torch.autograd.grad(y, [base, x, A, B], g, retain_graph=True, allow_unused=True) for y in (ours, expected)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize(("shards", "out", "rank"), list(itertools.product((1, 3), repeat=3)))
def test_one_size_is_not_taken_for_another(shards: int, out: int, rank: int) -> None:
    """Of a y that is 3 wide, with as many shards or ranks, all columns or one."""
    x, A, B = torch.randn(6, 3), torch.randn(shards, rank, 3), torch.randn(shards, out, rank)
    sizes, start = [6 // shards] * shards, 3 - out
    y = torch.randn(6, 3)
    torch.testing.assert_close(
        add_low_rank_(y.clone(), x, A, B, 0.5, sizes, start), plain(y, x, A, B, 0.5, sizes, start)
    )


def test_numerical_gradient() -> None:
    torch.manual_seed(0)
    kind = {"dtype": torch.float64, "requires_grad": True}
    inputs = [torch.randn(*s, **kind) for s in ((5, 2, 9), (5, 2, 4), (2, 3, 4), (2, 6, 3))]
    assert torch.autograd.gradcheck(lambda y, x, A, B: add_low_rank_(y.clone(), x, A, B, 0.5, [2, 3], 1), inputs)


@pytest.mark.usefixtures("small")
def test_is_in_place() -> None:
    y = torch.zeros(4, 6)
    out = add_low_rank_(y, torch.ones(4, 3), torch.ones(1, 2, 3), torch.ones(1, 6, 2), 1.0, [4])
    assert out.data_ptr() == y.data_ptr()
    assert torch.equal(y, torch.full((4, 6), 6.0))


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]
)
@pytest.mark.usefixtures("small")
def test_gradients_of_what_needs_them(needs: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(0)
    x, A, B = torch.randn(4, 3), torch.randn(2, 2, 3), torch.randn(2, 5, 2)
    for t, need in zip((x, A, B), needs, strict=True):
        t.requires_grad_(need)
    y = add_low_rank_(torch.zeros(4, 5), x, A, B, 1.0, [2, 2])
    assert y.requires_grad == any(needs)
    if any(needs):
        y.sum().backward()
    assert [t.grad is not None for t in (x, A, B)] == list(needs)


def test_a_second_derivative_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Better an error than a wrong number."""
    monkeypatch.setattr(low_rank_product, "SMALL", 0)
    x = torch.randn(4, 3, requires_grad=True)
    A, B = torch.randn(1, 2, 3, requires_grad=True), torch.randn(1, 5, 2, requires_grad=True)
    y = add_low_rank_(torch.zeros(4, 5), x, A, B, 1.0, [4])
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        g.sum().backward()
