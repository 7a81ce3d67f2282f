"""LoRA (arXiv 2106.09685), with one head or many: W + (s/N) Σ_h B_h A_h.

* scale: s = alpha / rank, or alpha / √rank (rsLoRA, arXiv 2312.03732). True division: alpha below the rank is allowed.
* heads share the batch (multi-head LoRA) or split it (LTE, arXiv 2402.16828); the mean over heads is the paper's s/N.
* init: how A starts; B starts at zero, except for ``pissa``.

      kaiming     U(−1/√in, 1/√in), as in LoRA's reference code
      orthogonal  semi-orthogonal rows times √(out/in), the LTE paper's
      reference   semi-orthogonal rows times √(in/rank), the LTE code's, which goes with its alpha of 4096
      pissa       B⁰A⁰ from the leading singular vectors of W (arXiv 2404.02948). PiSSA puts W − s·B⁰A⁰ in the place of
                  W; here W stays and B⁰A⁰ is kept and subtracted: the same function, W untouched.

* reset-less merging (LTE): the factors go on; the copy (A⁰, B⁰) kept at the merge is subtracted, W x + s(B A − B⁰A⁰) x,
  as one product of twice the rank, B A − B⁰A⁰ = (B − B⁰) A + B⁰ (A − A⁰). So written it is exactly zero right after a
  merge, and loses nothing in bfloat16 to the cancellation of two large products.
* merging with a restart (ReLoRA): A is drawn anew and B is zero.

New factors come from the stream (seed, layer, head, merge count): they do not depend on which rank draws them. Over
several workers (``split_adapter``) split heads are divided between them, and ``heads`` counts those of this one.

Shapes: W (out, in), A (heads, rank, in), B (heads, out, rank), x (batch, ..., in).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.adapter import Additive, Site, shard_sizes
from lowrank.adapters.low_rank_product import SMALL, add_low_rank_, linear_low_rank, takes_kernel
from lowrank.adapters.split_adapter import SplitAdapter
from lowrank.infra.checks import check_choice, check_integer
from lowrank.infra.seeds import draw_normal, generator
from lowrank.linalg.kernels import chosen
from lowrank.linalg.rounding import wide
from lowrank.linalg.subspace import Subspace

Init = Literal["kaiming", "orthogonal", "reference", "pissa"]


@dataclass(frozen=True)
class LoRA:
    """Makes a ``LoRAAdapter`` for a linear layer; the hyper-parameters of LoRA and its relatives.

    Args:
        rank: of each head; at most the smaller side of the matrix.
        alpha: the scale is alpha / rank; None means alpha = rank.
        heads: how many pairs of factors; their changes are averaged.
        split: the heads split the batch between them (LTE) instead of all seeing it.
        rank_stabilised: the scale is alpha / √rank instead (rsLoRA).
        init: how the factors start: ``kaiming``, ``orthogonal``, ``reference`` or ``pissa`` (module docstring).
        dropout: probability of dropping a number of the adapter's input, in training.

    Raises:
        ValueError: a value out of its range, an unknown ``init``, ``pissa`` with several heads; when called, a rank
            above the smaller side of the matrix.
    """

    rank: int = 8
    alpha: float | None = None
    heads: int = 1
    split: bool = False
    rank_stabilised: bool = False
    init: Init = "kaiming"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_integer("rank", self.rank)
        check_integer("heads", self.heads)
        check_choice("init", self.init, Init)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha} must be above 0: at 0 the adapter would add and learn nothing")
        if self.init == "pissa" and self.heads > 1:
            raise ValueError("init='pissa' gives every head the same start; use heads=1, or another init")

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def __call__(self, linear: Site | nn.Module) -> LoRAAdapter:
        return LoRAAdapter(self, Site.of(linear))


class LoRAAdapter(Additive, SplitAdapter):
    """The factors of ``LoRA`` on one matrix: parameters A (heads, rank, in) and B (heads, out, rank)."""

    linear_in = ("B",)
    overlaps = True
    kept_A: Tensor
    kept_B: Tensor

    def __init__(self, config: LoRA, site: Site):
        smaller = min(site.in_features, site.out_features)
        if config.rank > smaller:
            raise ValueError(
                f"rank={config.rank} is above the smaller side of {site.name or 'the matrix'} "
                f"({site.out_features} × {site.in_features}); use a rank of at most {smaller}"
            )
        super().__init__(site, config.heads, split=config.split)
        self.config, self.keep, self.subtracts = config, site.keep, config.init == "pissa"
        kind: dict[str, Any] = {"dtype": wide(site.weight.dtype), "device": site.weight.device}
        self.A = nn.Parameter(torch.empty(self.heads, config.rank, site.in_features, **kind))
        self.B = nn.Parameter(torch.zeros(self.heads, site.out_features, config.rank, **kind))
        self.gathers_heads = self.packed_bytes(site.ranks, site.compression) is not None
        if self.keep or self.subtracts:
            # Where heads are gathered, every worker keeps what all of them have merged, so that it need never be sent.
            kept = config.heads if self.gathers_heads else self.heads
            self.register_buffer("kept_A", self.A.new_zeros(kept, *self.A.shape[1:], requires_grad=False))
            self.register_buffer("kept_B", self.B.new_zeros(kept, *self.B.shape[1:], requires_grad=False))
        if not site.weight.is_meta:
            self._start(site.weight)

    @torch.no_grad()
    def _start(self, W: Tensor) -> None:
        if self.config.init == "pissa":
            U, S, Vh = torch.linalg.svd(W.detach().to(self.A.dtype), full_matrices=False)
            root, r = (S[: self.config.rank] / self.config.scale).sqrt(), self.config.rank
            self.A.copy_((root[:, None] * Vh[:r])[None])
            self.B.copy_((U[:, :r] * root)[None])
            self._keep()
        else:
            self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """Draw A anew for every head here, and set B to zero."""
        count = int(self.merges)
        for h in range(self.heads):
            self.A[h].copy_(self._draw_head(self.first_head + h, count))
        self.B.zero_()

    def _draw_head(self, head: int, count: int) -> Tensor:
        rank, inputs, outputs = self.config.rank, self.A.shape[2], self.B.shape[1]
        stream = (self.seed, self.name, head, count)
        if self.config.init in ("kaiming", "pissa"):
            bound = inputs**-0.5
            return torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator("cpu", *stream))
        Q, R = torch.linalg.qr(draw_normal((inputs, rank), *stream))
        Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)  # the factor is unique only up to these signs
        factor = (outputs / inputs) if self.config.init == "orthogonal" else (inputs / rank)
        return Q.mT * factor**0.5

    # --- forward -------------------------------------------------------------------------------------------------

    def add_(self, y: Tensor, x: Tensor, start: int = 0) -> Tensor:
        if self.training and self.config.dropout > 0:
            x = F.dropout(x, self.config.dropout)
        A, B = self._factors()
        if self.training and self.split and self.heads > 1:
            return add_low_rank_(y, x, A, B, self.config.scale, shard_sizes(x.shape[0], self.heads), start)
        return add_low_rank_(y, x, A, B, self.config.scale / self.heads, [x.shape[0]], start)

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        if chosen("layer", x) and takes_kernel(x, W):
            varies = self.config.dropout > 0 or (self.split and self.heads > 1)
            if not (varies and self.training):
                return linear_low_rank(x, W, bias, *self.factors())
        return self.add_(F.linear(x, W, bias), x)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Factors (heads, R, in) and (heads, out, R) of the change Σ_h B_h A_h.

        R = rank, or 2·rank where kept factors are subtracted.
        """
        held: Any = self._parameters  # where Module.__getattr__ would look last
        A, B = held["A"], held["B"]
        if not self.subtracts:
            return A, B
        kept_A, kept_B = self._buffers["kept_A"], self._buffers["kept_B"]
        assert kept_A is not None
        assert kept_B is not None
        if kept_A.shape[0] != self.heads:
            kept_A, kept_B = kept_A[self._own], kept_B[self._own]
        return torch.cat([A, A - kept_A], dim=1), torch.cat([B - kept_B, kept_B], dim=2)

    @property
    def _own(self) -> slice:
        """Where the heads here stand among the kept factors."""
        first = self.first_head if len(self.kept_A) == self.all_heads else 0
        return slice(first, first + self.heads)

    def rows(self, ids: Tensor, W: Tensor) -> Tensor:
        A, B = self._factors()
        base = F.embedding(ids, W)
        if self.training and self.split and self.heads > 1:
            shards = ids.split(shard_sizes(ids.shape[0], self.heads))
            change = torch.cat([F.embedding(shard, B[h]) @ A[h] for h, shard in enumerate(shards)])
            return base + (self.config.scale * change).to(base.dtype)
        change = F.embedding(ids, B.transpose(0, 1).flatten(1)) @ A.flatten(0, 1)
        return base + (self.config.scale / self.heads * change).to(base.dtype)

    # --- merging -------------------------------------------------------------------------------------------------

    def delta(self) -> Tensor:
        """(s/N) Σ_h (B_h A_h − B⁰_h A⁰_h) of the N heads here, (out, in), in the factors' dtype.

        Exactly zero right after a merge that keeps the factors.
        """
        A, B, scale = self.factors()
        return B @ A * scale

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A (R, in), B (out, R) and s/N with the change (s/N) B A: the factors of all heads beside each other."""
        A, B = self._factors()
        return A.flatten(0, 1), B.transpose(0, 1).flatten(1), self.config.scale / self.heads

    def merged(self, W: Tensor) -> Tensor:
        return (W.to(self.A.dtype) + self.delta()).to(W.dtype)

    @torch.no_grad()
    def settle_(self) -> None:
        self.merges += 1
        if self.keep:
            self._keep()
        else:
            self._draw()
            self.subtracts = False

    def _keep(self) -> None:
        self.kept_A[self._own].copy_(self.A)
        self.kept_B[self._own].copy_(self.B)
        self.subtracts = True

    @torch.no_grad()
    def settle_merged_(
        self, packed: Mapping[str, Tensor] | None, subspace: Subspace | None, left: Tensor | None = None
    ) -> None:
        merged = self.pack() if packed is None and "sent" in self._buffers else packed
        if merged is None or not self.keep:
            self.settle_()
            return
        self.merges += 1
        self.kept_A.copy_(merged["A"])
        self.kept_B.copy_(merged["B"])
        self.subtracts = True

    def known(self) -> dict[str, Tensor]:
        if not self.keep:
            return super().known()
        if int(self.merges):
            return {"A": self.kept_A.clone(), "B": self.kept_B.clone()}
        drawn = torch.stack([self._draw_head(h, 0) for h in range(self.all_heads)])  # as every head has begun
        return {"A": drawn.to(self.kept_A), "B": torch.zeros_like(self.kept_B)}

    @torch.no_grad()
    def restart_(self, heads: Sequence[int]) -> None:
        count = int(self.merges)
        for h in heads:
            drawn, here = self._draw_head(h, count), h - self.first_head
            if 0 <= here < self.heads:
                self.A[here].copy_(drawn)
                self.B[here].zero_()
            if self.keep and (self.gathers_heads or 0 <= here < self.heads):
                kept = h if self.gathers_heads else here
                self.kept_A[kept].copy_(drawn)
                self.kept_B[kept].zero_()

    def row_norms(self, W: Tensor) -> Tensor:
        """As in ``Adapter``, from the factors: ‖w + δ‖² = ‖w‖² + 2⟨w, δ⟩ + ‖δ‖² for each row, without a dense Δ where
        that would not be small."""
        W = W.to(self.A.dtype)
        A, B, scale = self.factors()
        if W.numel() <= SMALL:
            return torch.linalg.vector_norm(torch.addmm(W, B, A, alpha=scale), dim=1)
        B = B * scale
        cross = ((W @ A.mT) * B).sum(dim=1)
        own = ((B @ (A @ A.mT)) * B).sum(dim=1)
        return (W.square().sum(dim=1) + 2 * cross + own).clamp_min(0).sqrt()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.subtracts = self.config.init == "pissa" and not (int(self.merges) and not self.keep)
        self.subtracts |= self.keep and int(self.merges) > 0

    def extra_repr(self) -> str:
        return f"{self.config}, out={self.B.shape[1]}, in={self.A.shape[2]}"
