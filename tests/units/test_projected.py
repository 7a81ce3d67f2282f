"""``Projected``: law 4, bytes, refreshes, failures, refusals; tests/contract has what every rule keeps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.quadratic import Quadratic, state_bytes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank.optim import (
    SGD,
    SVD,
    Adafactor,
    AdamW,
    GaLore,
    Gaussian,
    Lazy,
    Optimizer,
    PowerIteration,
    Projected,
    Rescale,
    Residual,
)
from lowrank.optim.state import leaves

SHAPES = [(8, 13), (13, 8), (9, 9)]


# --- law 4 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lift", [GaLore(), Rescale(), Residual()], ids=str)
@pytest.mark.parametrize("basis", [SVD(), PowerIteration(), Gaussian()], ids=str)
@pytest.mark.parametrize(("shape", "rank", "side"), [((5, 9), 5, "short"), ((9, 5), 9, "long"), ((4, 4), 20, "right")])
def test_a_rank_that_does_not_compress_is_torch_adamw(lift, basis, shape, rank, side):
    task = Quadratic(shape)
    rule = Projected(rank=rank, basis=basis, lift=lift, side=side, scale=1.0)
    assert rule.rank_for(shape) is None
    ours, state = task.run(rule, 8)
    theirs = task.start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.1)
    for step in range(8):
        theirs.grad = task.gradient(theirs.detach(), step)
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-6)
    assert [k for k, _ in leaves(state)] == [k for k, _ in leaves(AdamW().init(ours))]


@pytest.mark.parametrize("shape", [(7,), ()], ids=str)
def test_vectors_follow_the_inner_rule(shape):
    task = Quadratic(shape)
    ours, _ = task.run(Projected(rank=1), 5)
    theirs = task.start.clone()
    state = AdamW().init(theirs)
    for step in range(5):
        AdamW().apply_([theirs], [task.gradient(theirs, step)], [state], lr=0.02, decay=0.1)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("basis", [SVD(), PowerIteration()], ids=str)
def test_rotate_transported_sgd_at_full_rank_is_sgd(shape, basis):
    """SGD does not care about coordinates, so a moving orthogonal basis may not change it."""
    task, momentum = Quadratic(shape, torch.float64), SGD(momentum=0.9)
    options = {"rank": min(shape), "basis": basis, "refresh_every": 3, "scale": 1.0, "fallback": False}
    rotated, state = task.run(Projected(inner=momentum, transport="rotate", **options), 12)
    kept, _ = task.run(Projected(inner=momentum, transport="keep", **options), 12)
    plain, plain_state = task.start.clone(), momentum.init(task.start)
    for step in range(12):
        direction, gain = momentum.update(task.gradient(plain, step), plain_state)
        plain = plain * (1 - 0.02 * 0.1) - 0.02 * gain * direction
    torch.testing.assert_close(rotated, plain)
    assert int(state["refreshes"]) == 4
    assert (kept - plain).abs().max() > 1e-3


def test_fallback_states_keep_whole_gradients():
    rule = Projected(rank=100)
    assert not rule.accumulates_projected(rule.init(torch.zeros(4, 5)))


def test_a_nested_rule_alone_is_that_rule():
    """Where the outer projection falls back, the inner one's state is not taken for the outer one's."""
    inner, task = Projected(rank=2, refresh_every=3), Quadratic((6, 9))
    alone, _ = task.run(inner, 7)
    nested, state = task.run(Projected(inner=inner, rank=100), 7)
    assert torch.equal(nested, alone)
    assert not Projected(inner=inner, rank=100).accumulates_projected(state)


@given(rows=st.integers(2, 30), cols=st.integers(2, 30), rank=st.integers(1, 12), lead=st.integers(1, 3))
def test_state_bytes_are_the_documented_formula(rows, cols, rank, lead):
    short, long, r = min(rows, cols), max(rows, cols), min(rank, rows, cols)
    like, clock, step = torch.empty(lead, rows, cols, device="meta"), 40, 4
    if rank < short:
        assert state_bytes(Projected(rank=rank).init(like)) == 4 * lead * (short + 2 * long) * r + clock + step
        apollo = Projected(rank=rank, basis=Gaussian(), lift=Rescale())
        assert state_bytes(apollo.init(like)) == 4 * lead * (2 * long * r + 1) + clock + step
        both = Projected(rank=rank, side="both")
        assert state_bytes(both.init(like)) == 4 * lead * (short + long + 2 * r) * r + clock + step
        lazy = Projected(rank=rank, lazy=Lazy())
        assert state_bytes(lazy.init(like)) == 4 * lead * (short + 2 * long) * r + clock + step + 8 + 4 * 5
        blocks = math.ceil(long * r / 256)
        eight = Projected(rank=rank, inner=AdamW(storage="int8")).init(like)
        codes = 2 * (blocks * math.ceil(long * r / blocks) + 4 * blocks)
        assert state_bytes(eight) == lead * (4 * short * r + codes) + clock + step
    else:
        assert state_bytes(Projected(rank=rank).init(like)) == 8 * lead * rows * cols + step
    if rank < long:
        reverse = Projected(rank=rank, side="long").init(like)
        assert state_bytes(reverse) == 4 * lead * (long + 2 * short) * r + clock + step


class Made(TorchDispatchMode):
    """Notes the size of every tensor that is made: of results that share no memory with an argument."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.numbers += [t.numel() for t in made if t.untyped_storage().data_ptr() not in given]
        return result


@pytest.mark.parametrize("side", ["short", "long", "both"])
@pytest.mark.parametrize(("lift", "most"), [(GaLore(), 0), (Rescale(scope="tensor"), 0), (Residual(scope="tensor"), 1)])
def test_an_ordinary_step_makes_at_most_one_tensor_as_large_as_the_gradient(side, lift, most):
    task, rule = Quadratic((24, 60)), Projected(rank=3, side=side, lift=lift, refresh_every=100)
    p, state = task.run(rule, 2)
    g = task.gradient(p, 2)
    with Made() as made:
        rule.apply_([p], [g], [state], lr=0.1, decay=0.1)
    assert made.numbers
    assert sum(numbers >= g.numel() for numbers in made.numbers) == most


# --- refreshes --------------------------------------------------------------------------------------------------


def test_refreshes_are_staggered_and_every_layer_has_a_basis_at_once():
    rule, interval, layers = Projected(rank=2, refresh_every=40), 40, 16
    states = [rule.init(torch.zeros(4, 6)) for _ in range(layers)]
    for index, state in enumerate(states):
        rule.place_(state, index)
    params = [torch.randn(4, 6) for _ in range(layers)]
    refreshed = []
    for _ in range(2 * interval + 1):
        before = [int(state["refreshes"]) for state in states]
        rule.apply_(params, [torch.randn(4, 6) for _ in range(layers)], states, lr=0.0, decay=0.0)
        refreshed.append(sum(int(s["refreshes"]) - b for s, b in zip(states, before, strict=True)))
    assert refreshed[0] == layers
    assert max(refreshed[1:]) == 1
    assert sum(refreshed[1 : interval + 1]) == layers
    together = Projected(rank=2, refresh_every=40, stagger=False)
    state = together.init(torch.zeros(4, 6))
    together.place_(state, 7)
    together.update(torch.randn(4, 6), state)
    assert int(state["due"]) == 40


def test_lazy_refresh_doubles_the_interval_of_a_subspace_that_stands_still():
    rule = Projected(rank=2, refresh_every=2, stagger=False, lazy=Lazy(window=2), basis=SVD())
    still = torch.outer(torch.arange(1.0, 6), torch.ones(7)) + 0.1 * torch.randn(5, 7)
    state = rule.init(still)
    for _ in range(14):
        rule.update(still, state)
    assert int(state["interval"]) == 8
    assert int(state["refreshes"]) == 5  # at 0, 2, 4 (then 4 apart), 8, 12 (then 8 apart)
    moving = rule.init(still)
    for step in range(14):
        rule.update(torch.outer(torch.eye(5)[step % 5], torch.ones(7)), moving)
    assert int(moving["interval"]) == 2


