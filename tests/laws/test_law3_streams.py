"""Law 3, within a process: new factors depend on (seed, layer, head, merge count), a merge conserves the mean model."""

import pytest
import torch
from tests.models import gpt2, mlp, nudge_, output, small_method, tokens

import lowrank
from lowrank.adapters import LoRA, Site, merge_adapters_


def factor(
    seed: int = 0, name: str = "h.0.attn", heads: int = 3, init: str = "orthogonal", merges: int = 0
) -> torch.Tensor:
    adapter = LoRA(rank=2, heads=heads, init=init)(Site(name, torch.zeros(6, 5), seed))
    for _ in range(merges):
        adapter.settle_()
    return adapter.A.detach()


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "reference"])
def test_new_factors_depend_on_what_they_are_for(init: str) -> None:
    torch.manual_seed(1)
    first = factor(init=init)
    torch.manual_seed(2)
    assert torch.equal(factor(init=init), first)  # not on the global stream
    assert torch.equal(factor(init=init, heads=5)[:3], first)  # not on how many heads there are
    assert torch.equal(factor(init=init, merges=2), factor(init=init, merges=2))
    others = [factor(seed=1, init=init), factor(name="h.1.attn", init=init), factor(merges=1, init=init)]
    assert not any(torch.equal(other, first) for other in others)
    assert not any(torch.equal(first[0], head) for head in first[1:])


def test_global_stream_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    model = mlp(seed=5)
    torch.manual_seed(5)
    lowrank.apply_(model, small_method("relora", target_modules="fc2"))
    merge_adapters_(model)
    assert torch.equal(torch.randn(3), expected)


def test_order_of_layers_does_not_matter() -> None:
    one, two = mlp(), mlp()
    lowrank.apply_(one, lowrank.methods.lora(("fc1", "fc2"), rank=2), seed=4)
    lowrank.apply_(two, lowrank.methods.lora("fc2", rank=2), seed=4)
    assert torch.equal(one.fc2.adapters["all"].A, two.fc2.adapters["all"].A)


@pytest.mark.parametrize("keep", [False, True])
def test_restart_draws_anew_and_keeping_goes_on(keep: bool) -> None:
    model = mlp()
    lowrank.apply_(model, lowrank.methods.lte("all-linear", rank=2, heads=2, merge_every=5, keep=keep))
    nudge_(model)
    adapter = model.fc1.adapters["all"]
    A, B = adapter.A.clone(), adapter.B.clone()
    merge_adapters_(model)
    assert torch.equal(adapter.A, A) == keep
    assert torch.equal(adapter.B, B) == keep
    if not keep:
        assert not adapter.B.any()


@pytest.mark.parametrize("name", [name for name in lowrank.METHODS if small_method(name).adapt])
def test_merge_conserves_the_mean_model(name: str) -> None:
    model = gpt2()
    plan = lowrank.apply_(model, small_method(name))
    for round_ in range(3):
        nudge_(model, seed=round_)
        before = output(model.eval(), tokens())
        lowrank.merge_(plan)
        torch.testing.assert_close(output(model, tokens()), before, atol=5e-5, rtol=1e-4)


def test_bfloat16_merges_do_not_drift() -> None:
    """200 small merges into bfloat16 weights add up as in float32 (rounded to the nearest, most of each is lost)."""
    exact, narrow = mlp(), mlp(torch.bfloat16)
    exact.load_state_dict(narrow.state_dict())
    start = exact.fc2.weight.detach().clone()
    for model in (exact, narrow):
        lowrank.apply_(model, lowrank.methods.lora("fc2", rank=2))
    for _ in range(200):
        for model in (exact, narrow):
            adapter = model.fc2.adapters["all"]
            with torch.no_grad():
                adapter.A.fill_(1.0)
                adapter.B.fill_(1e-5)
            merge_adapters_(model)
    change = (exact.fc2.weight - start).mean()
    assert (narrow.fc2.weight.float() - start).mean() == pytest.approx(change.item(), rel=0.05)


@pytest.mark.parametrize(
    "make", [lowrank.adapters.Dense(), lowrank.adapters.DoRA(LoRA(rank=1)), LoRA(rank=1)], ids=repr
)
def test_merging_noise_differs(make: object) -> None:
    """Between merges, layers and seeds: were it the same each time, what is rounded down once would be for ever."""
    seen = []
    for seed in (0, 1):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).to(torch.bfloat16)
        lowrank.apply_(model, lowrank.Method(adapt=(lowrank.Adapt("*", make),), rest="train"), seed=seed)
        for _ in range(3):
            for layer in model:
                set_change_(layer, 0.004)
            merge_adapters_(model)
            seen += [layer.weight.detach().clone() for layer in model]
    assert all(0 < (W != 1).float().mean() < 1 for W in seen)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@torch.no_grad()
def set_change_(layer: lowrank.adapters.AdaptedLinear, change: float) -> None:
    """Make the weight 1 everywhere, and the adapter's change to it ``change`` everywhere."""
    layer.weight.fill_(1.0)
    values = {"D": change, "A": 1.0, "B": change, "inner.A": 1.0, "inner.B": 0.0, "magnitude": 8**0.5 * (1 + change)}
    for name, p in layer.adapters["all"].named_parameters():
        p.fill_(values[name])
