"""AdamW and SGD are torch's; update and apply_ agree; options are checked."""

from typing import Any

import pytest
import torch

import lowrank
from lowrank.adapters.lora import LoRA
from lowrank.adapters.merge import Merge
from lowrank.optim.rules import SGD, AdamW, Rule, wide
from lowrank.optim.stacks import add_one_

SHAPES = [(5, 7), (3,), (2, 3, 4), ()]
PAIRS = [
    (AdamW(), lambda ps, lr, decay: torch.optim.AdamW(ps, lr=lr, weight_decay=decay)),
    (
        AdamW(betas=(0.5, 0.9), eps=1e-3),
        lambda ps, lr, decay: torch.optim.AdamW(ps, lr=lr, weight_decay=decay, betas=(0.5, 0.9), eps=1e-3),
    ),
]
SGDS = [(0.0, False), (0.9, False), (0.9, True)]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(step)
    return [
        10.0 ** (step % 3 - 1) * torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype) for shape in SHAPES
    ]


def step_by_update(
    rule: Rule, params: list[torch.Tensor], grads: list[torch.Tensor], states: list, lr: float, decay: float
) -> None:
    for p, g, state in zip(params, grads, states, strict=True):
        direction, gain = rule.update(g, state)
        p.mul_(1 - lr * decay).sub_(lr * gain * direction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["update", "apply_"])
@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_adamw_is_torchs(pair: int, way: str, dtype: torch.dtype) -> None:
    rule, torchs = PAIRS[pair]
    ours, theirs = parameters(dtype), [p.clone().requires_grad_() for p in parameters(dtype)]
    states, opt = [rule.init(p) for p in ours], torchs(theirs, 0.01, 0.1)
    for step in range(20):
        grads = gradients(step, dtype)
        if way == "apply_":
            rule.apply_(ours, grads, states, lr=0.01, decay=0.1)
        else:
            step_by_update(rule, ours, grads, states, 0.01, 0.1)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        opt.step()
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q.detach(), **close)


@pytest.mark.parametrize(("momentum", "nesterov"), SGDS)
def test_sgd_is_torchs(momentum: float, nesterov: bool) -> None:
    rule = SGD(momentum=momentum, nesterov=nesterov)
    ours, theirs = parameters(), [p.clone().requires_grad_() for p in parameters()]
    states = [rule.init(p) for p in ours]
    opt = torch.optim.SGD(theirs, lr=0.1, momentum=momentum, nesterov=nesterov)
    for step in range(10):
        grads = gradients(step, torch.float32)
        step_by_update(rule, ours, grads, states, 0.1, 0.0)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        opt.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q.detach())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdamW(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\) must be two numbers in"),
        (lambda: AdamW(betas=(-0.1, 0.9)), "must be two numbers in"),
        (lambda: AdamW(betas=(0.9,)), "must be two numbers in"),  # type: ignore[arg-type]
        (lambda: AdamW(eps=-1e-8), "eps=-1e-08 must not be negative"),
        (lambda: SGD(momentum=1.0), "momentum=1.0 must lie in"),
        (lambda: SGD(nesterov=True), "nesterov=True needs a momentum above 0"),
    ],
)
def test_options(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


DEFAULTS: dict[str, dict[str, Any]] = {  # those of the papers, where these name them
    "AdamW": {"betas": (0.9, 0.999), "eps": 1e-8, "storage": "float32"},
    "SGD": {"momentum": 0.0, "nesterov": False},
    "Adafactor": {"eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None},
    "Muon": {"momentum": 0.95, "nesterov": True, "iterations": 5, "coefficients": (3.4445, -4.775, 2.0315)},
    "ColumnNormalised": {"momentum": 0.0, "nesterov": False},
    "Soap": {"betas": (0.95, 0.95), "eps": 1e-8, "refresh_every": 10, "largest": 10000},
    "Dion": {"rank": 128, "momentum": 0.95, "scale": "spectral"},
    "LoraMuon": {"momentum": 0.95, "scale": "rms"},
    "LoraRite": {"betas": (0.9, 0.999)},
    "Projected": {
        "rank": 128,
        "refresh_every": 200,
        "scale": 0.25,
        "side": "short",
        "transport": "keep",
        "follow": 0.0,
    },
    "PowerIteration": {"iterations": 2, "sample": 4, "align": True},
    "Rescale": {"scope": "channel", "limiter": 1.01},
    "Residual": {"scope": "channel", "limiter": 1.01},
    "Signed": {"outside": 1.0},
    "Lazy": {"threshold": 0.4, "factor": 2.0, "window": 5},
    "ErrorFeedback": {"share": 1.0, "moments": False},
}


def test_defaults() -> None:
    for name, values in DEFAULTS.items():
        rule = getattr(lowrank.optim, name)()
        assert {option: getattr(rule, option) for option in values} == values, name
    assert LoRA() == LoRA(rank=8, alpha=None, heads=1, split=False, rank_stabilised=False, init="kaiming", dropout=0.0)
    merge = Merge(3)
    assert (merge.keep, merge.forget, merge.outer_lr, merge.outer_momentum, merge.fragments) == (True, 0.0, 1.0, 0.0, 1)
    assert (merge.exchange, merge.weigh, merge.overlap) == ("float32", "equal", False)


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on no CPU."""

    is_cpu = False


@pytest.mark.parametrize("kind", [torch.Tensor, Elsewhere])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_steps_are_counted_one_by_one_wherever_they_lie(kind: type[torch.Tensor], dtype: torch.dtype) -> None:
    numbers = [torch.full((), start, dtype=dtype).as_subclass(kind) for start in (0, 5)]
    for _ in range(3):
        add_one_(numbers)
    assert [float(number) for number in numbers] == [3, 8]


def test_wide() -> None:
    assert wide(torch.float64) is torch.float64
    assert {wide(d) for d in (torch.float32, torch.float16, torch.bfloat16)} == {torch.float32}
