"""The drop-ins against galore-torch itself, and what fails there: vectors, convolutions, resuming, hooks, bad input."""

import importlib.util
import io
import itertools
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from lowrank.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit

ALL = [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor]
GROUP = {"rank": 3, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}
every_class = pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)


@pytest.fixture(scope="module")
def reference():
    """galore-torch's modules, without its package's own imports, which need bitsandbytes and a GPU."""
    found = importlib.util.find_spec("galore_torch")
    if found is None or importlib.util.find_spec("transformers") is None:
        pytest.skip("galore-torch (or transformers, which it imports) is not installed")
    package = types.ModuleType("galore_torch")
    package.__path__ = list(found.submodule_search_locations)
    before = sys.modules.get("galore_torch")
    sys.modules["galore_torch"] = package
    yield {
        GaLoreAdamW: importlib.import_module("galore_torch.adamw").AdamW,
        GaLoreAdafactor: importlib.import_module("galore_torch.adafactor").Adafactor,
    }
    if before is None:
        del sys.modules["galore_torch"]
    else:
        sys.modules["galore_torch"] = before


def groups(vector, matrix, **options):
    return [{"params": [vector]}, {"params": [matrix], **GROUP, **options}]


def start(shape, seed=0):
    noise = torch.Generator().manual_seed(seed)
    matrix, target = torch.randn(2, *shape, generator=noise)
    return nn.Parameter(torch.randn(5, generator=noise)), nn.Parameter(matrix), target, noise


def train(cls, shape, steps=50, schedule=None, make=groups, proj_type="std", **options):
    """The parameters after ``steps`` on a noisy, badly scaled quadratic."""
    vector, matrix, target, noise = start(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # galore-torch announces its own deprecation
        optimizer = cls(make(vector, matrix, proj_type=proj_type, update_proj_gap=13), **options)
    scheduler = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for _ in range(steps):
        scale = torch.linspace(0.5, 1.5, shape[-1])
        matrix.grad = (matrix.detach() - target) * scale + 0.5 * torch.randn(shape, generator=noise)
        vector.grad = vector.detach() - 1
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return vector.detach(), matrix.detach()


OPTIONS = {
    GaLoreAdamW: [{"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.01, "betas": (0.4, 0.3), "correct_bias": False}],
    GaLoreAdafactor: [
        {"weight_decay": 0.1},
        {"beta1": 0.9, "warmup_init": True},
        {"lr": 0.02, "relative_step": False, "scale_parameter": False, "beta1": 0.9},
    ],
}
CASES = [(cls, options) for cls, several in OPTIONS.items() for options in several]


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (10, 10)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize(("cls", "options"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_trajectory_is_galore_torchs(reference, cls, options, proj_type, shape):
    theirs = train(reference[cls], shape, proj_type=proj_type, **options)
    ours = train(cls, shape, proj_type=proj_type, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", OPTIONS, ids=lambda c: c.__name__)
def test_trajectory_under_a_schedule_that_starts_at_zero(reference, cls):
    options = {"lr": 0.05} if cls is GaLoreAdamW else {"lr": 0.05, "relative_step": False, "beta1": 0.9}
    warm = {"schedule": lambda step: min(step / 10, 1.0) * 0.97**step, **options}
    for a, b in zip(train(cls, (9, 14), **warm), train(reference[cls], (9, 14), **warm), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [9, 30])
def test_a_rank_that_does_not_compress_is_projected_all_the_same(reference, rank):
    def make(vector, matrix, **options):
        return groups(vector, matrix, **options, rank=rank)

    ours, theirs = (train(cls, (9, 14), make=make, lr=0.02) for cls in (GaLoreAdamW, reference[GaLoreAdamW]))
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)
    plain = nn.Parameter(start((9, 14))[1].detach())
    assert not torch.allclose(plain.detach(), ours[1])


def test_eight_bits_stay_within_the_quantisation_of_float32():
    options = {"lr": 0.02, "weight_decay": 0.1}
    _, narrow = train(GaLoreAdamW8bit, (40, 60), min_8bit_size=0, **options)
    _, wide = train(GaLoreAdamW8bit, (40, 60), min_8bit_size=10**9, **options)
    moved = (wide - start((40, 60))[1].detach()).norm()
    assert 0 < (narrow - wide).norm() < 0.05 * moved


def test_small_moments_of_the_eight_bit_one_stay_wide():
    vector, matrix, _, _ = start((40, 60))
    optimizer = GaLoreAdamW8bit(groups(vector, matrix, rank=8), min_8bit_size=480)
    vector.grad, matrix.grad = torch.ones(5), torch.randn(40, 60)
    optimizer.step()
    assert optimizer.state[vector]["exp_avg"].dtype is torch.float32
    assert optimizer.state[matrix]["inner"]["exp_avg"]["codes"].dtype is torch.int8


# --- what does not work there ------------------------------------------------------------------------------------


@every_class
def test_vectors_in_a_group_with_a_rank_follow_the_plain_optimizer_and_a_warning_says_so_once(cls):
    def run(ranked):
        vectors = [nn.Parameter(torch.arange(3.0) + i) for i in range(2)]
        optimizer = cls([{"params": vectors, **(GROUP if ranked else {})}])
        for _ in range(3):
            for p in vectors:
                p.grad = p.detach() - 1
            optimizer.step()
        return vectors

    with pytest.warns(UserWarning, match="vectors") as caught:
        ranked = run(True)
    assert len(caught) == 1
    assert all(torch.equal(a, b) for a, b in zip(ranked, run(False), strict=True))


@every_class
def test_convolutions_are_matrices(cls):
    p = nn.Parameter(torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    flat = nn.Parameter(p.detach().flatten(1).clone())
    for q in (p, flat):
        optimizer = cls([{"params": [q], **GROUP}])
        for step in range(6):
            q.grad = torch.randn(6, 36, generator=torch.Generator().manual_seed(step)).view_as(q)
            optimizer.step()
    assert torch.equal(p.flatten(1), flat)


@pytest.mark.parametrize("make", [list, lambda ps: [("a", ps[0]), ("b", ps[1])], lambda ps: iter(ps)])
@every_class
def test_bare_tensors_and_named_pairs(cls, make):
    ps = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 5))]
    optimizer = cls(make(ps))
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < 1).all() for p in ps)


def model_and_loss(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6, bias=False)).to(dtype)

    def loss(step):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
        return (model(x) - x[:, :6]).square().mean()

    return model, loss


