"""A merge that is under way while training goes on, against loops in float64 over heads and steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank

HEADS, RANK, EVERY, STEPS, SCALE, LR = 2, 2, 3, 11, 4.0, 0.05
WIDE, OUT, BATCH = 6, 5, 8


def data(step: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, WIDE, generator=noise, dtype=torch.float64)
    return x, torch.randint(0, OUT, (BATCH,), generator=noise)


def looped(W: Tensor, factors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(W, the mean model) after all steps: W ← W + mean(U(k−1) − U(k−2)) at merge k, U = s·B A."""
    As = [nn.Parameter(A.clone()) for A, _ in factors]
    Bs = [nn.Parameter(B.clone()) for _, B in factors]
    optimizer = torch.optim.AdamW([*As, *Bs], lr=LR, weight_decay=0.0)
    given = [torch.zeros_like(W) for _ in factors]  # what W has of each head
    under_way: list[Tensor] | None = None
    size = BATCH // HEADS
    for step in range(STEPS):
        x, y = data(step)
        loss = torch.zeros((), dtype=torch.float64)
        for h in range(HEADS):
            rows = slice(h * size, (h + 1) * size)
            own = W + SCALE * Bs[h] @ As[h] - given[h]
            loss = loss + F.cross_entropy(x[rows] @ own.T, y[rows], reduction="sum") / BATCH
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            if under_way is not None:
                W = W + sum(U - V for U, V in zip(under_way, given, strict=True)) / HEADS
                given = under_way
            under_way = [(SCALE * B @ A).detach() for A, B in zip(As, Bs, strict=True)]
    mean = W + sum(SCALE * (B @ A).detach() - V for A, B, V in zip(As, Bs, given, strict=True)) / HEADS
    return W, mean


def trained(steps: int, resume_at: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, OUT, bias=False)).double()
    method = lowrank.methods.lte(
        "all-linear", rank=RANK, heads=HEADS, alpha=SCALE * RANK, merge_every=EVERY, overlap=True, rest="freeze"
    )
    plan = lowrank.apply_(model, method)
    opt = plan.optimizer(lr=LR)
    for step in range(steps):
        if step == resume_at:
            state, moments = model.state_dict(), opt.state_dict()
            fresh = nn.Sequential(nn.Linear(WIDE, OUT, bias=False)).double()
            plan = lowrank.apply_(fresh, method)
            opt = plan.optimizer(lr=LR)
            fresh.load_state_dict(state)
            opt.load_state_dict(moments)
            model = fresh
        x, y = data(step)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return model


def test_it_is_the_loops() -> None:
    start = trained(0)
    adapter = start[0].adapters["all"]  # type: ignore[index]
    factors = [(adapter.A[h].detach(), adapter.B[h].detach()) for h in range(HEADS)]  # type: ignore[union-attr, index]
    W, mean = looped(start[0].weight.detach(), factors)  # type: ignore[union-attr, operator]
    model = trained(STEPS)
    torch.testing.assert_close(model[0].weight.detach(), W, rtol=1e-10, atol=1e-10)  # type: ignore[union-attr, index]
    plain = lowrank.merge_and_unload(model)
    torch.testing.assert_close(plain[0].weight.detach(), mean, rtol=1e-10, atol=1e-10)  # type: ignore[union-attr, index]


def test_it_goes_on_from_a_state_dict_with_a_merge_under_way() -> None:
    straight, resumed = trained(STEPS), trained(STEPS, resume_at=4)
    for mine, theirs in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
