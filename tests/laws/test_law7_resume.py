"""Law 7: training 10 steps is training 5, saving, stopping, loading into a fresh model, and training 5: bitwise."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import gpt2, mlp, small_method, text_loss, tokens, train_text
from torch import nn

import lowrank
from lowrank.infra.checkpoint_tensors import flatten, pack, unflatten, unpack
from lowrank.methods import Method, Use
from lowrank.optim.optimizer import Optimizer
from lowrank.optim.rules import SGD, AdamW
from lowrank.optim.state import leaves

Saved = dict[str, Any]


def by_torch(saved: Saved, folder: Path) -> Saved:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def by_safetensors(saved: Saved, folder: Path) -> Saved:
    tree, tensors = flatten(saved)
    packed, notes = pack(tensors)
    save_file(packed, folder / "state.safetensors")
    return unflatten(tree, unpack(load_file(folder / "state.safetensors"), notes))


def bound(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Optimizer]:
    model = gpt2().to(dtype)
    plan = lowrank.apply_(model, small_method(name), seed=2)
    return model, plan.optimizer(lr=5e-3, weight_decay=0.1, **options)


@pytest.mark.parametrize("way", [by_torch, by_safetensors])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", lowrank.METHODS)
def test_stop_and_resume(name: str, dtype: torch.dtype, way: Callable[[Saved, Path], Saved], tmp_path: Path) -> None:
    """Merges fall before, at and after the stop (every 3rd step), refreshes at every 2nd."""
    whole, opt = bound(name, dtype)
    expected = train_text(whole, opt, 10)
    first, opt_first = bound(name, dtype)
    losses = train_text(first, opt_first, 5)
    saved = way({"model": first.state_dict(), "optimizer": opt_first.state_dict()}, tmp_path)
    del first, opt_first
    second, opt_second = bound(name, dtype)
    second.load_state_dict(saved["model"])
    opt_second.load_state_dict(saved["optimizer"])
    losses += train_text(second, opt_second, 5, first=5)
    assert losses == expected
    for (key, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert_same_state(opt.state_dict(), opt_second.state_dict())


@pytest.mark.parametrize("name", lowrank.METHODS)
def test_per_layer_resumes_too(name: str) -> None:
    whole, opt = bound(name, per_layer=True)
    expected = train_text(whole, opt, 8)
    first, opt_first = bound(name, per_layer=True)
    train_text(first, opt_first, 4)
    second, opt_second = bound(name, per_layer=True)
    second.load_state_dict(first.state_dict())
    opt_second.load_state_dict(opt_first.state_dict())
    assert train_text(second, opt_second, 4, first=4) == expected[4:]


def assert_same_state(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype is b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}.{i}")
    else:
        assert a == b, where


@pytest.mark.parametrize("name", lowrank.METHODS)
def test_dtypes_are_kept(name: str) -> None:
    """torch's own load casts every state to its parameter's dtype; a moment in bfloat16 would be another optimizer."""
    model, opt = bound(name, torch.bfloat16)
    train_text(model, opt, 3)
    before = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(copy.deepcopy(before))
    assert_same_state(opt.state_dict(), before)


def test_saved_state_is_the_optimizers_own_in_torchs_form() -> None:
    """Tensors without a copy, as torch's (a checkpoint would double them on the device), in dicts of the reader's."""
    model, opt = bound("lte")
    train_text(model, opt, 2)
    saved = opt.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert [i for group in saved["param_groups"] for i in group["params"]] == sorted(saved["state"])
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    before = copy.deepcopy(saved["state"])
    held = {p: {path for path, _ in leaves(state)} for p, state in opt.state.items()}
    for (p, state), theirs in zip(opt.state.items(), saved["state"].values(), strict=True):
        assert all(t is dict(leaves(theirs))[path] for path, t in leaves(state))
        theirs.clear()
        assert {path for path, _ in leaves(opt.state[p])} == held[p]
    assert_same_state(opt.state_dict()["state"], before)


def stepped(rule: object = AdamW(), **sizes: int) -> Optimizer:
    model = mlp(**sizes)
    opt = lowrank.apply_(model, Method(rules=(Use("*", rule),), rest="train")).optimizer(lr=0.1)
    model(torch.ones(2, 10)).sum().backward()
    opt.step()
    return opt


def without(saved: Saved) -> None:
    del saved["state"][5]["exp_avg_sq"]


def with_one_more(saved: Saved) -> None:
    saved["param_groups"][0]["param_names"].append("extra.weight")
    saved["param_groups"][0]["params"].append(7)
    saved["state"][7] = saved["state"][0]


def in_double(saved: Saved) -> None:
    saved["state"][2]["exp_avg"] = saved["state"][2]["exp_avg"].double()


def renamed(saved: Saved) -> None:
    saved["param_groups"][0]["param_names"][0] = "stem.weight"


def with_two_groups(saved: Saved) -> None:
    saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))


@pytest.mark.parametrize(
    ("other", "change", "words"),
    [
        (lambda: stepped(AdamW(eps=1e-5)), None, "is of rule AdamW.*eps=1e-05.*optimizer's is"),
        (lambda: stepped(SGD(momentum=0.9)), None, "is of rule SGD"),
        (lambda: stepped(hidden=9), None, r"exp_avg of 'fc1.weight' is torch.float32 \(9, 10\)"),
        (stepped, in_double, "exp_avg of 'fc2.weight' is torch.float64"),
        (stepped, renamed, "no parameter 'fc1.weight'"),
        (stepped, without, r"of 'head.weight' holds \['exp_avg', 'step'\]"),
        (stepped, with_two_groups, "has 2 parameter groups, the optimizer 1"),
        (stepped, with_one_more, "has 8 parameters, the optimizer 7"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(
    other: Callable[[], Optimizer], change: Callable[[Saved], None] | None, words: str
) -> None:
    opt, saved = stepped(), other().state_dict()
    if change is not None:
        change(saved)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(saved)
    assert_same_state(opt.state_dict(), before)


def test_matched_by_name_and_not_by_order() -> None:
    model, opt = bound("lora")
    train_text(model, opt, 2)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        group["params"].reverse()
        group["param_names"].reverse()
    other, opt_other = bound("lora")
    other.load_state_dict(model.state_dict())
    opt_other.load_state_dict(saved)
    assert train_text(other, opt_other, 2) == train_text(model, opt, 2)


@pytest.mark.parametrize("steps", [2, 5], ids=["before a merge", "after a merge"])
@pytest.mark.parametrize("name", ["lte", "pissa", "relora"])
def test_kept_factors_are_subtracted_again(name: str, steps: int) -> None:
    """The state dict alone tells whether kept factors are to be subtracted."""
    model, opt = bound(name)
    train_text(model, opt, steps)
    fresh, _ = bound(name)
    fresh.load_state_dict(model.state_dict())
    for training in (False, True):
        assert torch.equal(text_loss(fresh.train(training), tokens()), text_loss(model.train(training), tokens()))


def test_a_merged_pissa_that_restarts_subtracts_no_more() -> None:
    model = gpt2()
    plan = lowrank.apply_(model, small_method("pissa"))
    train_text(model, plan.optimizer(lr=1e-2), 2)
    lowrank.merge_(plan)
    train_text(model, plan.optimizer(lr=1e-2), 2)
    fresh = gpt2()
    lowrank.apply_(fresh, small_method("pissa"))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(text_loss(fresh, tokens()), text_loss(model, tokens()))