def split(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [{"params": [p for p in model.parameters() if p.dim() < 2]}, {"params": matrices, **GROUP}]


def steps(optimizer, loss, begin, end, scheduler=None):
    for step in range(begin, end):
        loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise_and_loads_with_weights_only(cls, dtype):
    options = {"min_8bit_size": 0} if cls is GaLoreAdamW8bit else {}
    model, loss = model_and_loss(dtype)
    steps(cls(split(model), **options), loss, 0, 12)
    half, half_loss = model_and_loss(dtype)
    optimizer = cls(split(half), **options)
    steps(optimizer, half_loss, 0, 6)
    buffer = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    other, other_loss = model_and_loss(dtype)
    other.load_state_dict(saved["model"])
    resumed = cls(split(other), **options)
    resumed.load_state_dict(saved["optimizer"])
    steps(resumed, other_loss, 6, 12)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_parameters_that_are_alike_round_each_in_its_own_way():
    twins = [nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = GaLoreAdamW([{"params": twins, "rank": 2, "update_proj_gap": 5, "scale": 1.0, "proj_type": "std"}])
    gradient = torch.randn(8, 8, dtype=torch.bfloat16)
    for twin in twins:
        twin.grad = gradient.clone()
    optimizer.step()
    assert not torch.equal(*twins)


def test_a_checkpoint_of_galore_torch_is_refused_with_what_to_do():
    model, _ = model_and_loss()
    optimizer = GaLoreAdamW(split(model))
    saved = optimizer.state_dict()
    saved["state"] = {1: {"step": 3, "projector": object(), "exp_avg": torch.zeros(3)}}
    with pytest.raises(ValueError, match=r"pickled projector.*start the optimizer\s+anew"):
        optimizer.load_state_dict(saved)


def test_state_of_another_method_is_refused():
    model, loss = model_and_loss()
    adamw = torch.optim.AdamW([{"params": g["params"]} for g in split(model)])
    steps(adamw, loss, 0, 2)
    with pytest.raises(ValueError, match="another method"):
        GaLoreAdamW(split(model)).load_state_dict(adamw.state_dict())
    saved = GaLoreAdamW(split(model))
    steps(saved, loss, 0, 2)
    other = [{**group, **({"rank": 2} if "rank" in group else {})} for group in split(model)]
    GaLoreAdamW(other).load_state_dict(saved.state_dict())  # the saved rank comes with the state
    state = saved.state_dict()
    state["state"][1]["basis"]["right"] = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="another method or shape"):
        GaLoreAdamW(other).load_state_dict(state)


@every_class
def test_per_layer_is_the_ordinary_step_bitwise_under_a_schedule(cls):
    results = []
    for per_layer in (False, True):
        model, loss = model_and_loss()
        options = {"relative_step": False, "lr": 0.01} if cls is GaLoreAdafactor else {"lr": 0.01}
        optimizer = cls(split(model), **options, per_layer=per_layer)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        steps(optimizer, loss, 0, 10, scheduler)
        loss(10).backward()
        assert all((p.grad is None) == per_layer for p in model.parameters())
        optimizer.step()
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_class
def test_galore_torchs_recipe_of_one_optimizer_a_parameter(cls):
    ordinary, loss = model_and_loss()
    steps(
        cls([{"params": list(ordinary.parameters())[:1], **GROUP}, {"params": list(ordinary.parameters())[1:]}]),
        loss,
        0,
        8,
    )
    model, loss = model_and_loss()
    first = next(model.parameters())
    each = {p: cls([{"params": [p], **(GROUP if p is first else {})}]) for p in model.parameters()}

    def hook(p):
        each[p].step()
        each[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for step in range(8):
        loss(step).backward()
    assert all(torch.equal(a, b) for a, b in zip(ordinary.parameters(), model.parameters(), strict=True))


def test_grad_scaler_and_clipping():
    scaled, plain = (model_and_loss() for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for (model, loss), scaler_ in ((scaled, scaler), (plain, torch.amp.GradScaler("cpu", enabled=False))):
        optimizer = GaLoreAdamW(split(model), lr=0.01)
        for step in range(6):
            scaler_.scale(loss(step)).backward()
            scaler_.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler_.step(optimizer)
            scaler_.update()
            optimizer.zero_grad()
    for a, b in zip(scaled[0].parameters(), plain[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_closures_and_parameters_without_gradients():
    model, loss = model_and_loss()
    optimizer = GaLoreAdamW(split(model))
    unused = nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [unused], "rank": 1})

    def closure():
        optimizer.zero_grad()
        value = loss(0)
        value.backward()
        return value

    assert optimizer.step(closure).item() > 0
    assert unused.sum() == 4
    assert optimizer.param_groups[-1]["update_proj_gap"] == 200


# --- bad input -----------------------------------------------------------------------------------------------------


def matrix():
    return nn.Parameter(torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"rank": 2, "update_proj_gap": 0}, "update_proj_gap=0 must be a whole number of at least 1"),
        ({"rank": 2, "proj_type": "short"}, "one of std, reverse_std, left, right, full"),
    ],
)
@every_class
def test_groups_are_checked_when_they_are_given(cls, group, message):
    with pytest.raises(ValueError, match=message):
        cls([{"params": [matrix()], **group}])


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (GaLoreAdamW, {"lr": -1.0}, "lr=-1.0"),
        (GaLoreAdamW, {"betas": (1.0, 0.9)}, "betas"),
        (GaLoreAdamW, {"eps": -1.0}, "eps"),
        (GaLoreAdamW, {"weight_decay": -0.1}, "weight_decay"),
        (GaLoreAdamW8bit, {"amsgrad": True}, "amsgrad=True is not supported; leave it at False"),
        (GaLoreAdamW8bit, {"is_paged": True}, "is_paged"),
        (GaLoreAdamW8bit, {"percentile_clipping": 5}, "percentile_clipping"),
        (GaLoreAdafactor, {"lr": 0.1}, "relative_step"),
        (GaLoreAdafactor, {"relative_step": False}, "needs an lr"),
        (GaLoreAdafactor, {"lr": 0.1, "relative_step": False, "warmup_init": True}, "warmup_init"),
    ],
)
def test_options_are_checked(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([matrix()], **options)


@every_class
def test_a_parameter_given_twice_is_refused(cls):
    p = matrix()
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": [p]}, {"params": [p], "rank": 2}])


@every_class
def test_sparse_gradients_are_refused(cls):
    embedding = nn.Embedding(6, 4, sparse=True)
    optimizer = cls(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


def test_defaults_are_galore_torchs(reference):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pairs = [(ours([matrix()]), theirs([matrix()])) for ours, theirs in reference.items()]
    for ours, theirs in pairs:
        assert ours.defaults == theirs.defaults
    assert GaLoreAdamW8bit([matrix()]).defaults == {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 1e-2,
    }


def test_a_rank_that_reaches_the_short_side_works_on_every_side():
    """``reverse_std`` on a wide matrix whose rank reaches the short side, where galore-torch crashes."""
    for shape, proj_type in itertools.product([(3, 8), (8, 3)], ["std", "reverse_std", "full"]):
        p = nn.Parameter(torch.randn(shape))
        optimizer = GaLoreAdamW([{"params": [p], "rank": 3, "proj_type": proj_type}], lr=0.1)
        before = p.detach().clone()
        p.grad = torch.randn(shape)
        optimizer.step()
        assert not torch.equal(p.detach(), before)
