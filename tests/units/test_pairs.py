"""Rules that see A and B of an adapter together: on the product, as two rules of their own, saved, refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.models import features, mlp
from torch import Tensor, nn

import lowrank
from lowrank.methods import Adapt, Method, Use
from lowrank.optim import SGD, AdamW, LoraMuon, LoraRite, Optimizer, PairRule, Rule, State
from lowrank.optim.pairs import Pair

FACTORS = ("*.adapters.*.A", "*.adapters.*.B")


@dataclass(frozen=True)
class Scaled(PairRule):
    """ScaledGD (arXiv 2402.02347): each factor's gradient, by the inverse Gram matrix of the other."""

    def init(self, factors: Pair) -> State:
        return {}

    def update(self, factors: Pair, grads: Pair, state: State) -> tuple[Pair, Tensor | float]:
        (A, B), (a, b) = factors, grads
        return (torch.linalg.solve(B.mT @ B, a), torch.linalg.solve(A @ A.mT, b, left=False)), 1.0


@dataclass(frozen=True)
class Each(PairRule):
    """A rule for one parameter, on each factor by itself."""

    rule: Rule = AdamW()  # noqa: RUF009

    def init(self, factors: Pair) -> State:
        return {name: self.rule.init(p) for name, p in zip("AB", factors, strict=True)}

    def update(self, factors: Pair, grads: Pair, state: State) -> tuple[Pair, Tensor | float]:
        (u, c), (v, d) = (self.rule.update(g, state[name]) for name, g in zip("AB", grads, strict=True))  # type: ignore[arg-type]
        return (u * c, v * d), 1.0


def bound(rule: object, dtype: torch.dtype = torch.float32, **options: object) -> Any:
    model = mlp(dtype)
    adapt = (Adapt("fc1,fc2", lowrank.adapters.LoRA(rank=2, heads=2)),)
    rules = (Use(FACTORS, rule), Use("*", SGD()))  # type: ignore[arg-type]
    plan = lowrank.apply_(model, Method(adapt=adapt, rules=rules, rest="train"))
    return model, plan, plan.optimizer(lr=0.02, weight_decay=0.1, **options)  # type: ignore[arg-type]


def train(model: nn.Module, opt: Optimizer, begin: int, end: int) -> None:
    for step in range(begin, end):
        x = features(6, seed=step).to(next(model.parameters()).dtype)
        F.cross_entropy(model(x).float(), torch.arange(6) % 4).backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("rule", [Scaled(), LoraRite(), LoraMuon()], ids=repr)
def test_a_step_on_the_product_does_not_depend_on_how_it_is_split(rule: PairRule) -> None:
    A, B, T = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((3, 7), (5, 3), (5, 7)))
    C = torch.randn(2, 3, 3, dtype=torch.float64)
    products = []
    for a, b in ((A, B), (C @ A, B @ torch.linalg.inv(C))):
        factors = [nn.Parameter(a.clone()), nn.Parameter(b.clone())]
        opt = Optimizer([{"params": factors, "rule": rule, "lr": 0.3}])
        for _ in range(4):
            (factors[1] @ factors[0] - T).square().sum().backward()
            opt.step()
            opt.zero_grad()
        products.append((factors[1] @ factors[0]).detach())
    torch.testing.assert_close(*products, rtol=1e-5, atol=1e-5)
    assert (products[0] - B @ A).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_adamw_on_each_factor_is_adamw(dtype: torch.dtype, clip: float | None) -> None:
    """Through apply_ and the optimizer: schedules, decay, clipping, stochastic rounding and all."""
    ours, plan, opt = bound(Each(), dtype, clip_per_layer=clip)
    theirs, other, reference = bound(AdamW(), dtype, clip_per_layer=clip)
    train(ours, opt, 0, 6)
    train(theirs, reference, 0, 6)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5 if dtype is torch.float32 else 2e-2, atol=1e-6, msg=name)
    assert opt.state_bytes() == plan.state_bytes == other.state_bytes
    assert "Each(rule=AdamW" in str(plan)


def test_it_resumes_bitwise_and_begins_anew() -> None:
    whole, _, opt = bound(Each())
    train(whole, opt, 0, 8)
    first, _, half = bound(Each())
    train(first, half, 0, 4)
    second, _, resumed = bound(Each())
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    train(second, resumed, 4, 8)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))
    A, B = (p for name, p in second.named_parameters() if name.startswith("fc1.adapters"))
    with pytest.raises(ValueError, match="cannot be forgotten"):
        resumed.forget([A, B], 0.5)
    resumed.forget([A, B], 1.0)
    assert not resumed.state[A]["B"]["exp_avg"].any()


@pytest.mark.parametrize("missing", [None, "A", "B"])
def test_per_layer_is_the_ordinary_step(missing: str | None) -> None:
    """Bitwise, also where one factor has no gradient and its partner waits for it to the end."""
    models = []
    for per_layer in (False, True):
        model, _, opt = bound(Each(), per_layer=per_layer)
        for step in range(4):
            for name, p in model.named_parameters():
                if missing and name.endswith(missing):
                    p.requires_grad_(step % 2 == 0)
            train(model, opt, step, step + 1)
        models.append(model)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize(
    ("rules", "options", "words"),
    [
        ((Use("*", Scaled()),), {}, r"fc1.bias is none of them: name both factors"),
        ((Use(FACTORS[0], Scaled()), Use("*", AdamW())), {}, "must follow one Use"),
    ],
)
def test_refusals(rules: tuple[Use, ...], options: dict[str, bool], words: str) -> None:
    adapt = (Adapt("fc1,fc2", lowrank.adapters.LoRA(rank=2)),)
    with pytest.raises(ValueError, match=words):
        lowrank.apply_(mlp(), Method(adapt=adapt, rules=rules, rest="train")).optimizer(**options)  # type: ignore[arg-type]


def test_the_optimizer_wants_pairs() -> None:
    A, B = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(4, 2))
    for params in ([B, A], [A], [A, B, A.clone().detach().requires_grad_()]):
        with pytest.raises(ValueError, match="one after the other"):
            Optimizer([{"params": params, "rule": Scaled()}])


NO_RULES = {
    "none": None,
    "a class": AdamW,
    "no subclass": type("Mine", (), {"init": 0, "update": 0})(),
    "a word": "adamw",
}


@pytest.mark.parametrize("rule", NO_RULES.values(), ids=NO_RULES)
def test_what_is_no_rule(rule: object) -> None:
    for make in (
        lambda: Use("*", rule),  # type: ignore[arg-type]
        lambda: lowrank.optim.Projected(inner=rule),  # type: ignore[arg-type]
        lambda: Optimizer([{"params": [nn.Parameter(torch.ones(2))], "rule": rule}]),
    ):
        with pytest.raises(ValueError, match=r"needs a rule, such as .*derived from lowrank\.optim\.Rule"):
            make()
