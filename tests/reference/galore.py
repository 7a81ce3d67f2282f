"""The projected optimizers, written out from the papers in float64, one matrix and one step after another.

Nothing here is shared with the library: plain loops over the formulas, against which the library is held.

    GaLore  arXiv 2403.03507, algorithm 2;  APOLLO  arXiv 2412.05270, algorithm 1;  Fira  arXiv 2410.01623, algorithm 1
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def adam_direction(r: Tensor, m: Tensor, v: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Moments, m / (√v + ε√c₂) and √c₂ / c₁: ``torch.optim.AdamW``'s step with bias correction pulled out."""
    m = 0.9 * m + 0.1 * r
    v = 0.999 * v + 0.001 * r * r
    c1, c2 = 1 - 0.9**t, 1 - 0.999**t
    return m, v, m / (v.sqrt() + 1e-8 * math.sqrt(c2)), math.sqrt(c2) / c1


def limited(u: Tensor, last: float) -> tuple[Tensor, float]:
    """The norm-growth limiter with γ = 1.01; ``last`` is 0 before the first step."""
    norm = float(u.norm())
    if last > 0 and norm > 1.01 * last:
        u, norm = u * (1.01 * last / norm), 1.01 * last
    return u, norm


def train(
    weight: Tensor,
    gradients: list[Tensor],
    *,
    method: str,
    rank: int,
    every: int,
    scale: float,
    lr: float,
    decay: float,
    share: float = 0.0,
) -> Tensor:
    """The weight after all ``gradients``; ``method`` is galore, apollo or fira, with exact bases of the short side.

    ``share`` above 0: error feedback, with that share of what is in the subspace dealt with (1: LDAdam, 2410.16103).
    """
    w = weight.double().clone()
    left = w.shape[0] < w.shape[1]  # of a square the columns are projected
    m = v = torch.zeros(())
    last, error = 0.0, torch.zeros_like(w)
    for t, gradient in enumerate(gradients, start=1):
        gradient = gradient.double() + error
        g = gradient if left else gradient.T
        if (t - 1) % every == 0:
            q = torch.linalg.svd(gradient, full_matrices=False)
            basis = q[0][:, :rank] if left else q[2][:rank].T
        r = basis.T @ g
        if share:
            error = g - share * basis @ r
            error = error if left else error.T
        m, v, s, gain = adam_direction(r, m, v, t)
        lengths = torch.stack([s[:, j].norm() / r[:, j].norm() for j in range(r.shape[1])])
        if method == "galore":
            u = basis @ s
        elif method == "apollo":
            u, last = limited(g * lengths, last)
        else:
            outside, last = limited((g - basis @ r) * lengths, last)
            u = basis @ s + outside
        w = w * (1 - lr * decay) - lr * gain * scale * (u if left else u.T)
    return w


def lora_with_frozen_basis(weight: Tensor, targets: Tensor, basis: Tensor, *, steps: int, lr: float) -> Tensor:
    """W + Q B with Q fixed, B trained by SGD on ½‖W + QB − target‖²: what GaLore is within one window."""
    w, q, target = weight.double(), basis.double(), targets.double()
    b = torch.zeros(q.shape[1], w.shape[1], dtype=torch.float64)
    for _ in range(steps):
        b = b - lr * (q.T @ (w + q @ b - target))
    return w + q @ b
