"""Bases, products and block codes: what they keep, what they bound, and that stacks are looped matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.linalg.basis import SVD, Gaussian, PowerIteration, align_signs, captured_energy
from lowrank.linalg.quantise import Code, dither, round_bfloat16, split
from lowrank.linalg.subspace import Subspace, residual
from lowrank.optim.basis_fit import fit, noting_refreshes

SIZES = st.integers(1, 12)
SPECTRAL = [SVD(), PowerIteration(), PowerIteration(iterations=1), PowerIteration(iterations=3, sample=1)]


def decaying(rows, cols, seed=0, lead=()):
    noise = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(*lead, rows, rows, generator=noise))[0]
    v = torch.linalg.qr(torch.randn(*lead, cols, cols, generator=noise))[0]
    k = min(rows, cols)
    return u[..., :k] * torch.logspace(0, -3, k) @ v[..., :k].mT


@pytest.mark.parametrize("basis", SPECTRAL, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)], ids=str)
def test_spectral_bases_are_orthonormal_and_capture_the_energy(basis, side, shape):
    g = decaying(*shape)
    exact = torch.linalg.svdvals(g)[:8].square().sum()
    cold = basis.fit(g, side, 8, old=None, seed=0)
    warm = basis.fit(g, side, 8, old=cold, seed=0)
    for q in (cold, warm):
        torch.testing.assert_close(q.mT @ q, torch.eye(8), atol=1e-5, rtol=0)
    assert captured_energy(g, cold, side) > 0.97 * exact
    assert captured_energy(g, warm, side) > 0.99 * exact


def test_refreshes_are_noted_where_somebody_asks():
    g, old = decaying(12, 20, lead=(2,)), torch.linalg.qr(torch.randn(2, 12, 4))[0]
    values = torch.linalg.svdvals(g).square()
    with noting_refreshes(noted := []):
        new, _ = fit(SVD(), g, ("left",), 4, old=None, seed=0)
        fit(SVD(), g, ("left",), 4, old=new, seed=0)
        fit(SVD(), g, ("left",), 4, old=Subspace(left=old), seed=0)
        fit(Gaussian(), g, ("left",), 4, old=None, seed=0)
    fit(SVD(), g, ("left",), 4, old=None, seed=0)
    assert len(noted) == 3, "nothing outside, nor of a basis that is no orthonormal one"
    for energy, _ in noted:
        torch.testing.assert_close(energy, (values[:, :4].sum(dim=1) / values.sum(dim=1)).mean())
    assert noted[0][1] is None
    torch.testing.assert_close(noted[1][1], torch.tensor(1.0))
    torch.testing.assert_close(noted[2][1], (new.left.mT @ old).square().sum() / 8)


def test_a_second_iteration_captures_more_where_the_spectrum_is_flat():
    noise = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 60, 90, generator=noise) + 2 * decaying(60, 90)
    start = SVD().fit(old, "left", 10, old=None, seed=0)
    one, two = (
        captured_energy(new, PowerIteration(iterations=n, sample=1).fit(new, "left", 10, old=start, seed=0), "left")
        for n in (1, 2)
    )
    assert captured_energy(new, start, "left") < one < two


@pytest.mark.parametrize("basis", SPECTRAL[1:], ids=str)
def test_a_zero_gradient_leaves_the_subspace_where_it_was(basis):
    old = torch.linalg.qr(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))[0]
    new = basis.fit(torch.zeros(20, 30), "left", 4, old=old, seed=0)
    torch.testing.assert_close(new, old, atol=1e-5, rtol=0)


@pytest.mark.parametrize("magnitude", [1e-12, 1e-6, 1e6])
def test_power_iteration_does_not_depend_on_the_scale_of_the_gradient(magnitude):
    g = decaying(20, 30)
    expected = PowerIteration().fit(g, "left", 4, old=None, seed=0)
    torch.testing.assert_close(
        PowerIteration().fit(g * magnitude, "left", 4, old=None, seed=0), expected, atol=1e-3, rtol=0
    )


def test_signs_follow_the_old_basis():
    g = decaying(20, 30)
    old = SVD(align=False).fit(g, "left", 4, old=None, seed=0) * torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert torch.equal(SVD().fit(g, "left", 4, old=old, seed=0), old)
    assert torch.equal(align_signs(-old, old), old)


@pytest.mark.parametrize("basis", [*SPECTRAL, Gaussian()], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_stack_is_its_matrices_one_by_one(basis, side):
    g = decaying(12, 17, lead=(3,))
    old = torch.stack([SVD().fit(m, side, 4, old=None, seed=0) for m in g.flip(0)])
    for before in (None, old):
        together = basis.fit(g, side, 4, old=before, seed=5)
        for i, matrix in enumerate(g):
            alone = basis.fit(matrix, side, 4, old=None if before is None else before[i], seed=5)
            torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=0)


def test_gaussian_keeps_norms_in_expectation_and_depends_on_the_seed_alone():
    x = torch.randn(400, 1)
    norms = torch.stack([(Gaussian().fit(x, "left", 64, old=None, seed=s).mT @ x).norm() ** 2 for s in range(40)])
    assert abs(norms.mean() / x.norm() ** 2 - 1) < 0.1
    first, again, other = (Gaussian().fit(x, "left", 4, old=None, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("options", [{"iterations": 0}, {"sample": 0}])
def test_power_iteration_refuses_nothing_to_do(options):
    with pytest.raises(ValueError, match="at least 1"):
        PowerIteration(**options)


@settings(max_examples=30, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    rows=SIZES,
    cols=SIZES,
    rank=st.integers(1, 5),
    side=st.sampled_from("lrb"),
)
def test_products(lead, rows, cols, rank, side):
    g, target = torch.randn(2, *lead, rows, cols, dtype=torch.float64)
    q, p = torch.randn(*lead, rows, rank, dtype=torch.float64), torch.randn(*lead, cols, rank, dtype=torch.float64)
    space = {"l": Subspace(left=q), "r": Subspace(right=p), "b": Subspace(left=q, right=p)}[side]
    r = g if side == "r" else q.mT @ g
    r = r if side == "l" else r @ p
    u = r if side == "r" else q @ r
    u = u if side == "l" else u @ p.mT
    torch.testing.assert_close(space.project(g), r)
    torch.testing.assert_close(space.lift(r), u)
    torch.testing.assert_close(residual(g, r, space), g - u)
    changed = target.clone()
    space.lift_into_(changed, r, alpha=-0.3, beta=0.9)
    torch.testing.assert_close(changed, 0.9 * target - 0.3 * u)


CODES = [Code(), Code(power=2), Code(signed=False, power=4), Code(bits=4)]


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 40), max_size=3), code=st.sampled_from(CODES), exponent=st.integers(-12, 6))
def test_codes_come_back_within_a_step(shape, code, exponent):
    x = torch.randn(shape) * 10.0**exponent
    x = x if code.signed else x.square()
    stored = code.allocate(x)
    assert torch.equal(code.decode(stored, x.shape), torch.zeros_like(x))
    code.encode_(stored, x)
    back = code.decode(stored, x.shape)
    scale = x.abs().max() if x.numel() else 0.0
    assert (back - x).abs().max() <= code.power * scale / code.levels * 0.51 + 1e-30
    assert ((back == 0) | (back.sign() == x.sign())).all()


@pytest.mark.parametrize("code", CODES[:3], ids=str)
def test_dithered_codes_are_right_on_average(code):
    x = torch.rand(300) ** 3 + 1e-4
    total, stored, ticks = torch.zeros_like(x), code.allocate(x), 400
    for tick in range(ticks):
        code.encode_(stored, x, tick)
        total += code.decode(stored, x.shape)
    torch.testing.assert_close(total / ticks, x, atol=5e-5, rtol=5e-3)


def test_a_dithered_average_moves_by_less_than_a_code_a_step():
    """A second moment that decays by 0.1 % a step is frozen by rounding to the nearest, and is not by dithering."""
    code, x = Code(signed=False, power=4), torch.linspace(0.05, 1, 256)
    results = {}
    for dithered in (False, True):
        stored = code.allocate(x)
        code.encode_(stored, x)
        for t in range(300):
            value = code.decode(stored, x.shape) * 0.999
            value[-1] = 1.0  # one large number keeps the scale of the block
            code.encode_(stored, value, t if dithered else None)
        results[dithered] = code.decode(stored, x.shape)[:-1] / x[:-1] / 0.999**300
    assert (results[True] - 1).abs().mean() < 0.03
    assert (results[False] - 1).abs().mean() > 0.2


def test_bfloat16_dithering_is_right_on_average_and_keeps_what_is_not_finite():
    x = torch.tensor([1.0 + 1 / 1024, -3.3e-5, float("inf"), float("nan"), 0.0])
    mean = torch.stack([round_bfloat16(x, t).double() for t in range(2000)]).mean(0)
    torch.testing.assert_close(mean[:2], x[:2].double(), rtol=2e-4, atol=0)
    assert (mean[2], mean[4]) == (float("inf"), 0)
    assert mean[3].isnan()
    assert round_bfloat16(torch.tensor(1.5), 3) == 1.5


def test_dither_is_even_and_depends_on_the_tick_alone():
    u = torch.stack([dither(256, t, torch.device("cpu")) for t in range(64)])
    assert (u.histc(16, 0, 1) - 1024).abs().max() < 40
    assert torch.equal(u[7], dither(256, torch.tensor(7.0), torch.device("cpu")))


def test_blocks_never_cross_matrices():
    assert split((3, 20, 30)) == ((3,), 3, 200)
    assert split((5,)) == ((), 1, 5)
    assert split(()) == ((), 1, 1)
    x = torch.randn(3, 20, 30)
    together, code = Code().allocate(x), Code()
    code.encode_(together, x, 4)
    for i in range(3):
        alone = code.allocate(x[i])
        code.encode_(alone, x[i], 4)
        assert all(torch.equal(together[k][i], alone[k]) for k in alone)
