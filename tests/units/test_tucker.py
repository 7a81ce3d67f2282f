"""The example for tensors: the formula in float64, what it keeps of a low-rank tensor, fallbacks, failures."""

import pytest
import torch
from examples.tucker import Tucker

from lowrank.optim import SGD, SVD, AdamW, Gaussian, PowerIteration, Projected


def gradients(count, shape=(6, 5, 3, 3)):
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=noise, dtype=torch.float64) for _ in range(count)]


def test_the_formula_written_out():
    rule = Tucker(inner=SGD(), rank=2, basis=SVD(), scale=0.5)
    (g,) = gradients(1)
    direction, gain = rule.update(g, rule.init(g))
    q = [torch.linalg.svd(g.movedim(k, 0).flatten(1), full_matrices=False)[0][:, :2] for k in range(4)]
    core = torch.einsum("abcd,ai,bj,ck,dl->ijkl", g, *q)
    expected = torch.einsum("ijkl,ai,bj,ck,dl->abcd", core, *q)
    torch.testing.assert_close(direction * gain, 0.5 * expected)


@pytest.mark.parametrize("basis", [SVD(), PowerIteration()], ids=str)
def test_a_tensor_of_that_rank_passes_unchanged(basis):
    noise = torch.Generator().manual_seed(0)
    factors = [torch.randn(n, 2, generator=noise, dtype=torch.float64) for n in (8, 7, 3)]
    g = torch.einsum("ijk,ai,bj,ck->abc", torch.randn(2, 2, 2, generator=noise, dtype=torch.float64), *factors)
    rule = Tucker(inner=SGD(), rank=(2, 2, 3), basis=basis, scale=1.0)
    state = rule.init(g)
    assert state["basis"].keys() == {"0", "1"}
    direction, _ = rule.update(g, state)
    torch.testing.assert_close(direction, g, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 5), (2, 2, 2)], ids=str)
def test_what_is_not_compressed_follows_the_inner_rule(shape):
    rule, g = Tucker(rank=2), torch.randn(shape)
    assert rule.ranks_for(shape) == {}
    ours, theirs = rule.update(g, rule.init(g)), AdamW().update(g, AdamW().init(g))
    assert torch.equal(ours[0], theirs[0])


def test_a_gradient_that_is_not_finite_leaves_the_bases_and_is_counted():
    rule, p = Tucker(rank=(3, 3, 2, 2), refresh_every=3), torch.randn(6, 5, 3, 3)
    state = rule.init(p)
    rule.update(p, state)
    basis = state["basis"]["0"].clone()
    for _ in range(3):
        rule.update(torch.full_like(p, float("nan")), state)
    assert torch.equal(state["basis"]["0"], basis)
    assert int(state["failures"]) == 1


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"rank": (2, 1.5)}, {"refresh_every": 0}, {"basis": Gaussian()}, {"inner": Projected()}],
)
def test_refusals(options):
    with pytest.raises(ValueError, match=r"positive whole number|orthonormal|projects by itself"):
        Tucker(**options)


def test_ranks_fit_the_shape():
    assert Tucker(rank=50).ranks_for((100, 3, 3)) == {0: 9}  # no more than the other modes allow
    with pytest.raises(ValueError, match="is for 2 modes"):
        Tucker(rank=(2, 2)).init(torch.zeros(4, 4, 4))
