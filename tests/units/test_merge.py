"""When adapters fold into the weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.models import features, gpt2, mlp, nudge_, small_method, train_text

import lowrank
from lowrank.adapters import LoRA, Merge, merge_adapters_
from lowrank.methods import Adapt, Method


def test_due() -> None:
    assert [n for n in range(10) if Merge(3).due(n)] == [3, 6, 9]
    assert [n for n in range(3) if Merge(1).due(n)] == [1, 2]


@pytest.mark.parametrize("every", [0, -2, 1.5, True])
def test_interval_must_be_whole(every: object) -> None:
    with pytest.raises(ValueError, match=r"merge_every=.* must be a whole number of at least 1"):
        Merge(every)  # type: ignore[arg-type]


@pytest.mark.parametrize("forget", [-0.1, 1.1])
def test_forget_is_a_share(forget: float) -> None:
    with pytest.raises(ValueError, match=r"forget=.* must lie in \[0, 1\]"):
        Merge(3, forget=forget)


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_optimizer_merges_when_it_is_due(per_layer: bool) -> None:
    model = gpt2()
    plan = lowrank.apply_(model, small_method("lte", merge_every=2))
    opt = plan.optimizer(lr=1e-2, per_layer=per_layer)
    adapter, counts = next(iter(plan.adapters.values())), []
    for step in range(5):
        train_text(model, opt, 1, first=step)
        counts.append(int(adapter.merges))
    assert counts == [0, 1, 1, 2, 2]


def test_manual_merging() -> None:
    models = [gpt2(), gpt2()]
    for model, merge in zip(models, ("auto", "manual"), strict=True):
        plan = lowrank.apply_(model, small_method("relora", merge_every=2))
        opt = plan.optimizer(lr=1e-2, merge=merge)
        for step in range(5):
            train_text(model, opt, 1, first=step)
            if merge == "manual" and opt.steps % 2 == 0:
                lowrank.merge_(plan, opt)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_merging_forgets_as_the_method_says() -> None:
    for forget in (0.0, 0.5, 1.0):
        model = gpt2()
        plan = lowrank.apply_(model, small_method("lte", forget=forget, merge_every=3))
        opt = plan.optimizer(lr=1e-2)
        train_text(model, opt, 3)
        factors = [p for adapter in plan.adapters.values() for p in adapter.parameters()]
        zeros = sum(int((opt.state[p]["exp_avg_sq"] == 0).sum()) for p in factors) / sum(p.numel() for p in factors)
        assert zeros == pytest.approx(forget, abs=0.05)
        assert {float(opt.state[p]["step"]) for p in factors} == ({0.0} if forget == 1.0 else {3.0})
        rest = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in factors)]
        assert {float(opt.state[p]["step"]) for p in rest} == {3.0}


def test_values_that_are_not_finite_are_not_merged() -> None:
    model = mlp()
    lowrank.apply_(model, lowrank.methods.lora("fc1", rank=2))
    before = model.fc1.weight.detach().clone()
    with torch.no_grad():
        model.fc1.adapters["all"].B[0, 3, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite.*smaller learning rate"):
        merge_adapters_(model)
    assert torch.equal(model.fc1.weight, before)


def test_merging_is_rounded_without_bias() -> None:
    """bfloat16 weights: the mean of many merges of the same change is that change."""
    model = mlp(torch.bfloat16)
    lowrank.apply_(model, lowrank.methods.lora("fc2", rank=2, alpha=2))
    start = model.fc2.weight.detach().clone()
    nudge_(model, 0.02)
    exact = model.fc2.adapters["all"].merged(start.float())
    factors = {key: p.detach().clone() for key, p in model.fc2.adapters.named_parameters()}
    rounded = []
    for _ in range(400):
        with torch.no_grad():
            model.fc2.weight.copy_(start)
            for key, p in model.fc2.adapters.named_parameters():
                p.copy_(factors[key])
        merge_adapters_(model)
        rounded.append(model.fc2.weight.detach().float())
    samples = torch.stack(rounded)
    error = (samples.mean(dim=0) - exact) / (samples.std(dim=0) / 20 + 1e-7)
    assert float(error.abs().mean()) < 1.5
    assert float((samples.mean(dim=0) - exact).abs().max()) < float((exact.bfloat16() - exact).abs().max())


# --- the outer optimizer ---------------------------------------------------------------------------------------------


def test_the_outer_step_is_nesterovs_on_the_merged_change() -> None:
    """Against torch's own SGD on the outer gradient W − merged(W), as DiLoCo has it; restarted or kept."""
    for keep in (True, False):
        model = mlp(torch.float64)
        method = Method(
            adapt=(Adapt("fc1,fc2", LoRA(rank=2, heads=2, split=True)),),
            merge=Merge(3, keep=keep, outer_lr=0.7, outer_momentum=0.9),
            rest="freeze",
        )
        plan = lowrank.apply_(model, method)
        opt = plan.optimizer(lr=0.05, merge="manual")
        theirs = [
            model.fc1.weight.detach().clone().requires_grad_(),
            model.fc2.weight.detach().clone().requires_grad_(),
        ]
        outer = torch.optim.SGD(theirs, lr=0.7, momentum=0.9, nesterov=True)
        for step in range(9):
            F.cross_entropy(model(features(dtype=torch.float64, seed=step)), torch.arange(6) % 4).backward()
            opt.step()
            opt.zero_grad()
            if step % 3 == 2:
                for W, adapter in zip(theirs, plan.adapters.values(), strict=True):
                    W.grad = -adapter.delta()  # type: ignore[operator]
                outer.step()
                lowrank.merge_(plan, opt)
        for W, layer in zip(theirs, (model.fc1, model.fc2), strict=True):
            torch.testing.assert_close(layer.weight, W.detach(), rtol=1e-12, atol=1e-12)


