"""The arguments that every method takes: Adam's constants in all its rules, rates and decay by group of parameters."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
from tests.models import gpt2, llama, mlp, small_method

import lowrank
from lowrank.adapters import LoRA
from lowrank.methods import METHODS, Adapt, Method, Use
from lowrank.methods.groups import groups
from lowrank.optim import SGD, AdamW, Projected, Rule

TAKEN = list(inspect.signature(groups).parameters)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_them_and_its_constants_reach_every_rule_of_adams_kind(name: str) -> None:
    assert list(inspect.signature(METHODS[name]).parameters)[-len(TAKEN) :] == TAKEN
    assert list(METHODS.signature(name).kinds)[-len(TAKEN) :] == TAKEN
    if name == "adafactor":
        with pytest.raises(ValueError, match="betas and eps are for rules of Adam's kind"):
            METHODS[name](betas=(0.5, 0.75), eps=1e-3)
        return
    method = METHODS[name](betas=(0.5, 0.75), eps=1e-3, vector_decay=0.0)
    found = [rule for use in method.rules for rule in rules_in(use.rule) if hasattr(rule, "betas")]
    assert found
    assert {rule.betas for rule in found} == {(0.5, 0.75)}
    assert {rule.eps for rule in found if hasattr(rule, "eps")} == {1e-3}
    assert method.groups.vector_decay == 0.0
    assert METHODS[name]() != method


def rules_in(rule: Any) -> list[Any]:
    """The rule and all in it."""
    inside = [getattr(rule, each.name) for each in fields(rule)]
    return [rule, *(found for each in inside if isinstance(each, Rule) for found in rules_in(each))]


def ratios(model: object, method: Method) -> dict[str, tuple[float, float]]:
    """(learning rate, decay) by parameter, for a rate of 1 and a decay of 0.5."""
    opt = lowrank.apply_(model, method).optimizer(lr=1.0, weight_decay=0.5)  # type: ignore[arg-type]
    return {n: (g["lr"] * g["lr_ratio"], g["decay"]) for g in opt.param_groups for n in g["param_names"]}


@pytest.mark.parametrize("name", ["full", "galore"])
def test_each_group_has_its_rate_and_decay(name: str) -> None:
    told = {"embedding_lr": 2.0, "head_lr": 3.0, "vector_lr": 4.0}
    told |= {"embedding_decay": 0.0, "head_decay": 0.5, "vector_decay": 2.0}
    options = {} if name == "full" else {"rank": 2}
    found = ratios(llama(), METHODS[name](**options, **told))
    assert found["model.embed_tokens.weight"] == (2.0, 0.0)
    assert found["lm_head.weight"] == (3.0, 0.25)
    assert {found[n] for n in found if "norm" in n} == {(4.0, 1.0)}
    assert {found[n] for n in found if "proj" in n} == {(1.0, 0.5)}
    assert ratios(llama(), METHODS[name](**options)).keys() == found.keys()
    biases = ratios(mlp(), lowrank.methods.full(vector_lr=4.0, head_lr=3.0))
    assert biases == {
        n: (3.0 if n == "head.weight" else 4.0 if "weight" not in n or "norm" in n else 1.0, 0.5) for n in biases
    }


def test_a_tied_head_is_of_the_embedding_and_ratios_multiply_a_uses() -> None:
    found = ratios(
        gpt2(), Method(rules=(Use("wte", SGD(), lr=0.5), Use("*", AdamW())), groups=_groups(embedding_lr=3.0))
    )
    assert found["transformer.wte.weight"][0] == 1.5
    assert found["transformer.wpe.weight"][0] == 3.0


def _groups(**told: float) -> lowrank.methods.Groups:
    return lowrank.methods.Groups(**told)


def test_factors_belong_to_no_group() -> None:
    adapt = (Adapt("head", LoRA(rank=1)), Adapt("fc1", LoRA(rank=1)))
    found = ratios(mlp(), Method(adapt=adapt, rest="train", groups=_groups(vector_lr=4.0)))
    assert {v for n, v in found.items() if ".adapters." in n} == {(1.0, 0.0)}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: METHODS["full"](head_lr=0), r"head_lr=0 is a ratio to the run's and must be above 0; freeze="),
        (lambda: METHODS["lora"](embedding_decay=-1), r"embedding_decay=-1 is a ratio .* must be 0 or more"),
        (lambda: METHODS["full"](vector_lr=float("nan")), r"vector_lr=nan is a ratio"),
        (lambda: METHODS["galore"](betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\) must be two numbers"),
        (lambda: groups(eps=1.0)(Method(rules=(Use("*", SGD()),))), "eps are for rules of Adam's kind, and method has"),
        (
            lambda: ratios(gpt2(), METHODS["full"](head_lr=0.1)),
            "head_lr=0.1 has nothing to act on: no output layer apart",
        ),
        (lambda: ratios(gpt2(), small_method("lora", rest="freeze", vector_lr=2.0)), "no norm or bias is trained by"),
        (lambda: ratios(mlp(), METHODS["full"](embedding_decay=0.0)), "no embedding table is trained"),
    ],
)
def test_what_cannot_be_is_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


def test_constants_reach_inner_rules() -> None:
    rule = lowrank.methods.lte_galore("explorers", betas=(0.8, 0.9)).rules[0].rule
    assert isinstance(rule, Projected)
    assert rule.inner == AdamW(betas=(0.8, 0.9))
