"""Steps for CUDA graphs: with learning rates on the device numbers stay what they were, nothing is read back, and what
no graph can hold is refused. The capture itself needs a device; here a stand-in replays what was captured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.contract.test_rules import RULES
from tests.laws.test_no_hidden_synchronisation import (
    after_a_step,
    ordinary_steps,
    seldom_refreshed,
    streams_on_the_device,
)
from torch import Tensor, nn

from lowrank.optim import AdamW, CapturedStep, Optimizer, Projected
from lowrank.optim.pairs import PairRule
from lowrank.optim.state import leaves

SHAPES = [(8, 13), (13, 8), (2, 8, 13), (7,)]
REFUSED = {
    "adafactor": "decays by a count of steps on the host",
    "galore-adafactor": "decays by a count of steps on the host",
    "apollo": "draws its basis anew at every step",
    "apollo-mini": "draws its basis anew at every step",
    "flora": "draws its basis anew at every step",
    "ldadam": "refreshes its basis, and so asks the host, at every step",
}
HELD = [
    name for name, rule in RULES.items() if name not in REFUSED and not isinstance(rule, PairRule) and name != "tucker"
]


def made(rule: Any, *, capturable: bool) -> tuple[list[nn.Parameter], Optimizer]:
    noise = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=noise)) for shape in SHAPES]
    for p in params:
        p.grad = torch.zeros_like(p)
    group = {"params": params, "rule": rule, "lr": 0.05, "decay": 0.1, "lr_ratio": 2.0}
    return params, Optimizer([group], schedule=lambda step: 1 / (1 + step), capturable=capturable)


def run(params: list[nn.Parameter], step: Callable[[], Any], count: int = 7) -> list[Tensor]:
    for n in range(count):
        for p in params:
            assert p.grad is not None
            p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
        step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("name", HELD)
def test_rates_on_the_device_change_no_number(name: str) -> None:
    params, optimizer = made(RULES[name], capturable=False)
    expected = run(params, optimizer.step)
    params, optimizer = made(RULES[name], capturable=True)
    for p, other in zip(run(params, optimizer.step), expected, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HELD)
def test_a_capturable_step_reads_nothing_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = seldom_refreshed(RULES[name])
    with streams_on_the_device(monkeypatch):
        group = {"rule": rule, "decay": 0.1}
        _, optimizer = after_a_step(lambda ps: Optimizer([{"params": ps, **group}], capturable=True), torch.float32)
        ordinary_steps(optimizer)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_holds_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"capturable=True cannot hold for .*which {REFUSED[name]}; make it without"):
        made(RULES[name], capturable=True)


def test_other_ways_to_step_are_refused() -> None:
    narrow = [nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))]
    with pytest.raises(ValueError, match=r"parameter 0 in torch.bfloat16: it is rounded by random numbers"):
        Optimizer([{"params": narrow, "rule": AdamW()}], capturable=True)
    with pytest.raises(ValueError, match="per_layer=True steps inside the backward pass"):
        Optimizer([{"params": [nn.Parameter(torch.ones(3))], "rule": AdamW()}], capturable=True, per_layer=True)
    with pytest.raises(ValueError, match="made with capturable=True"):
        CapturedStep(Optimizer([{"params": [nn.Parameter(torch.ones(3))], "rule": AdamW()}]))


class StandIn:
    """A graph on a CPU: repeats what the step did to the device's tensors, and leaves the host's alone."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        before = self.device_tensors()
        held = [t.clone() for t in before]
        optimizer.step_groups_()
        for t, value in zip(before, held, strict=True):
            t.copy_(value)  # a capture runs no kernel

    def device_tensors(self) -> list[Tensor]:
        state = [t for s in self.optimizer.state.values() for _, t in leaves(s) if t.dtype is not torch.int64]
        return [*state, *(p.data for group in self.optimizer.param_groups for p in group["params"])]

    def replay(self) -> None:
        """The host has counted the step already, and is not to count it twice."""
        clocks = [
            t
            for s in self.optimizer.state.values()
            for path, t in leaves(s)
            if path.endswith("step") and not t.is_floating_point()
        ]
        for t in clocks:
            t.sub_(1)
        self.optimizer.step_groups_()


@torch.no_grad()
def test_replays_and_refreshes_make_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between refreshes, every third step, and after a restart of the state, which is captured anew."""
    monkeypatch.setattr(CapturedStep, "_on_cuda", lambda self: True)
    monkeypatch.setattr(CapturedStep, "_captured", lambda self: StandIn(self.optimizer))
    runs = {}
    for captured in (False, True):
        params, optimizer = made(Projected(rank=3, refresh_every=3), capturable=True)
        step = CapturedStep(optimizer)
        called = step if captured else optimizer.step
        run(params, called, 8)
        optimizer.forget(params, 1.0)
        runs[captured] = run(params, called, 7), copy.deepcopy(optimizer.state_dict())
    assert 4 < step.replays < 14
    for ours, theirs in zip(runs[True][0], runs[False][0], strict=True):
        assert torch.equal(ours, theirs)
    state = [list(leaves(runs[captured][1]["state"])) for captured in (True, False)]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*state, strict=True))
    assert runs[True][1]["param_groups"] == runs[False][1]["param_groups"]
    params[0].grad = torch.zeros_like(params[0])
    while optimizer.is_ordinary_step() is False:
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"zero_grad\(set_to_none=False\)"):
        step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", HELD)
def test_a_graph_makes_the_same_run(name: str) -> None:
    from benchmarks.gpu.correctness import captured_check

    found = captured_check(torch.device("cuda", 0), RULES[name])
    assert found["ok"], found
