"""The catalogue: the papers' defaults, one name for one thing, methods as values."""

import inspect
import pickle
import re

import pytest
import torch
from tests.models import gpt2, small_method

import lowrank
from lowrank.adapters import DoRA, LoRA
from lowrank.methods import METHODS, Method

METHODS_PROMISED = [
    *(
        "full",
        "linear_probe",
        "apla",
        "lora",
        "rslora",
        "dora",
        "pissa",
        "lora_plus",
        "lora_rite",
        "lora_muon",
        "multihead_lora",
        "lte",
        "relora",
    ),
    *("full_8bit", "muon", "scale", "soap", "dion", "adafactor", "diloco"),
    *("galore", "galore_8bit", "galore_adafactor", "apollo", "apollo_mini", "fira"),
    *("galore_muon", "ldadam", "frugal", "lte_galore"),
]


def adapter(method: Method) -> LoRA:
    make = method.adapt[0].make
    inner = make.inner if isinstance(make, DoRA) else make
    assert isinstance(inner, LoRA)
    return inner


@pytest.mark.parametrize("name", METHODS_PROMISED)
def test_promised_names(name: str) -> None:
    assert METHODS[name] is getattr(lowrank.methods, name)
    assert METHODS[name]().name == name


def test_the_catalogue_is_in_the_order_in_which_it_is_written() -> None:
    assert list(METHODS) == ["full", "frozen", *METHODS_PROMISED[1:]]


@pytest.mark.parametrize("name", METHODS)
def test_the_family_is_that_of_the_value(name: str) -> None:
    assert METHODS.facts(name)["family"] == METHODS[name]().family


@pytest.mark.parametrize("name", METHODS)
def test_documented_and_checked(name: str) -> None:
    """A citation in the docstring, a first line for the catalogue, named options only, each with a default."""
    f = METHODS[name]
    assert "arXiv" in (inspect.getdoc(f) or "") or "Not from a paper" in (inspect.getdoc(f) or "")
    parameters = inspect.signature(f).parameters
    assert all(p.default is not p.empty for p in parameters.values())
    assert all(p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters.values())
    assert lowrank.methods.summary(name)
    with pytest.raises(TypeError, match=r"nonsense"):
        f(nonsense=1)


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_values(name: str) -> None:
    assert small_method(name) == small_method(name)
    assert hash(small_method(name)) == hash(small_method(name))
    assert (
        small_method(name, rest="train") is not None if "rest" in inspect.signature(METHODS[name]).parameters else True
    )
    assert pickle.loads(pickle.dumps(small_method(name))) == small_method(name)
    with pytest.raises(AttributeError):
        small_method(name).rest = "train"  # type: ignore[misc]


OTHER: dict[str, object] = {
    "target_modules": "c_fc",
    "galore_modules": "c_fc",
    "exclude_modules": "c_proj",
    "freeze": "wte",
    "rest": "freeze",
    "ties": "untie",
    "init": "kaiming",
    "basis": "svd",
    "kind": "explorers",
    "alpha": 77.0,
    "dropout": 0.3,
    "forget": 0.25,
    "restart_warmup": 1,
    "rest_every": 7,
    "outer_momentum": 0.8,
    "betas": (0.5, 0.7),
    "eps": 1e-3,
    "momentum": 0.5,
    "beta1": 0.5,
    "follow": 0.5,
}
NOT_OF_ADAMS_KIND = [("adafactor", "betas"), ("adafactor", "eps")]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, f in METHODS.items()
        for option in inspect.signature(f).parameters
        if (name, option) not in NOT_OF_ADAMS_KIND
    ],
)
def test_every_option_matters(name: str, option: str) -> None:
    """No option is accepted and ignored: another value is another method."""
    default = inspect.signature(METHODS[name]).parameters[option].default
    if option in OTHER:
        value = OTHER[option]
    elif isinstance(default, bool):
        value = not default
    elif isinstance(default, (int, float)):
        value = type(default)(default * 2 + 1)
    else:
        value = another_word(name, option, default)
    assert value != default
    needed = {"rest": "local"} if option == "rest_every" else {}  # an average of what each rank trains by itself
    assert METHODS[name](**needed, **{option: value}) != METHODS[name](**needed)


