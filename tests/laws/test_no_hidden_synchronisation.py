"""An ordinary step asks the device for nothing: no ``.item()``, no copy between host and device, no tensor that stays.

The device here is ``meta``: its tensors have no numbers, so that a step which needs one cannot go on, and what the
library keeps on the host by design (clocks of whole numbers) are real tensors on the CPU beside them. What copies are
made between the two is counted. The real device has the same test in ``benchmarks.gpu``, by
``torch.cuda.set_sync_debug_mode``.

What does wait for the device, and why, is ``WAITS`` and ``docs/gpu.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks.projected import Live
from tests.contract.test_rules import RULES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank.linalg import basis
from lowrank.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, Optimizer, Projected, galore_torch, stepper
from lowrank.optim.state import leaves

META = torch.device("meta")
SHAPES = [(8, 13), (13, 8), (9, 9), (2, 8, 13), (7,)]
WAITS = {
    "ldadam": "refreshes its basis at every step, and a refresh asks whether the decomposition succeeded",
    "tucker": "an example, which decides its refreshes as it likes",
}
ordinary = pytest.mark.parametrize("name", [name for name in RULES if name not in WAITS])


class Watch(TorchDispatchMode):
    """Refuses what makes the host wait for the device ``meta``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and given[0].device == META:
            raise AssertionError("a number was read back from the device (.item(), bool(), int())")
        if func is torch.ops.aten._fused_adamw_.tensor_lr and given[0].device == META:
            return None  # in place, and torch has no such kernel for tensors without numbers
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            to = result.device if func.overloadpacket is torch.ops.aten._to_copy else args[0].device
            moved = given[-1]
            assert moved.device == to, f"a copy from {moved.device} to {to} of shape {tuple(moved.shape)}"
        return result


@contextmanager
def streams_on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Random streams for ``meta``, which has no generators of its own."""
    made = basis.generator
    for module in (basis, stepper, galore_torch):
        monkeypatch.setattr(module, "generator", lambda device, *keys: made("cpu", *keys))
    yield
    monkeypatch.undo()


def after_a_step(make: Any, dtype: torch.dtype) -> tuple[list[nn.Parameter], Any]:
    """Parameters on ``meta`` and their optimizer, as they are after a step: what is kept on the host is the real one's
    that has made that step on the CPU."""
    real = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)) for shape in SHAPES]
    shadow = [nn.Parameter(torch.empty_like(p, device=META)) for p in real]
    there = make(real)
    for step in range(2):
        for p in real:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        there.step()
    here = make(shadow)
    for p, q in zip(real, shadow, strict=True):
        if p not in there.state:
            continue
        if q not in here.state:  # the drop-ins make theirs in the first step
            here.state[q] = here._rule_for(q, here.param_groups[-1]).init(q)
        known = dict(leaves(there.state[p]))
        for path, t in leaves(here.state[q]):
            assert t.device == META or t.dtype in (torch.int64, torch.float32), (path, t.dtype)
            assert t.device == META or t.numel() < 10, f"{path} is kept on the host"
            if t.device != META:
                t.copy_(known[path])
        q.grad = torch.empty_like(q)
    return shadow, here


def seldom_refreshed(rule: Any) -> Any:
    """The rule, and those inside it, without a refresh in the steps that are watched."""
    if not isinstance(rule, Projected):
        return rule
    return replace(rule, inner=seldom_refreshed(rule.inner), refresh_every=10_000)


def ordinary_steps(optimizer: Any) -> None:
    with Watch(), torch.no_grad():
        for _ in range(2):
            optimizer.step()


@ordinary
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_an_ordinary_step_reads_nothing_back(
    name: str, dtype: torch.dtype, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = seldom_refreshed(RULES[name])
    with streams_on_the_device(monkeypatch):
        _, optimizer = after_a_step(lambda ps: Optimizer([{"params": ps, "rule": rule}], clip_per_layer=clip), dtype)
        ordinary_steps(optimizer)


def test_the_watch_sees_copies_and_numbers_read() -> None:
    with Watch(), pytest.raises(AssertionError, match="a copy from cpu to meta"):
        torch.zeros(3).to(META)
    with Watch(), pytest.raises(AssertionError, match="a copy from cpu to meta"):
        torch.zeros(3, device=META).copy_(torch.zeros(3))
    with Watch(), pytest.raises(AssertionError, match="read back"):
        bool(torch.zeros((), device=META))


@pytest.mark.parametrize("name", RULES)
def test_steps_leave_nothing_behind(name: str) -> None:
    """What lives after a step is what lived before it, and every step of an interval needs as much as the last."""
    rule = seldom_refreshed(RULES[name])
    params = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for shape in SHAPES]
    optimizer = Optimizer([{"params": params, "rule": rule}])
    live, peaks = [], []
    for step in range(8):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        with Live() as seen:
            optimizer.step()
        live.append(seen.live)
        peaks.append(seen.peak)
    assert live[2:] == [0] * 6
    assert max(peaks[5:]) <= max(peaks[2:5])


@pytest.mark.parametrize("kind", [GaLoreAdamW, GaLoreAdamW8bit])
def test_the_drop_ins_read_nothing_back(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with streams_on_the_device(monkeypatch):
        group = {"rank": 3, "update_proj_gap": 10_000}
        _, optimizer = after_a_step(lambda ps: kind([{"params": ps[:4], **group}], lr=0.01), torch.float32)
        ordinary_steps(optimizer)


def test_adafactors_drop_in_reads_the_parameters_scale_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """``scale_parameter`` multiplies its learning rate, a number of the host, as in the reference; without it none."""

    def make(scaled: bool) -> Any:
        options = {"lr": 0.01, "relative_step": False, "scale_parameter": scaled}
        return lambda ps: GaLoreAdafactor([{"params": ps[:4], "rank": 3, "update_proj_gap": 10_000}], **options)

    with streams_on_the_device(monkeypatch):
        ordinary_steps(after_a_step(make(False), torch.float32)[1])
        scaled = after_a_step(make(True), torch.float32)[1]
        with pytest.raises(AssertionError, match="read back"):
            ordinary_steps(scaled)
