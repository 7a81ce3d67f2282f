"""Law 2: merge_and_unload gives the plain model back: its keys, shapes, dtypes and classes, and the same function."""

import copy

import pytest
import torch
from tests.models import SMALL, gpt2, images, llama, mlp, nudge_, output, small_method, tokens, train_text, vit

import lowrank

MODELS = {
    "gpt2": (gpt2, tokens),
    "gpt2 untied": (lambda: gpt2(tied=False), tokens),
    "llama": (llama, tokens),
    "vit": (vit, images),
}


def signature(model: torch.nn.Module) -> dict[str, object]:
    kinds = {name: type(module) for name, module in model.named_modules()}
    return kinds | {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("place", MODELS)
@pytest.mark.parametrize("name", lowrank.METHODS)
def test_plain_again(name: str, place: str) -> None:
    build, data = MODELS[place]
    model, x = build(), data()
    before, ties = signature(model), len(list(model.parameters()))
    lowrank.apply_(model, small_method(name, **({"target_modules": "head"} if name == "linear_probe" else {})))
    nudge_(model)
    expected = output(model.eval(), x)
    assert lowrank.merge_and_unload(model) is model
    assert signature(model) == before
    assert len(list(model.parameters())) == ties
    assert not any("adapters" in name for name, _ in model.named_modules())
    torch.testing.assert_close(output(model, x), expected, atol=1e-4, rtol=1e-4)
    plain = build()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(output(plain.eval(), x), output(model, x))


@pytest.mark.parametrize("ties", ["adapt", "leave", "untie"])
def test_tied_head(ties: str) -> None:
    model = gpt2()
    plan = lowrank.apply_(
        model, lowrank.methods.lte(("attention", "lm_head"), rank=2, heads=2, merge_every=2, ties=ties)
    )
    train_text(model, plan.optimizer(lr=1e-2), 5)
    expected = output(model.eval(), tokens())
    lowrank.merge_and_unload(model)
    torch.testing.assert_close(output(model, tokens()), expected, atol=1e-5, rtol=1e-5)
    assert (model.lm_head.weight is model.transformer.wte.weight) == (ties != "untie")


def test_mode_freezing_and_dtype_survive() -> None:
    model = mlp(torch.bfloat16).eval()
    model.fc1.bias.requires_grad_(False)
    lowrank.apply_(model, lowrank.methods.lora("all-linear", rank=2, rest="train"))
    lowrank.merge_and_unload(model)
    assert not any(module.training for module in model.modules())
    assert not model.fc1.bias.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_again_after_unloading() -> None:
    """A model can take the next method after the first is folded in."""
    model = gpt2()
    for name in ("lte", "dora", "pissa", "relora"):
        lowrank.merge_and_unload(model.requires_grad_(True))
        plan = lowrank.apply_(model, small_method(name))
        before = output(model.eval(), tokens())
        losses = train_text(model.train(), plan.optimizer(lr=2e-3), 6)
        assert sum(losses[-2:]) < sum(losses[:2])
        assert not torch.equal(output(model.eval(), tokens()), before)


def test_unloading_a_copy_leaves_the_original() -> None:
    model = gpt2()
    lowrank.apply_(model, small_method("lte"))
    nudge_(model)
    expected = output(model.eval(), tokens())
    plain = lowrank.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(output(plain, tokens()), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(output(model, tokens()), expected)
    assert SMALL["rank"] == model.transformer.h[0].attn.c_attn.adapters["all"].A.shape[1]


def test_of_a_plain_model_does_nothing() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    lowrank.merge_and_unload(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
