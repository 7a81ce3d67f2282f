"""A noisy quadratic on which rules are tried, and a rule's state as a flat table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank.optim.state import leaves, mapped


class Quadratic:
    """½‖p − target‖² with noise in its gradients, which are a function of (p, step)."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, noise: float = 0.1):
        self.start, self.target = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.noise = noise

    def gradient(self, p: Tensor, step: int) -> Tensor:
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(step + 1)).to(p.dtype)
        return p - self.target + self.noise * noise

    def run(
        self,
        rule: Any,
        steps: int,
        *,
        in_place: bool = True,
        lr: float = 0.02,
        decay: float = 0.1,
        p: Tensor | None = None,
        state: Any = None,
        begin: int = 0,
    ) -> tuple[Tensor, Any]:
        """The parameter and the state after ``steps``, by ``apply_`` or by the definition."""
        p = self.start.clone() if p is None else p
        if state is None:
            state = rule.init(p)
            rule.place_(state, 0)
        for step in range(begin, begin + steps):
            g = self.gradient(p, step)
            if in_place:
                rule.apply_([p], [g], [state], lr=lr, decay=decay)
            else:
                rule.observe_(p, state)
                direction, gain = rule.update(g, state)
                p = p * (1 - lr * decay) - lr * gain * direction
        return p, state


def state_bytes(state: Any) -> int:
    return sum(t.numel() * t.element_size() for _, t in leaves(state))


def cloned(state: Any) -> Any:
    return mapped(state, lambda _, t: t.clone())