@pytest.mark.parametrize(
    ("cosines", "interval"),
    [
        ([1.0, 1.0], 10),  # not yet three
        ([1.0, 0.2, 0.2], 10),  # mean 0.47
        ([0.0, 0.7, 0.9], 25),
        ([0.0, 0.0, 0.0, 0.8, 0.9], 25),  # the last three
        ([0.9] * 5, 25),  # after widening three more are waited for
        ([-0.9] * 6, 62),  # a vector's sign is arbitrary
        ([(0.2, 1.0), (0.2, 1.0), (0.2, 1.0)], 25),  # of a stack the mean
        ([(0.2, 0.6), (0.2, 0.6), (0.2, 0.6)], 10),
    ],
)
def test_lazy_refresh_averages_its_window(cosines, interval):
    lazy = Lazy(threshold=0.5, factor=2.5, window=3)
    state = lazy.init(10)
    for each in cosines:
        cosine = torch.tensor(each)
        turned = torch.stack([cosine, (1 - cosine**2).sqrt()], dim=-1)[..., None]
        rest = torch.full_like(turned, 0.3)  # vectors after the leading one do not count
        first = torch.eye(2)[:, :1].expand_as(turned)
        lazy.note_(state, [torch.cat([first, first], dim=-1)], [torch.cat([turned, rest], dim=-1)])
    assert int(state["interval"]) == interval


@pytest.mark.parametrize("transport", ["keep", "rotate", "reset"])
def test_transport(transport):
    rule = Projected(rank=2, refresh_every=3, stagger=False, basis=SVD(align=False), transport=transport)
    g = torch.randn(6, 9, 9, generator=torch.Generator().manual_seed(0))
    state = rule.init(g[0])
    for step in range(3):
        rule.update(g[step], state)
    old, m, v = (t.clone() for t in (state["basis"]["right"], state["inner"]["exp_avg"], state["inner"]["exp_avg_sq"]))
    rule.update(g[3], state)
    new = state["basis"]["right"]
    r, turn = g[3] @ new, old.T @ new
    before = {"keep": (m, v), "rotate": (m @ turn, v @ turn**2), "reset": (0 * m, 0 * v)}[transport]
    torch.testing.assert_close(state["inner"]["exp_avg"], 0.9 * before[0] + 0.1 * r)
    torch.testing.assert_close(state["inner"]["exp_avg_sq"], 0.999 * before[1] + 0.001 * r * r)
    assert float(state["inner"]["step"]) == (1 if transport == "reset" else 4)


@pytest.mark.parametrize("basis", [SVD(), PowerIteration()], ids=str)
@pytest.mark.parametrize("shape", [(6, 9), (3, 6, 9)], ids=str)
def test_a_gradient_that_is_not_finite_leaves_the_basis_and_is_counted(basis, shape):
    task, rule = Quadratic(shape), Projected(rank=2, refresh_every=3, basis=basis, stagger=False)
    _, state = task.run(rule, 3)
    old = state["basis"]["left"].clone()
    bad = task.gradient(task.start, 3)
    bad[..., 1, 2] = float("nan")
    rule.update(bad, state)
    assert torch.equal(state["basis"]["left"], old)
    assert int(state["failures"]) == math.prod(shape[:-2])
    assert int(state["due"]) == 6


@pytest.mark.parametrize("basis", [SVD(), PowerIteration()], ids=str)
def test_one_bad_matrix_of_a_stack_does_not_hold_back_the_others(basis):
    task, rule = Quadratic((3, 6, 9)), Projected(rank=2, refresh_every=3, basis=basis, stagger=False)
    _, state = task.run(rule, 3)
    old = state["basis"]["left"].clone()
    bad = task.gradient(task.start, 3)
    bad[1, 0, 0] = float("inf")
    rule.update(bad, state)
    same = [torch.equal(a, b) for a, b in zip(old, state["basis"]["left"], strict=True)]
    assert same == [False, True, False]
    assert int(state["failures"]) == 1


