"""Heads that split the batch: held by several workers, sent at a merge, and put together again.

A split adapter with N heads trains head h on shard h of the batch (LTE, arXiv 2402.16828). Over several workers each
holds a consecutive share of H heads. At a merge a matrix travels as whatever is fewer bytes: the packed heads of every
worker to all, who compute ``merged_from`` them, or a sum of the dense changes.

    class MyAdapter(SplitAdapter):          # parameters (heads, ...), declared after super().__init__
        linear_in = ("B",)                  # the change is linear in these, so that a head can weigh more or less
        def forward … merged … settle_ … delta … restart_ …

Shapes: W and a change (out, in); N heads in all, H of them here; a packed tensor (H, ...), of all heads (N, ...).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank.adapters.adapter import Adapter, Site
from lowrank.adapters.compression import FEEDBACK, Compression, rounded_bytes, sum_bytes
from lowrank.distributed.collectives import largest_share, ring_gather_bytes
from lowrank.linalg.subspace import Subspace

KEPT, SENT = "kept_", "sent_"  # how the buffers are called that hold a parameter's copy at the last merge, or as sent


class SplitAdapter(Adapter):
    """An adapter whose heads may split the batch between them and be divided between workers.

    Its parameters have the heads as their first dimension, and so have the buffers called ``kept_…`` (what was merged,
    subtracted since) and ``sent_…`` (what was sent of an overlapped merge).
    """

    linear_in: tuple[str, ...] = ()
    merges_in_subspace: bool = False  # whether the changes may be summed in the subspace that their rule keeps to
    overlaps: bool = False  # whether a merge may be in flight while the heads go on (``Merge.overlap``)
    gathers_heads: bool = False  # whether a merge sends packed heads; then every worker keeps what all have merged
    sent: Tensor

    def __init__(self, site: Site, heads: int, *, split: bool):
        super().__init__(site)
        own = site.own_heads(heads) if split else range(heads)
        self.heads, self.all_heads, self.first_head, self.split = len(own), heads, own.start, split

    @abstractmethod
    def delta(self) -> Tensor:
        """The mean change of the heads here, (out, in)."""

    @abstractmethod
    def restart_(self, heads: Sequence[int]) -> None:
        """Restart those of ``heads`` (numbers among all) that are here, as if they had just been merged and had
        contributed nothing; what is kept here of others' begins anew as well."""

    # --- who holds what ----------------------------------------------------------------------------------------------

    def head_tensors(self) -> dict[str, Tensor]:
        """By name every parameter and buffer with a dimension for heads."""
        buffers = {n: b for n, b in self.named_buffers() if n.startswith((KEPT, SENT))}
        return {**dict(self.named_parameters()), **buffers}

    def held_by_all(self, name: str) -> bool:
        """Whether every worker holds the tensor ``name`` of all heads."""
        return self.gathers_heads and name.startswith(KEPT)

    def own_heads(self, tensor: Tensor, name: str = "") -> Tensor:
        """What this worker holds under ``name`` of the tensor of all heads, (N, ...)."""
        return tensor if self.held_by_all(name) else tensor[self.first_head : self.first_head + self.heads]

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor], heads: int) -> Iterator[None]:
        """Meanwhile the adapter has these ``heads`` heads, and no others exist."""
        parameters, buffers = dict(self._parameters), dict(self._buffers)
        before = self.heads, self.all_heads, self.first_head
        for name, tensor in tensors.items():
            if name in parameters:
                self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            else:
                self._buffers[name] = tensor
        self.heads, self.all_heads, self.first_head = heads, heads, 0
        try:
            yield
        finally:
            self._parameters.update(parameters)
            self._buffers.update(buffers)
            self.heads, self.all_heads, self.first_head = before

    # --- a merge -----------------------------------------------------------------------------------------------------

    def pack(self) -> dict[str, Tensor]:
        """The heads here as they are sent: the parameters, or of an overlapped merge their copies."""
        if "sent" in self._buffers:
            return {n: self.get_buffer(SENT + n) for n, _ in self.named_parameters()}
        return {n: p.detach() for n, p in self.named_parameters()}

    def packed_bytes(self, workers: int, compression: Compression) -> int | None:
        """Bytes that one worker sends as packed heads; None where a sum of dense changes is fewer, but never with
        error feedback, since what is left out of a head stays in that head."""
        each = next(self.parameters()).element_size()
        head = sum(rounded_bytes(compression, tuple(p.shape[1:]), each) for p in self.parameters())
        packed = largest_share(self.all_heads, workers) * head
        fewer = ring_gather_bytes(packed, workers) <= sum_bytes(compression, self.shape, each, workers)
        return packed if fewer or compression in FEEDBACK else None

    def known(self) -> dict[str, Tensor]:
        """What every worker knows already of all heads' parameters, (N, ...); what is sent in few bits is the
        difference to that."""
        return {n: p.new_zeros(self.all_heads, *p.shape[1:], requires_grad=False) for n, p in self.named_parameters()}

    def merged_from(self, packed: Mapping[str, Tensor], weights: Mapping[int, float], W: Tensor) -> Tensor:
        """``merged(W)`` of the packed heads that count, by the arithmetic of one process that holds just these.

        ``weights``: by the number of a head that counts how many times the mean of them it weighs.
        """
        every = {**packed, **{n: b for n, b in self.named_buffers() if n.startswith(KEPT)}}
        if len(weights) < self.all_heads:
            every = {name: tensor[list(weights)] for name, tensor in every.items()}
        if any(weight != 1.0 for weight in weights.values()):
            scale = W.new_tensor(list(weights.values()))[:, None, None]
            every = {n: t * scale if n.removeprefix(KEPT) in self.linear_in else t for n, t in every.items()}
        with self.holding(every, len(weights)):
            return self.merged(W)

    def packed_delta(self) -> Tensor:
        """The mean change of the heads here as they are sent, (out, in)."""
        own = slice(self.first_head, self.first_head + self.heads)
        kept = {n: b[own] for n, b in self.named_buffers() if self.held_by_all(n)}
        with self.holding({**self.pack(), **kept}, self.heads):
            return self.delta()

    def settle_merged_(
        self, packed: Mapping[str, Tensor] | None, subspace: Subspace | None, left: Tensor | None = None
    ) -> None:
        """``settle_`` after a merge over workers, which may not have taken the heads as they are: but ``packed``, those
        of all workers where they were gathered, or what of a change lies in ``subspace``, and of the mean change of the
        heads here not what was ``left`` out (error feedback), (out, in)."""
        self.settle_()

    # --- an overlapped merge -----------------------------------------------------------------------------------------

    def prepare_overlap_(self) -> None:
        """Make room for copies of the heads that are in flight."""
        self.register_buffer("sent", torch.zeros((), dtype=torch.int64))
        for name, p in self.named_parameters():
            self.register_buffer(SENT + name, torch.zeros_like(p, requires_grad=False))

    @torch.no_grad()
    def remember_(self) -> None:
        """Copy the heads as they are, for a merge that will be in flight while they go on."""
        for name, p in self.named_parameters():
            self.get_buffer(SENT + name).copy_(p)
        self.sent += 1

    @property
    def is_in_flight(self) -> bool:
        """Whether heads were sent that have not been merged yet."""
        return "sent" in self._buffers and int(self.sent) > int(self.merges)
