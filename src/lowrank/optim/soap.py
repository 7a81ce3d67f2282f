"""SOAP: Adam in the eigenbasis of Shampoo's two preconditioners (Vyas et al., arXiv 2409.11321, algorithms 3 and 4).

    M ← β₁M + (1 − β₁)G,   V ← β₂V + (1 − β₂)(PᵀGQ)²,   U = P (PᵀMQ / (√V + ε)) Qᵀ,   bias corrected as in Adam
    L ← β₂L + (1 − β₂)GGᵀ,   R ← β₂R + (1 − β₂)GᵀG,   every k steps P ← QR(L P), Q ← QR(R Q)

A side longer than ``largest`` has no basis (P or Q is the identity); with neither the rule is Adam. The first gradient
makes the bases, by a full decomposition, and no step, as in the authors' code: in its own basis a gradient is diagonal,
and Adam would make of the rounding beside the diagonal steps as long as any other.

Deviation, as in the authors' code too: before QR the vectors are put in the order of the eigenvalues that they have
now, and V with them, since power iteration finds the leading vector first. What is stored fused or transposed is one
matrix as it lies: the two sides are treated alike.

State: ``exp_avg``, ``exp_avg_sq`` (the parameter's shape), for each side that has a basis ``gram`` and ``basis`` (side,
side), and the count of steps (8 bytes on the CPU).

Shape legend: G, M, V, U (..., m, n);  L, P (..., m, m);  R, Q (..., n, n).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lowrank.linalg.basis import Side, iterated
from lowrank.linalg.subspace import Subspace
from lowrank.optim.normalised import MatrixRule
from lowrank.optim.rules import AdamW, Rule, State
from lowrank.optim.storage import wide


@dataclass(frozen=True, kw_only=True)
class Soap(MatrixRule):
    """SOAP as an update rule (module docstring).

    Args:
        betas: decay of the first moment, and of the second and both preconditioners, each in [0, 1).
        eps: added to the root of the second moment, after bias correction.
        refresh_every: steps between two refreshes of the bases.
        largest: a side longer than this has no basis.
        vectors, stack: as in ``MatrixRule``.

    Raises:
        ValueError: a value out of its range.
    """

    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = 1e-8
    refresh_every: int = 10
    largest: int = 10_000
    vectors: Rule = field(default_factory=AdamW)
    stack: bool = True

    def __post_init__(self) -> None:
        AdamW(betas=self.betas, eps=self.eps)  # refuses what it cannot have
        for name in ("refresh_every", "largest"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def init(self, like: Tensor) -> State:
        if like.dim() < 2:
            return self.vectors.init(like)
        like = self.as_matrices(like.new_empty(()).expand(like.shape))
        zeros = torch.zeros(like.shape, dtype=wide(like.dtype), device=like.device)
        state: State = {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        for side, size in (("left", like.shape[-2]), ("right", like.shape[-1])):
            if size <= self.largest:
                gram = zeros.new_zeros(*like.shape[:-2], size, size)
                state[side] = {"gram": gram, "basis": gram.clone()}
        return {**state, "step": torch.zeros((), dtype=torch.int64, device="cpu")}

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        if g.dim() < 2:
            return self.vectors.update(g, state)
        shape, g = g.shape, self.as_matrices(g)
        m, v = cast(Tensor, state["exp_avg"]), cast(Tensor, state["exp_avg_sq"])
        t, (beta1, beta2) = int(cast(Tensor, state["step"]).add_(1)) - 1, self.betas
        u, gain = torch.zeros_like(g), 0.0
        if t:
            at = Subspace(**{side: cast(Any, state[side])["basis"] for side in ("left", "right") if side in state})
            turned = at.project(g)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
            correction = (1 - beta2**t) ** 0.5
            u = at.lift(at.project(m) / v.sqrt().add_(self.eps * correction))
            gain = correction / (1 - beta1**t)
        self._turn_(g, state, cold=t == 0, due=t % self.refresh_every == 0)
        return u.reshape(shape), gain

    def _turn_(self, g: Tensor, state: State, *, cold: bool, due: bool) -> None:
        """The preconditioners with this gradient, and the bases from them where they are due."""
        sides: tuple[Side, ...] = ("left", "right")
        for side in sides:
            if side not in state:
                continue
            gram, basis = (cast(Any, state[side])[name] for name in ("gram", "basis"))
            gram.lerp_(g @ g.mT if side == "left" else g.mT @ g, 1 - self.betas[1])
            if cold:
                basis.copy_(torch.linalg.eigh(gram)[1].flip(-1))
            elif due:
                order = (basis * (gram @ basis)).sum(dim=-2).argsort(dim=-1, descending=True, stable=True)
                basis.copy_(iterated(gram, basis.gather(-1, order[..., None, :].expand_as(basis))))
                v, along = cast(Tensor, state["exp_avg_sq"]), -2 if side == "left" else -1
                index = order.unsqueeze(-1) if side == "left" else order.unsqueeze(-2)
                v.copy_(v.gather(along, index.expand_as(v)))
