"""Muon: momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982).

    M ← μM + (1 − μ)G,   N = (1 − μ)G + μM,   U = NS(N) ≈ (N Nᵀ)^(−1/2) N,   W ← W(1 − ηλ) − η·c·U

    NS: X₀ = N / ‖N‖_F,   X ← aX + (b·XXᵀ + c·(XXᵀ)²)X   five times, from the shorter side

The coefficients bring singular values near 1 (0.7 to 1.2) fast, not to 1. ``scale`` is c, by shape:

    rms       0.2·√max(out, in)    steps have the root mean square of AdamW's, whose learning rate and decay then serve
                                   (arXiv 2502.16982); so one learning rate does for all rules of a model
    keller    √max(1, out/in)      Jordan's own
    spectral  √(out/in)            unit steps in the norm from RMS to RMS (Bernstein 2025, "Deriving Muon")
    none      1

Equal to ``torch.optim.Muon`` for matrices at ``precision="bfloat16"``. Beyond it: stacks of matrices, convolutions,
fused q, k, v each by itself, shards (FSDP2), and vectors by a rule of their own. Deviation: float32 by default, since
arithmetic here is never narrower; bfloat16 is faster on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank.infra.checks import check_choice, check_integer
from lowrank.linalg.kernels import chosen
from lowrank.optim.normalised import NormalisedMomentum

MuonScale = Literal["rms", "keller", "spectral", "none"]
Precision = Literal["float32", "bfloat16"]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True, kw_only=True)
class Muon(NormalisedMomentum):
    """Muon as an update rule (module docstring).

    Args:
        momentum, nesterov, vectors, stack, transposed, parts: as in ``NormalisedMomentum``.
        iterations: of Newton and Schulz.
        coefficients: (a, b, c) of an iteration.
        scale: what steps are multiplied by, by shape: ``rms``, ``keller``, ``spectral`` or ``none``.
        precision: what the iteration computes in, ``float32`` (float64 for float64 parameters) or ``bfloat16``.
        eps: the least norm that is divided by.

    Raises:
        ValueError: a value out of its range, or an unknown word.
    """

    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5
    coefficients: tuple[float, float, float] = COEFFICIENTS
    scale: MuonScale = "rms"
    precision: Precision = "float32"
    eps: float = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("iterations", self.iterations)
        check_choice("scale", self.scale, MuonScale)
        check_choice("precision", self.precision, Precision)

    def gain(self, out_features: int, in_features: int) -> float:
        return gain_by_shape(self.scale, out_features, in_features)

    def direction(self, m: Tensor) -> Tensor:
        x = m.to(torch.bfloat16) if self.precision == "bfloat16" else m
        return orthogonalised(x, self.iterations, self.coefficients, self.eps).to(m.dtype)


def gain_by_shape(scale: MuonScale, out_features: int, in_features: int) -> float:
    """What an orthogonal step on a matrix of this size is multiplied by (module docstring)."""
    return {
        "rms": 0.2 * max(out_features, in_features) ** 0.5,
        "keller": max(1.0, out_features / in_features) ** 0.5,
        "spectral": (out_features / in_features) ** 0.5,
        "none": 1.0,
    }[scale]


def orthogonalised(
    m: Tensor, iterations: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = 1e-7
) -> Tensor:
    """Roughly the nearest matrix with orthonormal rows or columns, for each matrix of a stack (..., rows, cols)."""
    a, b, c = coefficients
    symmetric: Any = _symmetric
    if chosen("newton_schulz", m):
        from lowrank.linalg.kernels.symmetric_product import symmetric
    x = m.mT if m.shape[-2] > m.shape[-1] else m
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    x = x.flatten(0, -3) if x.dim() > 3 else x
    add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(iterations):
        gram = symmetric(x)
        x = add(x, symmetric(gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if m.shape[-2] > m.shape[-1] else x).reshape(m.shape)


def _symmetric(x: Tensor, add: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """α·x xᵀ + β·add."""
    if add is None:
        return x @ x.mT
    return (torch.addmm if x.dim() == 2 else torch.baddbmm)(add, x, x, beta=beta, alpha=alpha)
