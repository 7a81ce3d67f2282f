"""What every update rule must do. A new rule, also one of an example, joins by one line in ``RULES``."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import fields
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import Any

import examples.new_optimizer
import pytest
import torch
from examples.new_optimizer import Lion
from examples.tucker import Tucker
from tests.quadratic import Quadratic, cloned, state_bytes
from torch import Tensor, nn

import lowrank
from lowrank.distributed.shards import Shard
from lowrank.optim import (
    SGD,
    SVD,
    Adafactor,
    AdamW,
    ColumnNormalised,
    Dion,
    ErrorFeedback,
    Gaussian,
    Lazy,
    Muon,
    Optimizer,
    PowerIteration,
    Projected,
    Rescale,
    Residual,
    Rule,
    Signed,
    Soap,
)
from lowrank.optim.sharded import consolidated_state, local_state, on_shard, shard_specs
from lowrank.optim.state import leaves
from lowrank.plan.ledger import state_bytes as bytes_told

NARROW = AdamW(storage="int8")
FOUR = {"rank": 3, "refresh_every": 4}
RULES: dict[str, Rule] = {
    "adamw": AdamW(betas=(0.8, 0.95)),
    "adamw-bfloat16": AdamW(storage="bfloat16"),
    "adamw-int8": NARROW,
    "sgd": SGD(),
    "sgd-nesterov": SGD(momentum=0.9, nesterov=True),
    "adafactor": Adafactor(beta1=0.9, scale_parameter=True),
    "lion": Lion(),
    "muon": Muon(),
    "muon-keller": Muon(scale="keller", nesterov=False, iterations=3, momentum=0.8),
    "column-normalised": ColumnNormalised(),
    "column-normalised-momentum": ColumnNormalised(momentum=0.9),
    "soap": Soap(refresh_every=3, largest=10),
    "dion": Dion(rank=3),
    "tucker": Tucker(rank=3, refresh_every=4, scale=1.0),
    "galore": Projected(**FOUR),
    "galore-svd-rotate": Projected(**FOUR, basis=SVD(), transport="rotate"),
    "galore-long-reset": Projected(**FOUR, side="long", transport="reset"),
    "galore-left": Projected(**FOUR, side="left", transport="rotate"),
    "galore-right": Projected(**FOUR, side="right"),
    "galore-both": Projected(**FOUR, side="both", transport="rotate"),
    "galore-int8": Projected(**FOUR, inner=NARROW, basis_storage="int8"),
    "galore-bfloat16": Projected(**FOUR, inner=AdamW(storage="bfloat16"), basis_storage="bfloat16"),
    "q-galore": Projected(inner=NARROW, rank=3, refresh_every=2, basis_storage="int4", lazy=Lazy(window=2)),
    "galore-sgd": Projected(**FOUR, inner=SGD(momentum=0.9), transport="rotate"),
    "galore-adafactor": Projected(**FOUR, inner=Adafactor(beta1=0.9, scale_parameter=True), transport="rotate"),
    "galore-lion": examples.new_optimizer.method(rank=3, refresh_every=4).rules[0].rule,
    "ldadam": Projected(
        rank=3,
        refresh_every=1,
        basis=PowerIteration(iterations=1),
        transport="statistics",
        error_feedback=ErrorFeedback(moments=True),
        follow=0.9,
    ),
    "error-feedback": Projected(**FOUR, transport="rotate", error_feedback=ErrorFeedback(share=0.5)),
    "frugal": Projected(**FOUR, lift=Signed(), transport="reset", scale=1.0),
    "apollo": Projected(**FOUR, basis=Gaussian(), lift=Rescale(), scale=1.0),
    "apollo-svd": Projected(**FOUR, basis=SVD(), lift=Rescale(limiter=None), transport="reset"),
    "apollo-mini": Projected(rank=1, refresh_every=4, basis=Gaussian(), lift=Rescale(scope="tensor"), scale=128**0.5),
    "fira": Projected(**FOUR, lift=Residual()),
    "fira-both": Projected(**FOUR, lift=Residual(scope="tensor"), side="both"),
    "flora": Projected(**FOUR, inner=SGD(momentum=0.9), basis=Gaussian()),
    "galore-muon": Projected(**FOUR, inner=Muon(), transport="rotate"),
    "nested": Projected(inner=Projected(rank=2, refresh_every=3, scale=1.0), rank=5, refresh_every=4),
}
REFUSES_SHARDS = {"adafactor": "Adafactor", "tucker": "Tucker", "galore-adafactor": "Adafactor"}
REFUSES_SHARDS |= {
    "soap": "Soap on the weight needs the whole gradient",
    "dion": "Dion on the weight needs the whole gradient",
    "ldadam": "error_feedback=None",
    "error-feedback": "error_feedback=None",
    "nested": "one that does not project",
    "galore-muon": "or normalise",
}
every_rule = pytest.mark.parametrize("name", RULES)


def is_narrow(name: str) -> bool:
    """Whether codes may fall on the other side of an edge, so that two ways of rounding part."""
    return any(word in name for word in ("int8", "bfloat16", "q-galore"))


def close(name: str, ours: Tensor, theirs: Tensor, atol: float = 2e-5, rtol: float = 1e-4, code: float = 3e-3) -> None:
    torch.testing.assert_close(ours, theirs, atol=code if is_narrow(name) else atol, rtol=rtol)


@every_rule
def test_a_rule_is_a_value(name: str) -> None:
    rule = RULES[name]
    names = {each: getattr(lowrank.optim, each) for each in lowrank.optim.__all__}
    again = eval(repr(rule), {**names, "Lion": Lion, "Tucker": Tucker})
    assert again == rule
    assert hash(again) == hash(rule)
    for field in fields(rule):  # type: ignore[arg-type]
        with pytest.raises(AttributeError):
            setattr(rule, field.name, None)


@every_rule
@pytest.mark.parametrize("shape", [(8, 13), (13, 8), (9, 9), (2, 8, 13), (2, 2, 13, 8), (7,), ()], ids=str)
def test_in_place_is_the_definition(name: str, shape: tuple[int, ...]) -> None:
    task, rule = Quadratic(shape), RULES[name]
    close(name, task.run(rule, 10)[0], task.run(rule, 10, in_place=False)[0])


def projected_adam_(
    p: Tensor, g: Tensor, basis: Tensor, moments: tuple[Tensor, Tensor], step: Tensor, *, left: bool, **numbers: Any
) -> None:
    """What the kernel of this name computes, in ordinary operations."""
    step += 1
    (m, v), (beta1, beta2) = moments, numbers["betas"]
    r = basis.mT @ g if left else g @ basis
    m.lerp_(r, 1 - beta1)
    v.lerp_(r.square(), 1 - beta2)
    s = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + numbers["eps"])
    p.mul_(1 - numbers["lr"] * numbers["decay"]).sub_(
        (basis @ s if left else s @ basis.mT) * numbers["lr"] * numbers["scale"]
    )


def adamw_int8_(p: Tensor, g: Tensor, m: Any, v: Any, step: Tensor, *, lr: Tensor, decay: float, **own: Any) -> None:
    rule = AdamW(storage="int8", betas=own["betas"], eps=own["eps"])
    rule.apply_([p], [g], [{"exp_avg": m, "exp_avg_sq": v, "step": step}], lr=float(lr), decay=decay)


FUSED = ("galore", "galore-svd-rotate", "galore-long-reset", "galore-left", "galore-right")


@every_rule
@pytest.mark.parametrize("shape", [(8, 13), (13, 8), (2, 8, 13), (7,)], ids=str)
def test_a_kernel_is_taken_where_it_computes_the_rule(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By kernels of ordinary operations, chosen wherever they may be; where none is taken, nothing was done."""
    for module in (lowrank.optim.rules, lowrank.optim.projected):
        monkeypatch.setattr(module, "chosen", lambda name, like: True)
    for kernel, function in (("projected", projected_adam_), ("int8", adamw_int8_)):
        module = SimpleNamespace(**{function.__name__: function})
        monkeypatch.setitem(sys.modules, f"lowrank.linalg.kernels.{kernel}", module)
    task, rule, taken = Quadratic(shape), RULES[name], []
    p = task.start.clone()
    state = rule.init(p)
    rule.place_(state, 0)
    for step in range(9):
        g, before = task.gradient(p, step), (p.clone(), cloned(state))
        taken.append(rule.fused_(p, g, state, lr=0.02, decay=0.1, seed=0))
        if not taken[-1]:
            assert torch.equal(p, before[0])
            assert all(torch.equal(dict(leaves(before[1]))[path], t) for path, t in leaves(state))
            rule.apply_([p], [g], [state], lr=0.02, decay=0.1)
    assert taken == [name == "adamw-int8" or (name in FUSED and len(shape) == 2)] * 9
    close(name, p, task.run(rule, 9)[0])


