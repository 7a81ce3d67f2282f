"""Dion: an orthonormal step of low rank, from a momentum that keeps what the step left out (arXiv 2504.05295, alg. 1).

    B = M + G,   P = QR(B Q),   R = BᵀP,   M ← B − (1 − μ) P Rᵀ,   Q ← R with columns of norm 1,   U = P Qᵀ

One power iteration a step, started at the last step's Q, finds the leading singular vectors of the momentum; of what
they hold a share μ stays in it, and all that they leave out (error feedback). So a step costs two products with the
momentum and one QR of a matrix (out, rank), where Muon orthogonalises all of it. ``scale`` is by shape as Muon's
(``optim.muon``): ``spectral``, √(out/in), is the paper's.

Deviations: QR is Householder's, where the authors' code has a randomised Cholesky; the first Q is random and
orthonormal, drawn from the parameter's number; each of fused q, k, v by itself.

State: ``momentum`` (the parameter's shape) and ``basis``, in·rank numbers a matrix, rank ≤ min(out, in); of a vector,
that of the rule ``vectors``.

Shape legend: G, B, M, U (..., out, in);  P (..., out, rank);  Q, R (..., in, rank).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from lowrank.infra.checks import check_choice
from lowrank.linalg.basis import orthonormalise, random_basis
from lowrank.optim.muon import MuonScale, gain_by_shape
from lowrank.optim.normalised import LayerRule
from lowrank.optim.rules import AdamW, Rule, State
from lowrank.optim.storage import wide


@dataclass(frozen=True, kw_only=True)
class Dion(LayerRule):
    """Dion as an update rule (module docstring).

    Args:
        rank: of the step; at most min(out, in) of it is used.
        momentum: μ, the share of what was stepped along that stays, in [0, 1).
        scale: what steps are multiplied by, by shape: ``rms``, ``keller``, ``spectral`` or ``none``.
        vectors, stack, transposed, parts: as in ``LayerRule``.

    Raises:
        ValueError: a value out of its range, or an unknown word.
    """

    rank: int = 128
    momentum: float = 0.95
    scale: MuonScale = "spectral"
    vectors: Rule = field(default_factory=AdamW)
    stack: bool = True
    transposed: bool = False
    parts: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1)")
        check_choice("scale", self.scale, MuonScale)

    def init(self, like: Tensor) -> State:
        if like.dim() < 2:
            return self.vectors.init(like)
        shape = self.taken_apart(like.new_empty(()).expand(like.shape)).shape
        basis = torch.zeros(
            *shape[:-2], shape[-1], min(self.rank, *shape[-2:]), dtype=wide(like.dtype), device=like.device
        )
        return {"momentum": torch.zeros_like(like, dtype=wide(like.dtype)), "basis": basis}

    def place_(self, state: State, index: int) -> None:
        """Draw the first Q."""
        if "basis" not in state:
            self.vectors.place_(state, index)
            return
        basis = cast(Tensor, state["basis"])
        side, rank = basis.shape[-2:]
        basis.copy_(random_basis(side, rank, basis, index))

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        if g.dim() < 2:
            return self.vectors.update(g, state)
        momentum, basis = cast(Tensor, state["momentum"]), cast(Tensor, state["basis"])
        b = self.taken_apart(momentum.add_(g))
        p, _ = orthonormalise(b @ basis)
        r = b.mT @ p
        momentum.sub_(self.put_together(p @ r.mT, g.shape), alpha=1 - self.momentum)
        norms = torch.linalg.vector_norm(r, dim=-2, keepdim=True)
        basis.copy_(r / torch.where(norms > 0, norms, 1))
        return self.put_together(p @ basis.mT, g.shape), gain_by_shape(self.scale, *b.shape[-2:])
