"""Law 3, within a process: new factors depend on (seed, layer, head, merge count), a merge conserves the mean model."""

import pytest
import torch
from tests.models import mlp, nudge_, small_method

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