@every_rule
def test_a_gradient_stays_as_it_is_and_a_direction_is_no_view_of_the_state(name: str) -> None:
    """A caller may scale the direction in place without spoiling the moments."""
    task, rule = Quadratic((8, 13)), RULES[name]
    p, state = task.run(rule, 3)
    g = task.gradient(p, 3)
    before = g.clone()
    direction, _ = rule.update(g, state)
    assert torch.equal(g, before)
    held = cloned(state)
    if direction is not g:
        direction.zero_()
    assert all(torch.equal(t, dict(leaves(held))[path]) for path, t in leaves(state))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_optimizer_lowers_the_loss_resumes_bitwise_and_keeps_state(name: str, dtype: torch.dtype) -> None:
    """120 steps are 60, saved and loaded with ``weights_only``, and 60; the state is what its plan said, from the
    first step to the last, float32 or wider unless its storage says otherwise."""
    task = Quadratic((8, 13), torch.float64)

    def fresh() -> tuple[nn.Parameter, Optimizer]:
        p = nn.Parameter(task.start.to(dtype, copy=True))
        return p, Optimizer([{"params": [("p", p)], "rule": RULES[name], "lr": 0.05}])

    def train(p: nn.Parameter, optimizer: Optimizer, begin: int, end: int) -> None:
        for step in range(begin, end):
            p.grad = task.gradient(p.detach().double(), step).to(dtype)
            optimizer.step()

    p, optimizer = fresh()
    train(p, optimizer, 0, 120)
    first, second = fresh(), fresh()
    kinds = {path: (t.dtype, t.shape) for path, t in leaves(first[1].state[first[0]])}
    train(*first, 0, 60)
    buffer = io.BytesIO()
    torch.save({"p": first[0].detach(), "optimizer": first[1].state_dict()}, buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    second[0].data.copy_(saved["p"])
    second[1].load_state_dict(saved["optimizer"])
    train(*second, 60, 120)
    assert torch.equal(second[0], p)
    for each in (optimizer.state[p], second[1].state[second[0]]):
        assert {path: (t.dtype, t.shape) for path, t in leaves(each)} == kinds
    assert optimizer.state_bytes() == bytes_told(RULES[name], (8, 13), dtype) == state_bytes(optimizer.state[p])
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    floats = {kind for path, (kind, _) in kinds.items() if kind.is_floating_point and "step" not in path}
    assert floats <= ({torch.float32, torch.bfloat16, wide} if is_narrow(name) else {wide})
    assert (p.detach() - task.target).square().mean() < 0.9 * (task.start - task.target).square().mean()


@every_rule
def test_a_stack_is_its_matrices_one_by_one(name: str) -> None:
    task, rule = Quadratic((3, 8, 13)), RULES[name]
    if name == "tucker":
        pytest.skip("its modes are those of the whole tensor")
    stack, _ = task.run(rule, 7)
    for i in range(3):
        single = Quadratic((8, 13))
        single.start, single.target = task.start[i], task.target[i]
        single.gradient = lambda p, step, i=i: task.gradient(task.start, step)[i] - task.start[i] + p  # type: ignore[method-assign]
        close(name, single.run(rule, 7)[0], stack[i], atol=2e-4, rtol=1e-3)


@every_rule
def test_what_a_parameter_becomes_does_not_depend_on_the_others(name: str) -> None:
    """Bitwise: a step in a hook has no others. Some are a step behind; odd sizes begin anywhere in memory."""
    rule, shapes = RULES[name], [(8, 13), (33, 21), (21, 33), (2, 9, 9), (7,)] * 3
    draw = torch.Generator().manual_seed(0)
    alone = [torch.randn(shape, generator=draw) for shape in shapes]
    together = [p.clone() for p in alone]
    states = [[rule.init(p) for p in each] for each in (alone, together)]
    for each in states:
        for index, state in enumerate(each):
            rule.place_(state, index)
    for step in range(7):
        grads = [torch.randn(shape, generator=draw) for shape in shapes]
        at = range(4 if step == 0 else 0, len(shapes))
        for i in at:
            rule.apply_([alone[i]], [grads[i].clone()], [states[0][i]], lr=0.02, decay=0.1)
        rule.apply_(*([each[i] for i in at] for each in (together, grads, states[1])), lr=0.02, decay=0.1)
    assert all(torch.equal(p, q) for p, q in zip(alone, together, strict=True))
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(t, dict(leaves(other))[path]) for path, t in leaves(one))


