"""Dense heads: a full-rank local change per head, W + D_h.

The low rank is in the update, not in the change: the rule that trains D is a projected one
(``lte_galore(kind="explorers")``), so that what a head adds between two merges is low-rank all the same.

Costs heads · out · in numbers. After a merge D restarts at zero, which is the same function as going on and
subtracting what was merged, without a copy of it.

Shapes: W (out, in), D (heads, out, in), x (batch, ..., in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.adapter import Adapter, Site, check_whole, shard_sizes
from lowrank.linalg.rounding import wide


@dataclass(frozen=True)
class Dense:
    """Makes a :class:`DenseAdapter` with ``heads`` local changes; ``split`` gives each head its shard of the batch."""

    heads: int = 1
    split: bool = True

    def __post_init__(self) -> None:
        check_whole("heads", self.heads)

    def __call__(self, linear: Site | nn.Module) -> DenseAdapter:
        return DenseAdapter(self, Site.of(linear))


class DenseAdapter(Adapter):
    """The parameter D (heads, out, in), zero at the start."""

    merges: Tensor

    def __init__(self, config: Dense, site: Site):
        super().__init__()
        own = site.own_heads(config.heads) if config.split else range(config.heads)
        self.config, self.split = config, config.split
        self.heads, self.all_heads, self.first_head = len(own), config.heads, own.start
        self.name, self.seed = site.name, site.seed
        kind: dict[str, Any] = {"dtype": wide(site.weight.dtype), "device": site.weight.device}
        self.D = nn.Parameter(torch.zeros(self.heads, site.out_features, site.in_features, **kind))
        self.register_buffer("merges", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.merged(W))
        if not (self.split and self.heads > 1):
            return _product(x, W, self.delta())
        shards = x.split(shard_sizes(x.shape[0], self.heads))
        return torch.cat([_product(shard, W, self.D[h]) for h, shard in enumerate(shards)])

    def rows(self, ids: Tensor, W: Tensor) -> Tensor:
        if not (self.training and self.split and self.heads > 1):
            return F.embedding(ids, self.merged(W))
        shards = ids.split(shard_sizes(ids.shape[0], self.heads))
        return F.embedding(ids, W) + torch.cat([F.embedding(s, self.D[h]) for h, s in enumerate(shards)]).to(W.dtype)

    def delta(self) -> Tensor:
        """The mean change of the heads here, (out, in)."""
        return self.D.mean(dim=0)

    def merged(self, W: Tensor) -> Tensor:
        return (W.to(self.D.dtype) + self.delta()).to(W.dtype)

    @torch.no_grad()
    def settle_(self) -> None:
        self.merges += 1
        self.D.zero_()

    @torch.no_grad()
    def restart_(self) -> None:
        """Restart the heads held here, as if they had just been merged and had contributed nothing."""
        self.D.zero_()


def _product(x: Tensor, W: Tensor, D: Tensor) -> Tensor:
    """x (W + D)ᵀ; in two products where W's dtype is narrower than D's, since a small D would be lost in the sum."""
    if W.dtype is D.dtype:
        return F.linear(x, W + D)
    return F.linear(x, W) + F.linear(x, D.to(W.dtype))