def test_the_outer_state_is_counted_and_saved() -> None:
    plain, outer = (lowrank.methods.lte("fc1", merge_every=2, outer_momentum=m) for m in (0.0, 0.9))
    model = mlp()
    before, plan = lowrank.apply_(mlp(), plain), lowrank.apply_(model, outer)
    assert plan.kept_bytes - before.kept_bytes == 4 * 10 * 14
    assert plan.kept_bytes == sum(b.numel() * b.element_size() for a in plan.adapters.values() for b in a.buffers())
    assert model.state_dict()["fc1.adapters.all.momentum"].shape == (14, 10)


def test_unloading_takes_no_outer_step() -> None:
    model = mlp(torch.float64)
    plan = lowrank.apply_(model, lowrank.methods.lte("fc1", merge_every=2, outer_lr=0.5, outer_momentum=0.9))
    nudge_(model)
    x = features(dtype=torch.float64)
    expected = model.eval()(x)
    assert plan.adapters
    torch.testing.assert_close(lowrank.merge_and_unload(model)(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outer_lr": 0.0}, "outer_lr=0.0 must be above 0"),
        ({"outer_momentum": 1.0}, "outer_momentum=1.0 must lie in"),
        ({"exchange": "int4"}, "exchange='int4' is unknown; it is one of float32, bfloat16, int8, 2bit, topk3, topk1"),
        ({"fragments": 0}, "fragments=0"),
        ({"fragments": 11}, "merge_every=10 has no more: use at most 10 fragments"),
        ({"fragments": 2, "weigh": "tokens"}, "use weigh='equal', or fragments=1"),
        ({"fragments": 4, "rest_every": 3}, "rest_every=3 has fewer steps than fragments=4"),
        ({"exchange": "2bit", "keep": False}, "keep=False restarts them: use keep=True, or exchange='int8'"),
        ({"weigh": "rows"}, "weigh='rows' is unknown; it is one of equal, tokens, steps, seconds"),
    ],
)
def test_options_of_a_merge_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowrank.methods.lte(**options)  # type: ignore[arg-type]


def test_fragments_and_a_basis_that_heads_share_are_refused() -> None:
    explorers = lowrank.methods.lte_galore("explorers", merge_every=4)
    assert explorers.merge is not None
    with pytest.raises(ValueError, match=r"fragments=2 merge at different steps, .* use fragments=1"):
        replace(explorers, merge=replace(explorers.merge, fragments=2))