def another_word(name: str, option: str, default: object) -> object:
    """For an option that is one of a few words: the error for a wrong one says which there are."""
    with pytest.raises(ValueError, match=r"one of|or '") as caught:
        METHODS[name](**{option: "no such word"})
    words = re.findall(r"[a-z_0-9]+", str(caught.value).split("one of")[-1])
    return next(word for word in words if word != default)


class TestDefaults:
    def test_lora(self) -> None:
        method = lowrank.methods.lora()
        assert method.adapt[0].target_modules == ("q", "v")
        assert (adapter(method).rank, adapter(method).alpha, adapter(method).init) == (8, 16, "kaiming")
        assert adapter(lowrank.methods.rslora()).scale == pytest.approx(16 / 8**0.5)
        assert adapter(lowrank.methods.pissa()).scale == 1.0
        assert adapter(lowrank.methods.pissa()).init == "pissa"

    def test_lora_plus(self) -> None:
        first, rest = lowrank.methods.lora_plus().rules
        assert (first.lr, rest.lr) == (16.0, 1.0)
        opt = lowrank.apply_(gpt2(), small_method("lora_plus")).optimizer(lr=0.5, weight_decay=0.1)
        rates = {n: (g["lr"] * g["lr_ratio"], g["decay"]) for g in opt.param_groups for n in g["param_names"]}
        for name, (lr, decay) in rates.items():
            assert lr == (8.0 if name.endswith(".B") else 0.5)
            assert decay == (0.0 if ".adapters." in name else 0.1)

    def test_lte(self) -> None:
        method = lowrank.methods.lte(rank=5)
        assert adapter(method).split
        assert adapter(method).alpha == 20.0
        assert adapter(method).init == "orthogonal"
        assert method.merge == lowrank.adapters.Merge(10, keep=True, forget=0.0)
        assert not adapter(lowrank.methods.multihead_lora()).split
        assert lowrank.methods.multihead_lora().merge is None

    def test_relora(self) -> None:
        method = lowrank.methods.relora()
        assert method.merge == lowrank.adapters.Merge(1000, keep=False, forget=0.9)
        assert [method.lr(step) for step in (0, 999, 1000, 1100, 1999)] == [1.0, 1.0, 1 / 101, 1.0, 1.0]
        assert lowrank.methods.relora(merge_every=50).lr(50) == pytest.approx(1 / 6)
        assert [lowrank.methods.relora(merge_every=3).lr(step) for step in range(7)] == [1.0] * 7

    def test_relora_restart_must_fit(self) -> None:
        with pytest.raises(ValueError, match=r"must end before the next restart"):
            lowrank.methods.relora(merge_every=10, restart_warmup=10)
        with pytest.raises(ValueError, match=r"merge_every=0 must be a whole number"):
            lowrank.methods.relora(merge_every=0)

    def test_fine_tuning_methods_leave_the_rest_to_what_it_is(self) -> None:
        for name in ("lora", "rslora", "dora", "pissa", "lora_plus", "multihead_lora", "lte", "relora"):
            assert METHODS[name]().rest == "auto"
        assert METHODS["full"]().rest == "train"
        assert METHODS["linear_probe"]().rest == "freeze"


def test_linear_probe_trains_the_head_alone() -> None:
    plan = lowrank.apply_(gpt2(tied=False), lowrank.methods.linear_probe())
    assert [row.name for row in plan.rows if row.rule] == ["lm_head.weight"]


def test_frozen_control() -> None:
    model = gpt2()
    plan = lowrank.apply_(model, lowrank.methods.frozen("attention"))
    frozen = {row.name for row in plan.rows if row.rule is None}
    assert frozen == {f"transformer.h.{i}.attn.{layer}.weight" for i in range(2) for layer in ("c_attn", "c_proj")}
    assert torch.isfinite(model(torch.zeros(1, 2, dtype=torch.long)).logits).all()


@pytest.mark.parametrize("name", ["galore", "apollo", "fira", "lte_galore"])
def test_an_unknown_basis_is_named_with_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=r"basis='powr' is unknown; it is one of .*did you mean 'power'"):
        METHODS[name](basis="powr")
