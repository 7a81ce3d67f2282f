"""Rules on the product BA: what a step does to BA does not depend on how BA is split between B and A.

Each factor steps beside the other, O, from its gradient G, all with the rank last:

    for B   O = Aᵀ (in, rank),  G = ∂B (out, rank)          for A   O = B (out, rank),  G = ∂Aᵀ (in, rank)
    O = U R,   R = (OᵀO)^½                                   polar: U is orthonormal, and O·C has the same span

``LoraRite`` (arXiv 2410.20625, algorithm 1) is Adam with matrices for second moments, in coordinates of U, which turn
with it:

    Ḡ = G R⁻¹,   T = UᵀU_old,   V ← β₂ T V Tᵀ + (1 − β₂) ḠᵀḠ/rows,   ρ ← β₂ (ρ + d(V, T V Tᵀ)),
    M ← β₁ M Tᵀ + (1 − β₁) Ḡ (V + ρI)^(−½),   step M R⁻ᵀ

where d is the largest fall of an ordered eigenvalue: what the turn has lost. Decays are corrected for the start at 0
(β(1 − βᵗ⁻¹)/(1 − βᵗ)). As in the authors' code second moments are means over the rows, so that entries of M are as
large as Adam's; its clipping and skipping of gradients are left out.

``LoraMuon`` (arXiv 2606.12921) is Muon's step on BA, half of it by each factor:

    M ← μM + (1 − μ)G,   step ½·c·NS(M R⁻¹) R⁻¹

with Muon's scale by shape c (the paper's is ``none``) and its Newton–Schulz iteration. Deviation: no decay of its own
(the paper splits the decay of BA between the factors); the catalogue's methods do not decay factors.

Both: where a factor is zero, as B is at the start, the other makes no step; R⁻¹ is bounded at 10⁴ times its least.

State: (in + out)·rank numbers a head for ``LoraMuon``; twice that, 2·rank² and 2 for ``LoraRite``; and 8 bytes for the
count of steps.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lowrank.infra.checks import check_choice
from lowrank.optim.muon import MuonScale, gain_by_shape, orthogonalised
from lowrank.optim.pairs import Pair, PairRule
from lowrank.optim.rules import AdamW, State
from lowrank.optim.storage import wide

FLOOR = 1e-8  # the least eigenvalue that is inverted, as a share of the largest


class ProductRule(PairRule):
    """A rule that treats B and Aᵀ alike: each steps by ``factor_step``, at the t-th step of the pair."""

    @abstractmethod
    def factor_state(self, own: Tensor, other: Tensor) -> State:
        """Fresh state for a factor like ``own`` (..., rows, rank) beside ``other`` (..., cols, rank)."""

    @abstractmethod
    def factor_step(self, g: Tensor, other: Tensor, state: State, t: int) -> Tensor:
        """The direction (..., rows, rank) for a factor whose gradient is ``g``."""

    def init(self, factors: Pair) -> State:
        A, B = (p.new_empty((), dtype=wide(p.dtype)).expand(p.shape) for p in factors)
        step = torch.zeros((), dtype=torch.int64, device="cpu")
        return {"A": self.factor_state(A.mT, B), "B": self.factor_state(B, A.mT), "step": step}

    def update(self, factors: Pair, grads: Pair, state: State) -> tuple[Pair, Tensor | float]:
        A, B, a, b = (t.to(wide(t.dtype)) for t in (*factors, *grads))
        t = int(cast(Tensor, state["step"]).add_(1))
        of_a = self.factor_step(a.mT, B, cast(State, state["A"]), t).mT
        return (of_a, self.factor_step(b, A.mT, cast(State, state["B"]), t)), self.gain(B.shape[-2], A.shape[-1])

    def gain(self, out_features: int, in_features: int) -> float:
        """What the step on a product (out, in) is multiplied by."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class LoraRite(ProductRule):
    """LoRA-RITE as a rule for pairs (module docstring).

    Args:
        betas: decay of the first moment, and of the second and what escaped from it, each in [0, 1).

    Raises:
        ValueError: a value out of its range.
    """

    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        AdamW(betas=self.betas)  # refuses what it cannot have

    def factor_state(self, own: Tensor, other: Tensor) -> State:
        rank, lead = own.shape[-1], own.shape[:-2]
        shapes = {"exp_avg": own.shape, "basis": other.shape, "second": (*lead, rank, rank), "escaped": lead}
        return {name: own.new_zeros(shape) for name, shape in shapes.items()}

    def factor_step(self, g: Tensor, other: Tensor, state: State, t: int) -> Tensor:
        m, basis, v, escaped = (cast(Tensor, state[name]) for name in ("exp_avg", "basis", "second", "escaped"))
        decay1, decay2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in self.betas)
        root = inverse_root(gram(other))
        now, plain = (other.double() @ root).to(m.dtype), (g.double() @ root).to(m.dtype)
        turn = now.mT @ basis
        turned = turn @ v @ turn.mT
        before, after = (torch.linalg.eigvalsh(square.double()) for square in (v, turned))  # a small difference of them
        fall = (before - after).amax(dim=-1).clamp(min=0).to(m.dtype)
        escaped.copy_((escaped + fall) * decay2)
        v.copy_(turned * decay2 + plain.mT @ plain * ((1 - decay2) / plain.shape[-2]))
        whiten = inverse_root(v.double(), escaped.double()).to(m.dtype)
        m.copy_((m @ turn.mT) * decay1 + plain @ whiten * (1 - decay1))
        basis.copy_(now)
        return m @ root.to(m.dtype)


@dataclass(frozen=True, kw_only=True)
class LoraMuon(ProductRule):
    """LoRA-Muon as a rule for pairs (module docstring).

    Args:
        momentum: decay of the mean of gradients, in [0, 1).
        scale: what steps are multiplied by, by the shape of BA: ``rms``, ``keller``, ``spectral`` or ``none``.

    Raises:
        ValueError: a value out of its range, or an unknown word.
    """

    momentum: float = 0.95
    scale: MuonScale = "rms"

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1)")
        check_choice("scale", self.scale, MuonScale)

    def factor_state(self, own: Tensor, other: Tensor) -> State:
        return {"momentum_buffer": own.new_zeros(own.shape)}

    def gain(self, out_features: int, in_features: int) -> float:
        return gain_by_shape(self.scale, out_features, in_features) / 2

    def factor_step(self, g: Tensor, other: Tensor, state: State, t: int) -> Tensor:
        m = cast(Tensor, state["momentum_buffer"]).lerp_(g, 1 - self.momentum)
        root = inverse_root(gram(other)).to(m.dtype)
        return orthogonalised(m @ root) @ root


def gram(factor: Tensor) -> Tensor:
    """OᵀO (..., rank, rank) in float64, since its condition is the square of the factor's."""
    wide_factor = factor.double()
    return wide_factor.mT @ wide_factor


def inverse_root(square: Tensor, more: Tensor | None = None) -> Tensor:
    """(square + more·I)^(−½) of symmetric matrices (..., n, n), bounded (``FLOOR``); 0 where all is 0."""
    values, vectors = torch.linalg.eigh(square)
    values = values if more is None else values + more[..., None]
    most = values.amax(dim=-1, keepdim=True)
    roots = torch.where(most > 0, torch.maximum(values, FLOOR * most).rsqrt(), 0)
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT
