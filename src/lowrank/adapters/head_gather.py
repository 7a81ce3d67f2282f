"""Heads on several workers: who holds which, and all of them in one place.

Adapters whose heads split the batch are divided between workers (LTE, arXiv 2402.16828): each holds a consecutive share
of the N heads. ``gather_heads`` puts tensors of all heads together; ``whole_heads`` shows every worker all heads for a
while, for evaluation and checkpoints: adapters then are as in one process, and so is ``state_dict()``. Merges are in
``across``.

Shapes: N heads in all, H of them on this worker; A (H, rank, in), B (H, out, rank), D (H, out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.adapter import Adapter
from lowrank.adapters.dense import DenseAdapter
from lowrank.adapters.layers import adapted_layers
from lowrank.adapters.lora import LoRAAdapter
from lowrank.distributed.collectives import Group, largest_share, share

SplitAdapter = LoRAAdapter | DenseAdapter
KEPT = ("kept_A", "kept_B")
SENT = ("sent_A", "sent_B")


def split_adapters(model: nn.Module) -> list[SplitAdapter]:
    """The adapters whose heads split the batch, and so are divided between workers; shared ones are listed once."""
    found = {id(a): a for _, layer in adapted_layers(model) for _, a, _ in layer.pieces() if a.split}
    return [adapter for adapter in found.values() if isinstance(adapter, SplitAdapter)]


def sends_factors(adapter: Adapter) -> bool:
    """Whether the adapter's heads travel as factors."""
    return isinstance(adapter, LoRAAdapter) and adapter.sends_factors


@contextmanager
def whole_heads(model: nn.Module, workers: Group) -> Iterator[None]:
    """A context in which every split adapter holds the heads of all workers; all of them are sent, dense ones whole."""
    adapters = split_adapters(model)
    own = [_tensors_by_head(adapter) for adapter in adapters]
    gathered = gather_heads(own, adapters, workers)
    with ExitStack() as stack:
        for adapter, tensors in zip(adapters, gathered, strict=True):
            stack.enter_context(holding(adapter, tensors, adapter.all_heads))
        yield


def gather_heads(
    tensors: Sequence[Mapping[str, Tensor]], adapters: Sequence[Adapter], workers: Group
) -> list[dict[str, Tensor]]:
    """The tensors of all heads, (N, ...) in the heads' order, from each worker's own, (H, ...).

    ``tensors`` has one mapping, by name, for each of ``adapters``. Shares may differ by one head: what is sent is
    padded to the largest.
    """
    return start_gather_heads(tensors, adapters, workers)()


def start_gather_heads(
    tensors: Sequence[Mapping[str, Tensor]], adapters: Sequence[Adapter], workers: Group
) -> Callable[[], list[dict[str, Tensor]]]:
    """Start ``gather_heads`` and go on; the function returned waits for it."""
    flat = [(entry, name, t) for entry, named in enumerate(tensors) for name, t in named.items()]
    flat.sort(key=lambda item: str(item[2].dtype))  # neighbours of one dtype travel together
    padded = [_padded(t, largest_share(adapters[entry].all_heads, workers.count)) for entry, _, t in flat]
    arrive = workers.start_gather(padded)

    def finish() -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = [{} for _ in tensors]
        for (entry, name, _), everyone in zip(flat, arrive(), strict=True):
            shares = [len(share(adapters[entry].all_heads, r, workers.count)) for r in range(workers.count)]
            found[entry][name] = torch.cat([rows[:n] for rows, n in zip(everyone, shares, strict=True)])
        return found

    return finish


def own_part(adapter: Adapter, name: str, whole: Tensor) -> Tensor:
    """What this worker's adapter holds under ``name`` of the tensor of all heads, ``whole`` (N, ...)."""
    if name in KEPT and sends_factors(adapter):
        return whole
    return whole[adapter.first_head : adapter.first_head + adapter.heads]


def _tensors_by_head(adapter: SplitAdapter) -> dict[str, Tensor]:
    """Of the adapter's tensors those that another worker has not got."""
    held = SENT if sends_factors(adapter) else (*KEPT, *SENT)
    kept = {n: b for n, b in adapter.named_buffers() if n in held}
    return {**dict(adapter.named_parameters()), **kept}


@contextmanager
def holding(adapter: SplitAdapter, tensors: Mapping[str, Tensor], heads: int) -> Iterator[None]:
    """Meanwhile the adapter has these ``heads`` heads, and no others exist."""
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


def _padded(tensor: Tensor, heads: int) -> Tensor:
    missing = heads - len(tensor)
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor
