"""Heads on several ranks: what the ranks send each other of their heads, and when (LTE, arXiv 2402.16828).

Between merges nothing is sent. At a merge W ← W + (1/N) Σ_h Δ_h over the N heads of all ranks, where the changes of a
matrix travel as whatever is fewer bytes:

    factors   everyone's (A, B) to everyone, N·rank·(in + out) numbers; every rank then computes the very product that
              one process with N heads computes. Kept factors do not travel: each rank keeps those of all heads.
    dense     the sum of the changes, out·in numbers, where N·rank is large (and for ``Dense`` heads always)

Either way all ranks hold the same bits afterwards. Heads of ranks that are ``left_out`` (not finite, restarted) do not
count: the mean is over the others.

``whole_heads`` gives every rank all heads for a while, for evaluation and checkpoints: adapters are then as in one
process, and so is ``state_dict()``.

Shapes: N heads in all, H of them on this rank; A (H, rank, in), B (H, out, rank), D (H, out, in).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.adapter import Adapter, wide_dtype
from lowrank.adapters.dense import DenseAdapter
from lowrank.adapters.layer import adapted_layers, fold_, write_merged_
from lowrank.adapters.lora import LoRAAdapter
from lowrank.infra.ranks import Ranks, largest_share, share

SplitAdapter = LoRAAdapter | DenseAdapter
KEPT = ("kept_A", "kept_B")


def split_adapters(model: nn.Module) -> list[SplitAdapter]:
    """The adapters whose heads split the batch, and so are divided between ranks; shared ones are listed once."""
    found = {id(a): a for _, layer in adapted_layers(model) for _, a, _ in layer.pieces() if a.split}
    return [adapter for adapter in found.values() if isinstance(adapter, SplitAdapter)]


def sends_factors(adapter: Adapter) -> bool:
    """Whether the adapter's heads travel as factors."""
    return isinstance(adapter, LoRAAdapter) and adapter.sends_factors


@torch.no_grad()
def merge_across_(model: nn.Module, ranks: Ranks, left_out: Collection[int] = ()) -> None:
    """Fold every adapter into the weights, as ``merge_adapters_`` does, over the heads of all ranks.

    Args:
        model: with its adapters; every rank calls this.
        ranks: the processes.
        left_out: the ranks whose heads do not take part, the same on all ranks.

    Raises:
        FloatingPointError: no rank is left to take part, or a merged matrix is not finite.
    """
    if len(left_out) == ranks.count:
        raise FloatingPointError(
            "the heads of all ranks are not finite: resume from the last checkpoint, with a lower --lr"
        )
    adapters = split_adapters(model)
    thin = [a for a in adapters if sends_factors(a)]
    factors = dict(zip(thin, gather_heads([dict(a.named_parameters()) for a in thin], thin, ranks), strict=True))
    thick = [a for a in adapters if a not in factors]
    changes = [a.delta() * (0 if ranks.rank in left_out else a.heads) for a in thick]
    ranks.sum_(changes)
    dense = dict(zip(thick, changes, strict=True))
    done: set[int] = set()
    for _, layer in adapted_layers(model):
        for part, adapter, W in layer.pieces():
            if id(adapter) in done or not isinstance(adapter, SplitAdapter) or not adapter.split:
                continue
            done.add(id(adapter))
            taking_part = _taking_part(adapter.all_heads, ranks, left_out)
            wide = W.to(wide_dtype(W.dtype))
            if adapter in factors:
                merged = _merged_from(adapter, factors[adapter], taking_part, wide)
            else:
                merged = wide + dense[adapter] / len(taking_part)
            write_merged_(W, merged, adapter, part)
            adapter.settle_()
            if adapter in factors and isinstance(adapter, LoRAAdapter) and adapter.keep:
                adapter.kept_A.copy_(factors[adapter]["A"])
                adapter.kept_B.copy_(factors[adapter]["B"])
        fold_(layer, done)


@contextmanager
def whole_heads(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """A context in which every split adapter holds the heads of all ranks; all of them are sent, dense ones whole."""
    adapters = split_adapters(model)
    own = [_tensors_by_head(adapter) for adapter in adapters]
    gathered = gather_heads(own, adapters, ranks)
    with ExitStack() as stack:
        for adapter, tensors in zip(adapters, gathered, strict=True):
            stack.enter_context(_holding(adapter, tensors, adapter.all_heads))
        yield


def gather_heads(
    tensors: Sequence[Mapping[str, Tensor]], adapters: Sequence[Adapter], ranks: Ranks
) -> list[dict[str, Tensor]]:
    """The tensors of all heads, (N, ...) in the heads' order, from each rank's own, (H, ...).

    ``tensors`` has one mapping, by name, for each of ``adapters``. Shares may differ by one head: what is sent is
    padded to the largest.
    """
    flat = [(entry, name, t) for entry, named in enumerate(tensors) for name, t in named.items()]
    padded = [_padded(t, largest_share(adapters[entry].all_heads, ranks.count)) for entry, _, t in flat]
    found: list[dict[str, Tensor]] = [{} for _ in tensors]
    for (entry, name, _), everyone in zip(flat, ranks.gather(padded), strict=True):
        shares = [len(share(adapters[entry].all_heads, r, ranks.count)) for r in range(ranks.count)]
        found[entry][name] = torch.cat([rows[:n] for rows, n in zip(everyone, shares, strict=True)])
    return found


def own_part(adapter: Adapter, name: str, whole: Tensor) -> Tensor:
    """What this rank's adapter holds under ``name`` of the tensor of all heads, ``whole`` (N, ...)."""
    if name in KEPT and sends_factors(adapter):
        return whole
    return whole[adapter.first_head : adapter.first_head + adapter.heads]


def _tensors_by_head(adapter: SplitAdapter) -> dict[str, Tensor]:
    """Those of the adapter's tensors that the other ranks do not have."""
    kept = {} if sends_factors(adapter) else {n: b for n, b in adapter.named_buffers() if n in KEPT}
    return {**dict(adapter.named_parameters()), **kept}


def _merged_from(adapter: SplitAdapter, factors: Mapping[str, Tensor], taking_part: list[int], W: Tensor) -> Tensor:
    """``merged(W)`` over the heads taking part, by the arithmetic of one process that holds only these."""
    kept = {n: b for n, b in adapter.named_buffers() if n in KEPT}
    everything = {**factors, **kept}
    if len(taking_part) < adapter.all_heads:
        everything = {name: tensor[taking_part] for name, tensor in everything.items()}
    with _holding(adapter, everything, len(taking_part)):
        return adapter.merged(W)


@contextmanager
def _holding(adapter: SplitAdapter, tensors: Mapping[str, Tensor], heads: int) -> Iterator[None]:
    """A context in which the adapter holds these ``heads`` heads, and no others exist."""
    parameters, buffers = dict(adapter._parameters), dict(adapter._buffers)
    before = adapter.heads, adapter.all_heads, adapter.first_head
    for name, tensor in tensors.items():
        if name in parameters:
            adapter._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            adapter._buffers[name] = tensor
    adapter.heads, adapter.all_heads, adapter.first_head = heads, heads, 0
    try:
        yield
    finally:
        adapter._parameters.update(parameters)
        adapter._buffers.update(buffers)
        adapter.heads, adapter.all_heads, adapter.first_head = before


def _taking_part(heads: int, ranks: Ranks, left_out: Collection[int]) -> list[int]:
    return [h for r in range(ranks.count) if r not in left_out for h in share(heads, r, ranks.count)]


def _padded(tensor: Tensor, heads: int) -> Tensor:
    missing = heads - len(tensor)
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor
