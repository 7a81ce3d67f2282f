"""What was loaded and what is new, stacked weights, and weights that are read past their layer."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.models import gpt2, mlp, vit
from torch import Tensor, nn

import lowrank
from lowrank.infra.loaded_parameters import mark_all_but_, origin
from lowrank.methods import Method, Use
from lowrank.optim import AdamW, Projected


def trained(plan: lowrank.Plan) -> set[str]:
    return {row.name for row in plan.rows if row.rule is not None and not row.is_factor}


def used(build: Callable[[], nn.Module]) -> nn.Module:
    """A model as training leaves it, without any mark."""
    torch.manual_seed(1)
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("build", [mlp, gpt2, vit])
def test_a_state_that_was_loaded_is_known_by_its_normalisation(build: Callable[[], nn.Module]) -> None:
    model = build()
    model.load_state_dict(used(build).state_dict())
    plan = lowrank.apply_(model, lowrank.methods.lora("all-linear", rank=2))
    assert trained(plan) == set()
    assert "is not as initialised" in str(plan)
    fresh = lowrank.apply_(build(), lowrank.methods.lora("all-linear", rank=2))
    assert "0 loaded ones are frozen (all its normalisation layers are as initialised)" in str(fresh)


@pytest.mark.parametrize("bias", ["uniform", "zeros"])
def test_a_new_output_layer_on_a_loaded_body_trains(bias: str) -> None:
    model = used(mlp)
    model.head = nn.Linear(model.head.in_features, 3)
    if bias == "zeros":
        nn.init.trunc_normal_(model.head.weight, std=0.02)
        nn.init.zeros_(model.head.bias)
    assert trained(lowrank.apply_(model, lowrank.methods.lora("fc1", rank=2))) == {"head.weight", "head.bias"}


def test_what_is_new_is_named_whole_or_by_its_module() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("head", "head_dist", "fc")})
    model["fc"].weight_scale = nn.Parameter(torch.ones(1))
    loaded = origin(mark_all_but_(model, "head", "fc.weight")).loaded
    names = [name for name, p in model.named_parameters() if id(p) in loaded]
    assert names == ["head_dist.weight", "head_dist.bias", "fc.bias", "fc.weight_scale"]


def test_marks_come_before_what_the_model_tells() -> None:
    model = used(mlp)
    lowrank.mark_loaded_(model, ["fc2.weight"])
    found = origin(model)
    assert found.loaded == {id(model.fc2.weight)}
    assert found.why == "marked by mark_loaded_"
    assert origin(copy.deepcopy(model)).why == "the normalisation layer norm is not as initialised"  # copies lose marks


def test_where_nothing_tells_the_plan_asks() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    with pytest.raises(ValueError, match=r"whether 2.weight and 1 more .* neither .* rest='train' .*mark_loaded_"):
        lowrank.apply_(build(), lowrank.methods.lora("0", rank=2))
    for rest, names in (("train", {"0.bias", "2.weight", "2.bias"}), ("freeze", set())):
        assert trained(lowrank.apply_(build(), lowrank.methods.lora("0", rank=2, rest=rest))) == names
    model = build()
    lowrank.mark_loaded_(model)
    assert trained(lowrank.apply_(model, lowrank.methods.lora("0", rank=2))) == set()
    assert len(trained(lowrank.apply_(build(), lowrank.methods.galore(rank=2)))) == 4  # which trains everything anyway


class Experts(nn.Module):
    """Three matrices in one parameter, used one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x, self.w)


class Stacked(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.head = nn.LayerNorm(8), inner, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.norm(x)))


def test_experts_are_projected_one_by_one() -> None:
    method = Method(rules=(Use("inner", Projected(inner=AdamW(), rank=2)), Use("*", AdamW())), rest="train")
    plan = lowrank.apply_(Stacked(Experts()), method)
    row = next(row for row in plan.rows if row.name == "inner.w")
    assert isinstance(row.rule, Projected)
    assert row.rule.stack
    assert row.rule.inside_shape(row.shape) == (3, 8, 2)
    opt = plan.optimizer(lr=1e-2)
    plan.model(torch.ones(4, 8)).sum().backward()
    opt.step()


def test_where_a_stack_cannot_be_known_the_plan_asks() -> None:
    class Mixed(Experts):
        pass

    Mixed.__name__ = "Mixed"
    method = Method(rules=(Use("inner", Projected(inner=AdamW(), rank=2)), Use("*", AdamW())), rest="train")
    model = Stacked(Mixed())
    with pytest.raises(
        ValueError, match=r"inner.w \(3, 8, 6\) may be a stack .* one matrix \(3, 48\): .*stacked = True"
    ):
        lowrank.apply_(model, method)
    for stacked in (True, False):
        model.inner.stacked = stacked  # type: ignore[assignment]
        rules = {row.name: row.rule for row in lowrank.apply_(copy.deepcopy(model), method).rows}
        assert rules["inner.w"].stack == stacked  # type: ignore[union-attr]


def test_lora_names_the_experts_that_it_leaves_alone() -> None:
    plan = lowrank.apply_(Stacked(Experts()), lowrank.methods.lora("head", rank=1))
    assert "inner.w (3, 8, 6): stacks of matrices, which adapters leave alone" in str(plan)


class Reads(nn.Module):
    """A layer that is called, and whose weight is read once more beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.other = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(F.linear(self.fc(self.norm(x)), self.fc.weight))


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_weight_that_is_also_read_past_its_layer_is_named(per_layer: bool) -> None:
    plan = lowrank.apply_(Reads(), lowrank.methods.lte("fc", rank=2, heads=2, merge_every=2))
    opt = plan.optimizer(lr=1e-2, per_layer=per_layer)
    plan.model(torch.ones(2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"calls fc, which is adapted, and also reads its weight .*exclude_modules"):
        opt.step()


def test_looking_at_a_weight_is_allowed() -> None:
    plan = lowrank.apply_(Reads(), lowrank.methods.lora("other", rank=2))
    opt = plan.optimizer(lr=1e-2)
    assert float(plan.model.other.weight.norm()) > 0
    plan.model(torch.ones(2, 8)).sum().backward()
    opt.step()
    assert plan.model.other.weight is plan.model.other._parameters["weight"]
