"""What an adapter is: a trainable change to a frozen weight matrix W (out, in); a fresh one changes nothing.

An adapter never holds W. It is given W at each call, so that one W can serve several adapters, and an adapter does not
care how its layer stores the weight (transformers' ``Conv1D`` keeps it transposed, a fused projection three in one).

Several *heads* are several changes at once. When they share the batch, the layer computes ``W x + (1/N) Σ_h Δ_h x``.
When the batch is *split* (LoRA-the-Explorer, arXiv 2402.16828), head h sees only shard h and trains its own local model
``(W + Δ_h) x_h``; in evaluation, and after a merge, the model is the mean of the local ones, ``W + (1/N) Σ_h Δ_h``.

Shapes: W (out, in), x (batch, ..., in), y (batch, ..., out), A (heads, rank, in), B (heads, out, rank). The batch is
the first dimension of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.compression import Compression
from lowrank.distributed.collectives import share
from lowrank.linalg.rounding import wide


@dataclass(frozen=True)
class Site:
    """Where an adapter goes: it looks like a linear layer, and tells what the adapter must know of its place.

    ``weight`` is (out, in) whatever the layer's own orientation; ``seed`` and ``name`` fix the random stream of new
    factors; ``keep`` says whether merges will keep the factors (and subtract them) or restart them. Heads that split
    the batch are divided between ``ranks`` processes, of which this is ``rank``, and travel as ``compression`` says.
    """

    name: str
    weight: Tensor
    seed: int = 0
    keep: bool = False
    rank: int = 0
    ranks: int = 1
    compression: Compression = "float32"

    @staticmethod
    def of(linear: Site | nn.Module) -> Site:
        """The site of a plain ``nn.Linear``; a site is returned as it is."""
        if isinstance(linear, Site):
            return linear
        if isinstance(linear, nn.Linear):
            return Site("", linear.weight)
        raise TypeError(f"adapters are made for linear layers, not for {type(linear).__name__}")

    def own_heads(self, heads: int) -> range:
        """Which of ``heads`` this process trains: consecutive, as even as it goes.

        Raises:
            ValueError: fewer heads than processes.
        """
        if heads < self.ranks:
            raise ValueError(
                f"heads={heads} for {self.ranks} workers (ranks, or groups of them, that train apart): one without a "
                f"head would train nothing here; give at least {self.ranks} heads, or have at most {heads} workers"
            )
        return share(heads, self.rank, self.ranks)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


class Adapter(nn.Module, ABC):
    """A trainable change to a frozen W (out, in), made for a ``Site``.

    Laws: a fresh one changes nothing; in evaluation ``adapter(x, W) == linear(x, merged(W))``; after
    ``W ← merged(W); settle_()`` again ``merged(W) == W``.

    ``name``, ``seed`` and ``merges``, how often it was merged, say which random numbers it draws: of new factors, and
    of the rounding of a merge into bfloat16, which must differ between merges, layers and seeds.
    """

    merges: Tensor
    counts_merges: bool = True  # False where ``merges`` is a property, as where an adapter inside this one counts
    config: Any = None  # what made it, for the plan's table
    heads: int = 1
    split: bool = False
    all_heads: int = 1  # those on other ranks included
    first_head: int = 0  # the number of the first head here, among all

    def __init__(self, site: Site):
        super().__init__()
        self.name, self.seed, self.shape = site.name, site.seed, (site.out_features, site.in_features)
        if self.counts_merges:
            self.register_buffer("merges", torch.zeros((), dtype=torch.int64))

    @abstractmethod
    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        """x (batch, ..., in), W (out, in) → y (batch, ..., out), the bias excluded."""

    def onto(self, y: Tensor, x: Tensor, W: Tensor) -> Tensor:
        """What ``forward`` gives, where y = x Wᵀ has been made (and may be changed), and W is there only for the
        moment: nothing of its size may be kept for backward. Layers with a quantised weight ask for it.

        Raises:
            NotImplementedError: an adapter that cannot.
        """
        raise NotImplementedError(f"{type(self).__name__} needs the weight itself, and cannot change a quantised layer")

    @abstractmethod
    def merged(self, W: Tensor) -> Tensor:
        """The dense matrix "W with this adapter" (out, in), in W's dtype: the mean over the heads."""

    @abstractmethod
    def settle_(self) -> None:
        """Called after W became ``merged(W)``: restart, or keep the factors and subtract them from now on."""

    @contextmanager
    def counting_a_merge(self) -> Iterator[None]:
        """A context for ``settle_`` after a merge: ``merges`` is one more afterwards, whoever counts."""
        merges = int(self.merges) + 1
        yield
        self.merges.fill_(merges)

    def row_norms(self, W: Tensor) -> Tensor:
        """The norm of each row of merged(W), (out,), in float32 or wider."""
        return self.merged(W.to(wide(W.dtype))).norm(dim=1)

    def rows(self, ids: Tensor, W: Tensor) -> Tensor:
        """Rows ``ids`` (batch, ...) of the changed W → (batch, ..., in): the adapter on an embedding with table W."""
        return F.embedding(ids, self.merged(W))


class Additive(Adapter):
    """An adapter whose change is added to the layer's own output, so that it can join a product already made."""

    @abstractmethod
    def add_(self, y: Tensor, x: Tensor, start: int = 0) -> Tensor:
        """Add the change for x to ``y[..., start : start + out]`` in place, and return y."""

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias, and the change: of an adapter on all of W."""
        return self.add_(F.linear(x, W, bias), x)

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        return self.linear(x, W)

    def onto(self, y: Tensor, x: Tensor, W: Tensor) -> Tensor:
        return self.add_(y, x)


def splits_batch(make: object) -> bool:
    """Whether what makes an adapter, any callable, says that its heads split the batch."""
    return bool(getattr(make, "split", False))


def shard_sizes(batch: int, heads: int) -> list[int]:
    """How a batch is split between heads: as evenly as it goes, the first heads one more.

    >>> shard_sizes(10, 4)
    [3, 3, 2, 2]
    """
    return [batch // heads + (h < batch % heads) for h in range(heads)]
