"""Tucker projection: the formula in float64, what it keeps of a low-rank tensor, its fallbacks, resuming."""

import pytest
import torch

from lowrank.optim import SGD, SVD, AdamW, Gaussian, PowerIteration, Projected, Tucker


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


def test_ranks_are_capped_by_what_the_other_modes_allow():
    assert Tucker(rank=50).ranks_for((100, 3, 3)) == {0: 9}


def test_lowers_the_loss_resumes_bitwise_and_counts_failures():
    rule = Tucker(rank=(3, 3, 2, 2), refresh_every=3, scale=1.0)

    def run(p, state, steps):
        for _ in range(steps):
            direction, gain = rule.update(p - 1, state)
            p = p - 0.1 * gain * direction
        return p

    start = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = run(start, rule.init(start), 120)
    state = rule.init(start)
    half = run(start, state, 60)
    copied = {k: v.clone() if isinstance(v, torch.Tensor) else _clone(v) for k, v in state.items()}
    assert torch.equal(run(half, copied, 60), whole)
    assert (whole - 1).norm() < 0.7 * (start - 1).norm()
    rule.place_(state, 3)
    basis = state["basis"]["0"].clone()
    for _ in range(3):
        rule.update(torch.full_like(start, float("nan")), state)
    assert torch.equal(state["basis"]["0"], basis)
    assert int(state["failures"]) == 1


def _clone(state):
    return {k: v.clone() if isinstance(v, torch.Tensor) else _clone(v) for k, v in state.items()}


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"rank": (2, 1.5)}, {"refresh_every": 0}, {"basis": Gaussian()}, {"inner": Projected()}],
)
def test_refusals(options):
    with pytest.raises(ValueError, match=r"positive whole number|orthonormal|projects by itself"):
        Tucker(**options)


def test_a_tuple_of_ranks_must_fit_the_shape():
    with pytest.raises(ValueError, match="is for 2 modes"):
        Tucker(rank=(2, 2)).init(torch.zeros(4, 4, 4))
