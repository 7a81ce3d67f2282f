"""Law 10: every method lowers the loss, is deterministic under a seed, keeps dtypes, and leaves what is frozen."""

import pytest
import torch
from tests.models import PROBES, gpt2, images, llama, output, small_method, text_loss, tokens, train_text, vit

import lowrank
from lowrank.adapters.layers import adapted_layers

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def unhurried(name: str, **options: object) -> lowrank.Method:
    """The method with merges ten steps apart: three leave a restarted adapter no time to learn."""
    return small_method(name, **({"merge_every": 10} if small_method(name).merge else {}), **options)


def held_out(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return (text_loss(model.eval(), tokens(seed=0)) + text_loss(model, tokens(seed=1))).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", lowrank.METHODS)
def test_lowers_the_loss(name: str, dtype: torch.dtype) -> None:
    model = gpt2(tied=name != "linear_probe").to(dtype)
    before = held_out(model)
    opt = lowrank.apply_(model, unhurried(name)).optimizer(lr=5e-3)
    train_text(model.train(), opt, 24)
    assert held_out(model) < before - 0.05
    assert all(t.isfinite().all() for t in model.state_dict().values() if t.is_floating_point())


@pytest.mark.parametrize("name", lowrank.METHODS)
def test_lowers_the_loss_of_the_targets_alone(name: str) -> None:
    """With everything else frozen: what learns is the adapters, or the projected matrices."""
    if name in ("full", "full_8bit", "frozen", "adafactor"):
        pytest.skip("trains the rest only")
    model = gpt2(tied=False)
    before = held_out(model)
    options = {} if name in PROBES else {"rest": "freeze"}
    opt = lowrank.apply_(model, unhurried(name, **options)).optimizer(lr=1e-2)
    train_text(model.train(), opt, 20)
    assert held_out(model) < before


@pytest.mark.parametrize("name", lowrank.METHODS)
def test_deterministic_under_a_seed(name: str) -> None:
    def run(seed: int) -> list[float]:
        torch.manual_seed(torch.initial_seed() + 1)  # the global stream must not matter
        model = gpt2(seed=4).to(torch.bfloat16)
        opt = lowrank.apply_(model, small_method(name), seed=seed).optimizer(lr=1e-2)
        return train_text(model, opt, 6)

    assert run(3) == run(3)
    assert run(3) != run(4)  # at least the rounding is drawn anew


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", lowrank.METHODS)
def test_frozen_stay_and_dtypes_too(name: str, dtype: torch.dtype) -> None:
    model = gpt2().to(dtype)
    model.transformer.ln_f.bias.requires_grad_(False)
    merges = small_method(name).merge is not None
    plan = lowrank.apply_(model, small_method(name, **({} if name in PROBES else {"freeze": "*.ln_1.*"})))
    dtypes = {key: t.dtype for key, t in model.state_dict().items()}
    frozen = {row.name: row.why for row in plan.rows if row.rule is None}
    assert "transformer.ln_f.bias" in frozen
    assert "transformer.h.0.ln_1.weight" in frozen
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    train_text(model, plan.optimizer(lr=1e-2, weight_decay=0.1), 4)
    assert {key: t.dtype for key, t in model.state_dict().items()} == dtypes
    for key, p in model.named_parameters():
        moved = key not in frozen or (merges and frozen[key] == "under an adapter")
        assert torch.equal(p, before[key]) != moved, key


@pytest.mark.parametrize("name", lowrank.METHODS)
def test_other_architectures(name: str) -> None:
    options = {"target_modules": "head"} if name == "linear_probe" else {}
    model = llama()
    losses = train_text(model, lowrank.apply_(model, unhurried(name, **options)).optimizer(lr=5e-3), 8)
    assert sum(losses[-2:]) < sum(losses[:2])
    model = vit()
    opt, losses = lowrank.apply_(model, unhurried(name, **options)).optimizer(lr=5e-3), []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(output(model, images(6)), torch.arange(6) % 3)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_decay_spares_factors_unless_named() -> None:
    """Under LTE what decays on a factor would be merged into W."""
    model = gpt2()
    plan = lowrank.apply_(model, small_method("lora"))
    decays = {
        name: group["decay"]
        for group in plan.optimizer(lr=1.0, weight_decay=0.5).param_groups
        for name in group["param_names"]
    }
    assert all(decay == (0.0 if ".adapters." in name else 0.5) for name, decay in decays.items())
    assert decays["transformer.h.0.attn.c_attn.bias"] == 0.5
    named = lowrank.Method(
        adapt=small_method("lora").adapt,
        rules=(
            lowrank.Use("*.adapters.*", lowrank.optim.AdamW()),
            lowrank.Use("*", lowrank.optim.AdamW(), decay=False),
        ),
        rest="train",
    )
    opt = lowrank.apply_(gpt2(), named).optimizer(lr=1.0, weight_decay=0.5)
    decays = {name: group["decay"] for group in opt.param_groups for name in group["param_names"]}
    assert all(decay == (0.5 if ".adapters." in name else 0.0) for name, decay in decays.items())


@pytest.mark.parametrize("keep", [True, False])
def test_zero_gradients_move_nothing(keep: bool) -> None:
    """50 steps of zero gradients with decay leave the merged matrices in place (in LTE's own code they drift)."""
    model = gpt2()
    plan = lowrank.apply_(model, small_method("lte", keep=keep, rest="freeze", merge_every=5))
    train_text(model, plan.optimizer(lr=1e-2), 4)
    lowrank.merge_(plan)
    weights = [layer.weight.detach().clone() for _, layer in adapted_layers(model)]
    opt = plan.optimizer(lr=1e-2, weight_decay=0.1)
    for _ in range(50):
        (0 * text_loss(model, tokens())).backward()
        opt.step()
        opt.zero_grad()
    for before, (_, layer) in zip(weights, adapted_layers(model), strict=True):
        torch.testing.assert_close(layer.weight, before, atol=1e-6, rtol=1e-6)
