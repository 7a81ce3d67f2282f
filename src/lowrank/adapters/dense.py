"""Dense heads: a full-rank local change per head, W + D_h.

With a projected rule that trains D (``lte_galore(kind="explorers")``) the low rank is in the update: what a head adds
between two merges is low-rank all the same. With any other (``diloco``) heads are whole local copies of W.

Costs heads · out · in numbers. After a merge D restarts at zero, which is the same function as going on and
subtracting what was merged, without a copy of it.

Shapes: W (out, in), D (heads, out, in), x (batch, ..., in).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.adapter import Site, shard_sizes
from lowrank.adapters.compression import Compression
from lowrank.adapters.split_adapter import SplitAdapter
from lowrank.infra.checks import check_integer
from lowrank.linalg.rounding import wide
from lowrank.linalg.subspace import Subspace


@dataclass(frozen=True)
class Dense:
    """Makes a :class:`DenseAdapter` with ``heads`` local changes; ``split`` gives each head its shard of the batch."""

    heads: int = 1
    split: bool = True

    def __post_init__(self) -> None:
        check_integer("heads", self.heads)

    def __call__(self, linear: Site | nn.Module) -> DenseAdapter:
        return DenseAdapter(self, Site.of(linear))


class DenseAdapter(SplitAdapter):
    """The parameter D (heads, out, in), zero at the start."""

    linear_in = ("D",)
    merges_in_subspace = True

    def __init__(self, config: Dense, site: Site):
        super().__init__(site, config.heads, split=config.split)
        self.config = config
        kind: dict[str, Any] = {"dtype": wide(site.weight.dtype), "device": site.weight.device}
        self.D = nn.Parameter(torch.zeros(self.heads, *self.shape, **kind))

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
        return self.D.mean(dim=0)

    def merged(self, W: Tensor) -> Tensor:
        return (W.to(self.D.dtype) + self.delta()).to(W.dtype)

    @torch.no_grad()
    def settle_(self) -> None:
        self.merges += 1
        self.D.zero_()

    @torch.no_grad()
    def settle_merged_(
        self, packed: Mapping[str, Tensor] | None, subspace: Subspace | None, left: Tensor | None = None
    ) -> None:
        outside = None if subspace is None else self.D - subspace.lift(subspace.project(self.D))
        self.settle_()
        if outside is not None:
            self.D.copy_(outside)  # rounding, or error feedback of before the subspace moved
        if left is not None:
            self.D.add_(left)

    @torch.no_grad()
    def restart_(self, heads: Sequence[int]) -> None:
        for h in {*heads} & {*range(self.first_head, self.first_head + self.heads)}:
            self.D[h - self.first_head].zero_()

    def packed_bytes(self, workers: int, compression: Compression) -> int | None:
        return None  # a sum of changes is never more


def _product(x: Tensor, W: Tensor, D: Tensor) -> Tensor:
    """x (W + D)ᵀ; in two products where W's dtype is narrower than D's, since a small D would be lost in the sum."""
    if W.dtype is D.dtype:
        return F.linear(x, W + D)
    return F.linear(x, W) + F.linear(x, D.to(W.dtype))
