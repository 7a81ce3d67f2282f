"""One basis for a stack of matrices, found together by all who hold a part of it, against float64 loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lowrank
from lowrank.linalg.basis import SVD, Gaussian, PowerIteration
from lowrank.linalg.subspace import Subspace
from lowrank.optim import AdamW, Projected
from lowrank.optim.basis_fit import together

HEADS, ROWS, COLS, RANK = 4, 7, 9, 2


def stack(seed: int = 0) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, ROWS, COLS, generator=noise, dtype=torch.float64)


def rule(**options: object) -> Projected:
    return Projected(rank=RANK, refresh_every=3, stagger=False, one_basis=True, **options)  # type: ignore[arg-type]


def refreshed(parts: list[Tensor], made: Projected) -> list[Subspace]:
    """Each part's basis where the parts are held by different processes, whose sums this one makes."""

    def sum_all(told: list[Tensor]) -> None:
        total = torch.stack(told).sum(dim=0) if told else None
        for t in told:
            t.copy_(total)

    states = [made.init(part) for part in parts]
    return together([made.agreement(g, s) for g, s in zip(parts, states, strict=True)], sum_all)  # type: ignore[misc]


@pytest.mark.parametrize("basis", [PowerIteration(), SVD(), Gaussian()])
def test_parts_find_the_basis_of_the_whole(basis: object) -> None:
    g = stack()
    [whole] = refreshed([g], rule(basis=basis))
    for part in refreshed([g[:1], g[1:]], rule(basis=basis)):
        assert part.left is not None
        assert whole.left is not None
        torch.testing.assert_close(part.left[0], whole.left[0])
        assert all(torch.equal(q, part.left[0]) for q in part.left)


def test_it_keeps_the_most_of_all_matrices_together() -> None:
    g, gram = stack(), torch.zeros(ROWS, ROWS, dtype=torch.float64)
    for matrix in g:
        gram += matrix @ matrix.T
    best = torch.linalg.eigvalsh(gram)[-RANK:].sum()
    kept = {}
    for name, basis in {"svd": SVD(), "power": PowerIteration(iterations=400)}.items():
        [found] = refreshed([g], rule(basis=basis))
        assert found.left is not None
        kept[name] = (found.left.mT @ g).square().sum()
    torch.testing.assert_close(kept["svd"], best)
    torch.testing.assert_close(kept["power"], best, rtol=1e-3, atol=0)


def test_steps_of_an_interval_lie_in_the_span() -> None:
    made = rule()
    D = torch.zeros(HEADS, ROWS, COLS, dtype=torch.float64)
    state = made.init(D)
    for step in range(3):
        made.apply_([D], [stack(step)], [state], lr=0.1, decay=0.0)
    span = made.span(D, state)
    assert span is not None
    assert span.project(D).shape == (HEADS, *made.span_shape(tuple(D.shape)))  # type: ignore[misc]
    assert D.abs().max() > 0.01
    torch.testing.assert_close(span.lift(span.project(D)), D)
    made.apply_([D], [stack(3)], [state], lr=0.1, decay=0.0)  # a new interval
    moved = made.span(D, state)
    assert moved is not None
    assert (moved.lift(moved.project(D)) - D).abs().max() > 1e-3


def test_a_gradient_that_is_not_finite_leaves_the_basis() -> None:
    made, g = rule(), stack()
    state = made.init(g)
    D = torch.zeros_like(g)
    made.apply_([D], [g], [state], lr=0.1, decay=0.0)
    before = state["basis"]["left"].clone()  # type: ignore[index, call-overload]
    state["due"].fill_(1)  # type: ignore[union-attr]
    refresh = made.agreement(torch.full_like(g, float("nan")), state)
    assert refresh is not None
    together([refresh], lambda told: None)
    assert torch.equal(state["basis"]["left"], before)  # type: ignore[index, call-overload, arg-type]
    assert int(state["failures"]) == HEADS  # type: ignore[arg-type]


def test_what_begins_anew_keeps_the_shared_basis_and_its_clock() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(9, 7))
    method = lowrank.methods.lte_galore("explorers", target_modules="all-linear", rank=2, heads=2, merge_every=3)
    plan = lowrank.apply_(model, method)
    opt = plan.optimizer(lr=0.1)
    model(torch.randn(4, 9)).square().sum().backward()
    opt.step()
    D = next(iter(plan.adapters.values())).D
    before = {name: t.clone() for name, t in opt.state[D]["basis"].items()}
    opt.forget([D], 1.0)
    assert all(torch.equal(opt.state[D]["basis"][name], t) for name, t in before.items())
    assert int(opt.state[D]["due"]) == 3
    assert not opt.state[D]["inner"]["exp_avg"].any()


def test_a_stack_is_needed() -> None:
    with pytest.raises(ValueError, match="one_basis=True is for a stack"):
        Projected(inner=AdamW(), one_basis=True, stack=False)
