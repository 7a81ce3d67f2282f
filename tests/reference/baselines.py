"""The baselines' rules, written out from their papers in numpy and float64, one matrix and one step after another.

Nothing here is shared with the library. Each function takes a weight (out, in), gradients that do not depend on it, and
returns the weight after them all: W ← W(1 − lr·decay) − lr·U.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def descend(weight: Array, gradients: list[Array], lr: float, decay: float, step: Callable[[Array], Array]) -> Array:
    w = weight.copy()
    for g in gradients:
        w = w * (1 - lr * decay) - lr * step(g)
    return w


def newton_schulz(m: Array, iterations: int = 5) -> Array:
    """On the singular values, where the iteration x ← ax + bx³ + cx⁵ acts."""
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def muon(
    weight: Array,
    gradients: list[Array],
    lr: float,
    decay: float,
    *,
    momentum: float = 0.95,
    scale: Callable[[int, int], float] = lambda out, inn: 0.2 * max(out, inn) ** 0.5,
) -> Array:
    """Jordan et al. 2024 with Nesterov's momentum; the scale of arXiv 2502.16982, section 2.2."""
    kept = np.zeros_like(weight)

    def step(g: Array) -> Array:
        kept[:] = momentum * kept + (1 - momentum) * g
        return scale(*g.shape) * newton_schulz(momentum * kept + (1 - momentum) * g)

    return descend(weight, gradients, lr, decay, step)


def scale(weight: Array, gradients: list[Array], lr: float, decay: float, *, momentum: float = 0.0) -> Array:
    """SCALE, arXiv 2506.16659, algorithm 1."""
    kept = np.zeros_like(weight)

    def step(g: Array) -> Array:
        kept[:] = momentum * kept + (1 - momentum) * g
        return np.stack([column / np.sqrt((column**2).sum()) for column in kept.T], axis=1)

    return descend(weight, gradients, lr, decay, step)
