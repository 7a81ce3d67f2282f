"""Laws 4, 6, 7, 9 and 10 for ``Projected``, over combinations of its slots; refreshes, failures, refusals."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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

COMBINATIONS = {
    "galore": Projected(rank=3, refresh_every=4),
    "galore-svd-rotate": Projected(rank=3, refresh_every=4, basis=SVD(), transport="rotate"),
    "galore-long-reset": Projected(rank=3, refresh_every=4, side="long", transport="reset"),
    "galore-left": Projected(rank=3, refresh_every=4, side="left", transport="rotate"),
    "galore-right": Projected(rank=3, refresh_every=4, side="right"),
    "galore-both": Projected(rank=3, refresh_every=4, side="both", transport="rotate"),
    "galore-int8": Projected(inner=AdamW(storage="int8"), rank=3, refresh_every=4, basis_storage="int8"),
    "galore-bfloat16": Projected(inner=AdamW(storage="bfloat16"), rank=3, refresh_every=4, basis_storage="bfloat16"),
    "q-galore": Projected(
        inner=AdamW(storage="int8"), rank=3, refresh_every=2, basis_storage="int4", lazy=Lazy(window=2)
    ),
    "galore-sgd": Projected(inner=SGD(momentum=0.9), rank=3, refresh_every=4, transport="rotate"),
    "galore-adafactor": Projected(
        inner=Adafactor(beta1=0.9, scale_parameter=True), rank=3, refresh_every=4, transport="rotate"
    ),
    "ldadam": Projected(rank=3, refresh_every=1, basis=PowerIteration(iterations=1), transport="rotate"),
    "apollo": Projected(rank=3, refresh_every=4, basis=Gaussian(), lift=Rescale(), scale=1.0),
    "apollo-svd": Projected(rank=3, refresh_every=4, basis=SVD(), lift=Rescale(limiter=None), transport="reset"),
    "apollo-mini": Projected(rank=1, refresh_every=4, basis=Gaussian(), lift=Rescale(scope="tensor"), scale=128**0.5),
    "fira": Projected(rank=3, refresh_every=4, lift=Residual()),
    "fira-both": Projected(rank=3, refresh_every=4, lift=Residual(scope="tensor"), side="both"),
    "flora": Projected(inner=SGD(momentum=0.9), rank=3, refresh_every=4, basis=Gaussian()),
    "nested": Projected(inner=Projected(rank=2, refresh_every=3, scale=1.0), rank=5, refresh_every=4),
}
SHAPES = [(8, 13), (13, 8), (9, 9)]
every_combination = pytest.mark.parametrize("name", COMBINATIONS)


class Task:
    """Gradients of ½‖p − target‖² with noise, as a function of (p, step)."""

    def __init__(self, shape, dtype=torch.float32, noise=0.1):
        self.start, self.target = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.noise = noise

    def gradient(self, p, step):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(step + 1)).to(p.dtype)
        return p - self.target + self.noise * noise

    def run(self, rule, steps, *, in_place=True, lr=0.02, decay=0.1, p=None, state=None, begin=0):
        p = self.start.clone() if p is None else p
        if state is None:
            state = rule.init(p)
            rule.place_(state, 0)
        for step in range(begin, begin + steps):
            g = self.gradient(p, step)
            if in_place:
                rule.apply_([p], [g], [state], lr=lr, decay=decay)
            else:
                rule.observe_(p, state)
                direction, gain = rule.update(g, state)
                p = p * (1 - lr * decay) - lr * gain * direction
        return p, state


def leaves(state, prefix=""):
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            yield prefix + key, value
        else:
            yield from leaves(value, prefix + key + ".")


def state_bytes(state):
    return sum(t.numel() * t.element_size() for _, t in leaves(state))


# --- the definition and the step in place -----------------------------------------------------------------------


@every_combination
@pytest.mark.parametrize("shape", [*SHAPES, (2, 8, 13), (2, 2, 13, 8)], ids=str)
def test_in_place_is_the_definition_to_rounding(name, shape):
    task, rule = Task(shape), COMBINATIONS[name]
    narrow = "int" in name or "float16" in name or name == "q-galore"  # a code may fall on the other side of an edge
    there, _ = task.run(rule, 10)
    here, _ = task.run(rule, 10, in_place=False)
    torch.testing.assert_close(there, here, atol=3e-3 if narrow else 2e-5, rtol=1e-4)


@every_combination
def test_rules_are_frozen_hashable_printable_values(name):
    rule = COMBINATIONS[name]
    assert eval(repr(rule)) == rule
    assert hash(eval(repr(rule))) == hash(rule)
    with pytest.raises(AttributeError):
        rule.rank = 4


# --- law 4 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lift", [GaLore(), Rescale(), Residual()], ids=str)
@pytest.mark.parametrize("basis", [SVD(), PowerIteration(), Gaussian()], ids=str)
@pytest.mark.parametrize(("shape", "rank", "side"), [((5, 9), 5, "short"), ((9, 5), 9, "long"), ((4, 4), 20, "right")])
def test_a_rank_that_does_not_compress_is_torch_adamw(lift, basis, shape, rank, side):
    task = Task(shape)
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
    task = Task(shape)
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
    task, momentum = Task(shape, torch.float64), SGD(momentum=0.9)
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


# --- law 6: micro-batches kept in the subspace ------------------------------------------------------------------


@every_combination
def test_projected_micro_batches_are_the_whole_step(name):
    rule, task = COMBINATIONS[name], Task((8, 13))
    p, state = task.run(rule, 5)
    for step in range(5, 9):
        q, parallel = p.clone(), _copy(state)
        parts = [task.gradient(p, 100 * step + i) / 3 for i in range(3)]
        if not rule.accumulates_projected(state):
            assert rule.lift.needs_gradient or int(state["step"]) == int(state["due"])
            rule.apply_([p], [sum(parts)], [state], lr=0.02, decay=0.1)
            continue
        before = {k: t.clone() for k, t in leaves(state)}
        projected = sum(rule.project(part, state) for part in parts)
        assert projected.numel() < p.numel()
        assert all(torch.equal(before[k], t) for k, t in leaves(state))
        rule.apply_projected_(p, projected, state, lr=0.02, decay=0.1)
        rule.apply_([q], [sum(parts)], [parallel], lr=0.02, decay=0.1)
        torch.testing.assert_close(p, q, atol=3e-3 if "int" in name or "q-" in name else 1e-5, rtol=1e-4)


def _copy(state):
    return {k: v.clone() if isinstance(v, torch.Tensor) else _copy(v) for k, v in state.items()}


def test_fallback_states_keep_whole_gradients():
    rule = Projected(rank=100)
    assert not rule.accumulates_projected(rule.init(torch.zeros(4, 5)))


def test_a_nested_rule_alone_is_that_rule():
    """Where the outer projection falls back, the inner one's state is not taken for the outer one's."""
    inner, task = Projected(rank=2, refresh_every=3), Task((6, 9))
    alone, _ = task.run(inner, 7)
    nested, state = task.run(Projected(inner=inner, rank=100), 7)
    assert torch.equal(nested, alone)
    assert not Projected(inner=inner, rank=100).accumulates_projected(state)


# --- law 7: resuming --------------------------------------------------------------------------------------------


@every_combination
def test_resume_is_bitwise(name):
    task, rule = Task((8, 13)), COMBINATIONS[name]
    whole, _ = task.run(rule, 10)
    p, state = task.run(rule, 5)
    buffer = io.BytesIO()
    torch.save({"p": p, "state": state}, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    p, _ = task.run(rule, 5, p=loaded["p"], state=loaded["state"], begin=5)
    assert torch.equal(p, whole)


@pytest.mark.parametrize("name", ["galore", "q-galore", "fira", "apollo"])
def test_the_optimizer_resumes_bitwise_and_keeps_dtypes_in_bfloat16(name):
    def train(optimizer, model, steps, begin=0):
        for step in range(begin, begin + steps):
            x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step)).bfloat16()
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 9), torch.nn.Linear(9, 10)).bfloat16()
        groups = [{"params": list(model.named_parameters()), "rule": COMBINATIONS[name], "lr": 0.01, "decay": 0.1}]
        return model, Optimizer(groups)

    model, optimizer = fresh()
    train(optimizer, model, 8)
    first, first_optimizer = fresh()
    train(first_optimizer, first, 4)
    second, second_optimizer = fresh()
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    train(second_optimizer, second, 4, begin=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))
    states = zip(optimizer.state.values(), second_optimizer.state.values(), strict=True)
    assert all(x.dtype == y.dtype for a, b in states for (_, x), (_, y) in zip(leaves(a), leaves(b), strict=True))


# --- law 9: stacks and bytes ------------------------------------------------------------------------------------


@every_combination
def test_a_stack_is_its_matrices_one_by_one(name):
    task, rule = Task((3, 8, 13)), COMBINATIONS[name]
    stack, _ = task.run(rule, 7)
    for i in range(3):
        single = Task((8, 13))
        single.start, single.target = task.start[i], task.target[i]
        single.gradient = lambda p, step, i=i: task.gradient(task.start, step)[i] - task.start[i] + p
        alone, _ = single.run(rule, 7)
        torch.testing.assert_close(stack[i], alone, atol=2e-4, rtol=1e-3)


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
    task, rule = Task((24, 60)), Projected(rank=3, side=side, lift=lift, refresh_every=100)
    p, state = task.run(rule, 2)
    g = task.gradient(p, 2)
    with Made() as made:
        rule.apply_([p], [g], [state], lr=0.1, decay=0.1)
    assert made.numbers
    assert sum(numbers >= g.numel() for numbers in made.numbers) == most


# --- law 10 -----------------------------------------------------------------------------------------------------


@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowers_the_loss_is_deterministic_and_keeps_dtypes(name, dtype):
    def train():
        task = Task((8, 13), torch.float32)
        p = torch.nn.Parameter(task.start.clone().to(dtype))
        optimizer = Optimizer([{"params": [("p", p)], "rule": COMBINATIONS[name], "lr": 0.05}])
        for step in range(120):
            p.grad = task.gradient(p.detach().float(), step).to(dtype)
            optimizer.step()
        loss = (p.detach().float() - task.target).square().mean()
        return p, loss / (task.start - task.target).square().mean(), optimizer

    p, loss, optimizer = train()
    again, _, _ = train()
    assert p.dtype is dtype
    assert loss < 0.9
    assert torch.equal(p, again)
    kinds = {t.dtype for _, t in leaves(optimizer.state[p]) if t.is_floating_point()}
    assert kinds == ({torch.float32, torch.bfloat16} if name == "galore-bfloat16" else {torch.float32})


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
    task, rule = Task(shape), Projected(rank=2, refresh_every=3, basis=basis, stagger=False)
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
    task, rule = Task((3, 6, 9)), Projected(rank=2, refresh_every=3, basis=basis, stagger=False)
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
    task, rule = Task((6, 9)), Projected(rank=2, refresh_every=50, basis=basis)
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
    task = Task((6, 3, 2, 2))
    p = task.start.clone(memory_format=memory_format)
    p, state = task.run(rule, 6, p=p, state=rule.init(p))
    flat = Task((6, 12))
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
        ({"rank": 0}, "rank=0 must be a positive whole number"),
        ({"rank": 2.5}, "rank=2.5 must be a positive whole number"),
        ({"rank": True}, "rank=True must be a positive whole number"),
        ({"refresh_every": 0}, "refresh_every=0"),
        ({"side": "std"}, "side='std' is unknown; it is one of short, long, left, right, both"),
        ({"transport": "move"}, "one of keep, rotate, reset"),
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
