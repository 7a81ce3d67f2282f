"""Adafactor (arXiv 1804.04235): Adam's second moment as the outer product of its row and column means.

    row ← β row + (1−β) mean_j(g² + ε₁),   col ← β col + (1−β) mean_i(g² + ε₁),   β = 1 − t^decay_rate
    v = row colᵀ / mean(row),   u = g / √v,   u ← u / max(1, RMS(u) / clip_threshold)

The paper's step is u·max(ε₂, RMS(p))·ρ with ρ = min(0.01, 1/√t). Both factors are switches here and off by default,
so that the run's learning rate means what it means for every other rule; ``galore_torch`` has the reference's
defaults. The parameter's RMS is what ``observe_`` last saw (``apply_`` and ``Projected`` show it before each step).

State: row and col (for a vector its whole second moment), ``exp_avg`` with ``beta1``, the step count (8 bytes on the
CPU), and one number a matrix with ``scale_parameter``.

Shape legend: g, u (..., rows, cols);  row (..., rows);  col (..., cols);  leading dimensions are a stack of matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lowrank.linalg.rounding import wide
from lowrank.optim.rules import Move, Rule, State


@dataclass(frozen=True, kw_only=True)
class Adafactor(Rule):
    """Adafactor as an update rule (module docstring).

    Args:
        eps: the pair (ε₁, added to squared gradients; ε₂, the least parameter scale).
        clip_threshold: the largest RMS of an update.
        decay_rate: exponent of the second moment's decay, below 0.
        beta1: decay of a first moment of the updates, or None for none.
        scale_parameter: multiply the step by max(ε₂, RMS of the parameter).
        relative_step: multiply the step by min(0.01, 1/√t), t the step counted from 1.
        warmup_init: with ``relative_step``, multiply by min(1e-6·t, 1/√t) instead.

    Raises:
        ValueError: a value out of its range, or ``warmup_init`` without ``relative_step``.
    """

    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    scale_parameter: bool = False
    relative_step: bool = False
    warmup_init: bool = False

    refuses_capture = "decays by a count of steps on the host"

    def __post_init__(self) -> None:
        if len(self.eps) != 2 or not all(eps >= 0 for eps in self.eps):
            raise ValueError(f"eps={self.eps} must be two numbers that are not negative")
        if not self.clip_threshold > 0:
            raise ValueError(f"clip_threshold={self.clip_threshold} must be above 0")
        if not self.decay_rate < 0:
            raise ValueError(f"decay_rate={self.decay_rate} must be below 0 (the paper's is -0.8)")
        if self.beta1 is not None and not 0.0 <= self.beta1 < 1.0:
            raise ValueError(f"beta1={self.beta1} must lie in [0, 1), or be None for no first moment")
        if self.warmup_init and not self.relative_step:
            raise ValueError("warmup_init=True needs relative_step=True")

    def init(self, like: Tensor) -> State:
        zeros = torch.zeros(like.shape, dtype=wide(like.dtype), device=like.device)
        state: State = {"step": torch.zeros((), dtype=torch.int64, device="cpu")}
        if like.dim() >= 2:
            state |= {"exp_avg_sq_row": zeros[..., 0].clone(), "exp_avg_sq_col": zeros[..., 0, :].clone()}
        else:
            state["exp_avg_sq"] = zeros.clone()
        if self.beta1 is not None:
            state["exp_avg"] = zeros.clone()
        if self.scale_parameter:
            state["scale"] = torch.full(like.shape[:-2], self.eps[1], dtype=zeros.dtype, device=like.device)
        return state

    def observe_(self, param: Tensor, state: State) -> None:
        """Note the RMS of each matrix of ``param`` (..., rows, cols), at least ε₂, for the coming step."""
        if self.scale_parameter:
            scale = cast(Tensor, state["scale"])
            scale.copy_(_rms(param.to(scale.dtype)).view(scale.shape).clamp_(min=self.eps[1]))

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        g = g.to(wide(g.dtype))
        t = int(cast(Tensor, state["step"]).add_(1))
        beta = 1.0 - t**self.decay_rate
        u = self._whiten(g, state, beta)
        u.div_((_rms(u) / self.clip_threshold).clamp_(min=1.0))
        gain = self._gain(state, t, u.dim())
        if self.beta1 is None:
            return u, gain
        moment = cast(Tensor, state["exp_avg"])
        moment.mul_(self.beta1).add_(u.mul_(gain), alpha=1 - self.beta1)
        return moment.clone(), 1.0

    def transport_(self, state: State, like: Tensor, move: Move) -> None:
        if "exp_avg_sq_row" in state:
            row, col = cast(Tensor, state["exp_avg_sq_row"]), cast(Tensor, state["exp_avg_sq_col"])
            mean = row.mean(dim=-1)[..., None, None]
            product = row.unsqueeze(-1) * col.unsqueeze(-2)
            moved = move(torch.where(mean > 0, product / mean, 0), 2)
            row.copy_(moved.mean(dim=-1))
            col.copy_(moved.mean(dim=-2))
        if "exp_avg" in state:
            moment = cast(Tensor, state["exp_avg"])
            moment.copy_(move(moment, 1))

    def _whiten(self, g: Tensor, state: State, beta: float) -> Tensor:
        """g / √v, in a new tensor of g's shape."""
        squares = g.square().add_(self.eps[0])
        if "exp_avg_sq" in state:
            return cast(Tensor, state["exp_avg_sq"]).lerp_(squares, 1 - beta).rsqrt().mul_(g)
        row, col = cast(Any, state["exp_avg_sq_row"]), cast(Any, state["exp_avg_sq_col"])
        row.mul_(beta).add_(squares.mean(dim=-1), alpha=1 - beta)
        col.mul_(beta).add_(squares.mean(dim=-2), alpha=1 - beta)
        by_row = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        return torch.mul(by_row, col.rsqrt().unsqueeze(-2), out=squares).mul_(g)

    def _gain(self, state: State, t: int, dims: int) -> Tensor | float:
        relative = min(1e-6 * t if self.warmup_init else 1e-2, t**-0.5) if self.relative_step else 1.0
        if not self.scale_parameter:
            return relative
        scale = cast(Tensor, state["scale"])
        return relative * (scale[..., None, None] if dims >= 2 else scale)


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each matrix, (..., 1, 1); of a vector, (1,); of a number, its magnitude."""
    dims = tuple(range(-min(x.dim(), 2), 0))
    return torch.linalg.vector_norm(x, dim=dims or None, keepdim=True) / math.prod(x.shape[-2:]) ** 0.5
