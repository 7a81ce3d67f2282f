"""Fragments that merge at steps of their own (Streaming DiLoCo, arXiv 2501.18512), against loops in float64."""

from __future__ import annotations

from math import lcm
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from lowrank.adapters.fragments import divide, due

HEADS, EVERY, STEPS, SCALE, LR, BATCH = 2, 4, 15, 4.0, 0.05, 8
SHAPES = ((6, 7), (7, 4), (4, 3))  # in, out
MERGES = {0: (4, 8, 12), 1: (2, 6, 10, 14), 2: (2, 6, 10, 14)}  # the last two together are more than the first


def data(step: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, SHAPES[0][0], generator=noise, dtype=torch.float64)
    return x, torch.randint(0, SHAPES[-1][1], (BATCH,), generator=noise)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in SHAPES)).double()


def bound(model: nn.Module, overlap: bool) -> tuple[lowrank.Plan, lowrank.Optimizer]:
    method = lowrank.methods.lte(
        "all-linear",
        rank=2,
        heads=HEADS,
        alpha=2 * SCALE,
        merge_every=EVERY,
        fragments=2,
        overlap=overlap,
        rest="freeze",
    )
    plan = lowrank.apply_(model, method)
    return plan, plan.optimizer(lr=LR)


def trained(overlap: bool, resume_at: int | None = None) -> tuple[list[list[Tensor]], lowrank.Plan, Any]:
    """The weights before the first step and after each."""
    plan, opt = bound(build(), overlap)
    weights = [[layer.weight.detach().clone() for layer in plan.model]]  # type: ignore[union-attr, operator]
    for step in range(STEPS):
        if step == resume_at:
            state, moments = plan.model.state_dict(), opt.state_dict()
            plan, opt = bound(build(), overlap)
            plan.model.load_state_dict(state)
            opt.load_state_dict(moments)
        x, y = data(step)
        F.cross_entropy(plan.model(x), y).backward()
        opt.step()
        opt.zero_grad()
        weights.append([layer.weight.detach().clone() for layer in plan.model])  # type: ignore[union-attr, operator]
    return weights, plan, opt


def looped(overlap: bool) -> list[list[Tensor]]:
    plan, _ = bound(build(), overlap)
    W = [layer.weight.detach().clone() for layer in plan.model]  # type: ignore[union-attr, operator]
    adapters: list[Any] = [layer.adapters["all"] for layer in plan.model]  # type: ignore[union-attr, index]
    A = [[nn.Parameter(a.A[h].detach().clone()) for h in range(HEADS)] for a in adapters]
    B = [[nn.Parameter(a.B[h].detach().clone()) for h in range(HEADS)] for a in adapters]
    optimizer = torch.optim.AdamW([p for each in (*A, *B) for p in each], lr=LR, weight_decay=0.0)
    given = [[torch.zeros_like(w) for _ in range(HEADS)] for w in W]
    under_way: list[list[Tensor] | None] = [None] * len(W)
    found, size = [list(W)], BATCH // HEADS
    for step in range(STEPS):
        x, y = data(step)
        loss = torch.zeros((), dtype=torch.float64)
        for h in range(HEADS):
            out = x[h * size : (h + 1) * size]
            for i, w in enumerate(W):
                out = out @ (w + SCALE * B[i][h] @ A[i][h] - given[i][h]).T
            loss = loss + F.cross_entropy(out, y[h * size : (h + 1) * size], reduction="sum") / BATCH
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for i in range(len(W)):
            if step + 1 not in MERGES[i]:
                continue
            now = [(SCALE * b @ a).detach() for a, b in zip(A[i], B[i], strict=True)]
            arrived, under_way[i] = (under_way[i], now) if overlap else (now, None)
            if arrived is not None:
                W[i] = W[i] + sum(u - v for u, v in zip(arrived, given[i], strict=True)) / HEADS
                given[i] = arrived
        found.append(list(W))
    return found


@pytest.mark.parametrize("overlap", [False, True])
def test_each_fragment_merges_at_its_steps(overlap: bool) -> None:
    ours, theirs = trained(overlap)[0], looped(overlap)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-10)
    for i, steps in MERGES.items():
        moved = tuple(n for n in range(1, STEPS + 1) if not torch.equal(ours[n][i], ours[n - 1][i]))
        assert moved == (steps[1:] if overlap else steps)


def test_whole_copies_merge_by_fragments_too() -> None:
    """DiLoCo's outer step of each matrix at its fragment's steps, the local AdamW going on."""
    method = lowrank.methods.diloco(heads=HEADS, merge_every=EVERY, fragments=2, rest="freeze")
    model = build()
    W = [layer.weight.detach().clone() for layer in model]
    opt = lowrank.apply_(model, method).optimizer(lr=LR)
    D = [[nn.Parameter(torch.zeros_like(w)) for _ in range(HEADS)] for w in W]
    inner = torch.optim.AdamW([d for each in D for d in each], lr=LR, weight_decay=0.0)
    outer, size = [torch.zeros_like(w) for w in W], BATCH // HEADS
    for step in range(STEPS):
        x, y = data(step)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        for h, (out, labels) in enumerate(zip(x.split(size), y.split(size), strict=True)):
            for w, d in zip(W, D, strict=True):
                out = out @ (w + d[h]).T
            (F.cross_entropy(out, labels, reduction="sum") / BATCH).backward()
        inner.step()
        inner.zero_grad()
        with torch.no_grad():
            for i in (0,) if step + 1 in MERGES[1] else (1, 2) if step + 1 in MERGES[0] else ():  # the first is more
                change = sum(D[i]) / HEADS  # type: ignore[arg-type]
                outer[i] = 0.9 * outer[i] + change
                W[i] = W[i] + 0.7 * (change + 0.9 * outer[i])
                for d in D[i]:
                    d.zero_()
        torch.testing.assert_close([layer.weight for layer in model], W, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("overlap", [False, True])
def test_it_goes_on_from_between_two_fragments(overlap: bool) -> None:
    straight, resumed = trained(overlap), trained(overlap, resume_at=7)
    for mine, theirs in zip(straight[0], resumed[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    state = straight[1].model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in resumed[1].model.state_dict().items())


def test_by_hand_all_fragments_merge() -> None:
    weights, plan, opt = trained(False)
    lowrank.merge_(plan, opt)
    assert all(not torch.equal(layer.weight, W) for layer, W in zip(plan.model, weights[-1], strict=True))  # type: ignore[union-attr, call-overload]


@pytest.mark.parametrize(("every", "fragments"), [(7, 1), (7, 7), (10, 3), (8, 4)])
def test_each_is_due_once_an_interval_and_never_two_at_once(every: int, fragments: int) -> None:
    at = [due(n, every, fragments) for n in range(1, 2 * every + 1)]
    for interval in (at[:every], at[every:]):
        assert [f for f in interval if f is not None] == list(range(fragments))
    assert at[every - 1] == fragments - 1
    assert due(0, every, fragments) is None
    assert due(lcm(every, 3), every, fragments) == fragments - 1


def test_fragments_send_about_as_much() -> None:
    sizes = [64, 64, 16, 16, 16, 16, 1, 1, 1, 1, 4]
    places = divide(sizes, 3)
    filled = [sum(s for s, place in zip(sizes, places, strict=True) if place == f) for f in range(3)]
    assert filled == [68, 68, 64] or max(filled) - min(filled) <= 4
    assert filled == sorted(filled, reverse=True)
    assert divide([], 2) == []