@every_rule
def test_projected_micro_batches_are_the_whole_step(name: str) -> None:
    rule, task = RULES[name], Quadratic((8, 13))
    p, state = task.run(rule, 5)
    for step in range(5, 9):
        parts = [task.gradient(p, 100 * step + i) / 3 for i in range(3)]
        whole = torch.stack(parts).sum(0)
        if not rule.accumulates_projected(state):
            if isinstance(rule, Projected):
                assert not rule.keeps_projected or int(state["step"]) == int(state["due"])
            rule.apply_([p], [whole], [state], lr=0.02, decay=0.1)
            continue
        q, parallel = p.clone(), cloned(state)
        projected = torch.stack([rule.project(part, state) for part in parts]).sum(0)
        assert projected.numel() < p.numel()
        assert all(torch.equal(dict(leaves(parallel))[path], t) for path, t in leaves(state))
        rule.apply_projected_(p, projected, state, lr=0.02, decay=0.1)
        rule.apply_([q], [whole], [parallel], lr=0.02, decay=0.1)
        close(name, p, q, atol=1e-5)


class Threads:
    """The ranks of a group as threads of this process."""

    def __init__(self, rank: int, count: int, barrier: Barrier, table: dict[int, list[Tensor]]):
        self.rank, self.count, self.barrier, self.table = rank, count, barrier, table

    def gather(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        self.table[self.rank] = [t.clone() for t in tensors]
        self.barrier.wait()
        everyones = [[self.table[rank][i] for rank in range(self.count)] for i in range(len(tensors))]
        self.barrier.wait()
        return everyones

    def sum_(self, tensors: list[Tensor]) -> None:
        for t, every in zip(tensors, self.gather(tensors), strict=True):
            t.copy_(torch.stack(every).sum(0))


def on_ranks(count: int, work: Callable[[Threads], Tensor]) -> list[Tensor]:
    """What each rank finds."""
    barrier, table, found = Barrier(count, timeout=60), {}, {}  # type: ignore[var-annotated]

    def one(rank: int) -> None:
        try:
            found[rank] = work(Threads(rank, count, barrier, table))
        except BaseException:
            barrier.abort()
            raise

    threads = [Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(count)]


@every_rule
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(8, 13), (13, 8)], ids=str)
def test_sharded_is_whole(name: str, dim: int, shape: tuple[int, int]) -> None:
    """Three ranks with unequal shards step as one process; a rule that cannot is refused with the remedy."""
    rule, task = RULES[name], Quadratic(shape)

    def rank(ranks: Any) -> Tensor:
        shard = Shard(shape, dim, ranks)
        here = on_shard(rule, shard, "the weight")
        p, whole = shard.narrow(task.start).clone(), task.start.clone()
        state, of_whole = here.init(p), rule.init(whole)
        for step in range(9):
            g = task.gradient(whole, step)
            rule.apply_([whole], [g], [of_whole], lr=0.02, decay=0.1)
            here.apply_([p], [shard.narrow(g).clone()], [state], lr=0.02, decay=0.1)
        told, gathered = dict(leaves(of_whole)), consolidated_state(rule, shard, state, p)
        assert {path: t.shape for path, t in leaves(gathered)} == {path: t.shape for path, t in told.items()}
        cut = shard_specs(rule, shard, state, p)
        codes = any(path.endswith(".codes") for path in told) and not getattr(here, "crosses", False)
        assert codes == (cut is None)
        back = dict(leaves(local_state(rule, shard, gathered, p)))
        for path, own in leaves(state) if cut is not None else ():
            theirs = shard.narrow(told[path], cut[path].dim) if path in cut else told[path]
            close(name, own, theirs, atol=1e-4, rtol=1e-3, code=2e-2)
            assert torch.equal(back[path], own)
            assert path not in cut or (cut[path].shape, cut[path].local_shape) == (told[path].shape, own.shape)
        return shard.gather(p)

    if name in REFUSES_SHARDS:
        with pytest.raises(ValueError, match=REFUSES_SHARDS[name]):
            on_shard(rule, Shard(shape, dim, Threads(0, 3, Barrier(1), {})), "the weight")  # type: ignore[arg-type]
        return
    expected = task.start.clone()
    expected, _ = task.run(rule, 9, state=rule.init(expected))
    for found in on_ranks(3, rank):
        close(name, found, expected, atol=1e-4, rtol=1e-3, code=2e-2)  # blocks of codes are of the shard
