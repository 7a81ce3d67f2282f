"""A new optimizer in one file: Lion (Chen et al., arXiv 2302.06675), plain, and in the subspaces of GaLore.

    lowrank train gpt-mini --method examples/new_optimizer.py:method --lr 3e-4
    lowrank train gpt-mini --method examples/new_optimizer.py:method --method.rank 32

    u ← sign(β₁ m + (1 − β₁) g),    m ← β₂ m + (1 − β₂) g

A rule is a frozen dataclass with ``init`` and ``update``. All else follows: per-layer steps, bfloat16 weights, saving,
merging adapters, several ranks. ``element_wise`` and ``transport_`` add to it sharded parameters and moving bases.
``tests/contract/test_rules.py`` holds it to what every rule must do, by one line in its list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

import lowrank
from lowrank.optim import Projected, Rule, State
from lowrank.optim.rules import Move, wide


@dataclass(frozen=True)
class Lion(Rule):
    """State: ``exp_avg`` (the parameter's shape), 4 bytes a number: half of AdamW's.

    Args:
        betas: the weight of the first moment in a step, and its decay, each in [0, 1).
    """

    betas: tuple[float, float] = (0.9, 0.99)

    element_wise = True  # a number's step depends on that number's gradients alone

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be two numbers in [0, 1)")

    def init(self, like: Tensor) -> State:
        return {"exp_avg": torch.zeros_like(like, dtype=wide(like.dtype))}

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        g, m = g.to(wide(g.dtype)), cast(Tensor, state["exp_avg"])
        direction = m.lerp(g, 1 - self.betas[0]).sign_()
        m.lerp_(g, 1 - self.betas[1])
        return direction, 1.0

    def transport_(self, state: State, like: Tensor, move: Move) -> None:
        m = cast(Tensor, state["exp_avg"])
        m.copy_(move(m, 1))


def method(
    target_modules: str = "all-linear", *, rank: int | None = None, refresh_every: int = 200, scale: float = 1.0
) -> lowrank.Method:
    """Lion for every parameter; with a ``rank`` the target modules' matrices are stepped in a subspace of it."""
    rules = [lowrank.Use("*", Lion())]
    if rank is not None:
        projected = Projected(inner=Lion(), rank=rank, refresh_every=refresh_every, scale=scale, transport="rotate")
        rules.insert(0, lowrank.Use(target_modules, projected))
    return lowrank.Method(name="lion", rules=tuple(rules), rest="train")