@pytest.mark.parametrize("basis", [SVD(), PowerIteration()], ids=str)
def test_a_bad_first_gradient_is_tried_again(basis):
    task, rule = Quadratic((6, 9)), Projected(rank=2, refresh_every=50, basis=basis)
    state = rule.init(task.start)
    rule.update(torch.full((6, 9), float("nan")), state)
    assert (int(state["failures"]), int(state["refreshes"]), int(state["due"])) == (1, 0, 1)
    rule.update(task.gradient(task.start, 0), state)
    assert (int(state["failures"]), int(state["refreshes"])) == (1, 1)
    assert state["basis"]["left"].isfinite().all()


def test_random_streams_differ_by_parameter_and_by_refresh():
    rule = Projected(rank=2, refresh_every=2, basis=Gaussian(), stagger=False)
    g = torch.randn(5, 8)
    states = [rule.init(g) for _ in range(2)]
    for index, state in enumerate(states):
        rule.place_(state, index)
    seen = []
    for _ in range(4):
        for state in states:
            rule.update(g, state)
            seen.append(rule.project(g, state))
    first, second = seen[::2], seen[1::2]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    assert not torch.equal(first[0], second[0])


# --- shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_read_as_a_matrix_on_request(memory_format):
    rule = Projected(rank=3, refresh_every=3, stack=False)
    task = Quadratic((6, 3, 2, 2))
    p = task.start.clone(memory_format=memory_format)
    p, state = task.run(rule, 6, p=p, state=rule.init(p))
    flat = Quadratic((6, 12))
    flat.start, flat.target = task.start.flatten(1), task.target.flatten(1)
    flat.gradient = lambda q, step: task.gradient(q.view(6, 3, 2, 2), step).flatten(1)
    expected, _ = flat.run(rule, 6)
    torch.testing.assert_close(p.flatten(1), expected, atol=1e-6, rtol=1e-5)
    assert state["basis"]["left"].shape == (6, 3)


@pytest.mark.parametrize(
    ("side", "shape", "inside"),
    [
        ("short", (5, 9), (2, 9)),
        ("short", (9, 5), (9, 2)),
        ("short", (7, 7), (7, 2)),
        ("long", (5, 9), (5, 2)),
        ("long", (7, 7), (2, 7)),
        ("both", (4, 5, 9), (4, 2, 2)),
        ("right", (5, 9), (5, 2)),
        ("left", (9, 5), (2, 5)),
    ],
)
def test_sides(side, shape, inside):
    rule = Projected(rank=2, side=side)
    assert rule.inside_shape(shape) == inside
    assert rule.init(torch.zeros(shape))["inner"]["exp_avg"].shape == inside


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ({"rank": 2.5}, "rank=2.5 must be a whole number of at least 1"),
        ({"rank": True}, "rank=True must be a whole number of at least 1"),
        ({"refresh_every": 0}, "refresh_every=0"),
        ({"side": "std"}, "side='std' is unknown; it is one of short, long, left, right, both"),
        ({"transport": "move"}, "one of keep, rotate, statistics, reset"),
        ({"basis_storage": "int2"}, "one of float32, bfloat16, int8, int4"),
        ({"basis": Gaussian(), "transport": "rotate"}, "drawn anew"),
        ({"basis": Gaussian(), "lazy": Lazy()}, "drawn anew"),
        ({"basis": Gaussian(), "basis_storage": "int8"}, "not stored"),
        ({"lift": Rescale(), "side": "both"}, "scope='tensor'"),
        ({"inner": Projected(rank=1), "transport": "rotate"}, "cannot; use 'keep' or 'reset'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Projected(**{"rank": 2, **options})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rescale(scope="row"),
        lambda: Residual(limiter=0.5),
        lambda: Lazy(window=0),
        lambda: AdamW(storage="int7"),
        lambda: Adafactor(clip_threshold=0.0),
        lambda: Adafactor(decay_rate=0.5),
        lambda: Adafactor(warmup_init=True),
    ],
)
def test_values_refuse_what_they_cannot_mean(make):
    with pytest.raises(ValueError, match=r"=|must"):
        make()


def test_loading_state_of_another_rank_is_refused():
    p = torch.nn.Parameter(torch.randn(8, 12))
    optimizers = [Optimizer([{"params": [("p", p)], "rule": Projected(rank=r), "lr": 0.1}]) for r in (2, 3)]
    with pytest.raises(ValueError, match="rank=2"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
