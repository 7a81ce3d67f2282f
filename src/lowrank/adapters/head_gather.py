"""Heads on several workers: all of them in one place.

``gather_heads`` puts tensors of all heads together; ``consolidated_heads`` shows every worker all heads for a while,
for evaluation and checkpoints: adapters then are as in one process, and so is ``state_dict()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.layers import adapted_layers
from lowrank.adapters.split_adapter import SplitAdapter
from lowrank.distributed.collectives import Group, largest_share, share


def split_adapters(model: nn.Module) -> list[SplitAdapter]:
    """The adapters whose heads split the batch, and so are divided between workers; shared ones are listed once."""
    found = {id(a): a for _, layer in adapted_layers(model) for _, a, _ in layer.pieces() if a.split}
    return [adapter for adapter in found.values() if isinstance(adapter, SplitAdapter)]


@contextmanager
def consolidated_heads(model: nn.Module, workers: Group) -> Iterator[None]:
    """A context in which every split adapter holds the heads of all workers; all of them are sent, none as a sum."""
    adapters = split_adapters(model)
    own = [{n: t for n, t in a.head_tensors().items() if not a.held_by_all(n)} for a in adapters]
    gathered = gather_heads(own, adapters, workers)
    with ExitStack() as stack:
        for adapter, tensors in zip(adapters, gathered, strict=True):
            stack.enter_context(adapter.holding(tensors, adapter.all_heads))
        yield


def gather_heads(
    tensors: Sequence[Mapping[str, Tensor]], adapters: Sequence[SplitAdapter], workers: Group
) -> list[dict[str, Tensor]]:
    """The tensors of all heads, (N, ...) in the heads' order, from each worker's own, (H, ...).

    ``tensors`` has one mapping, by name, for each of ``adapters``. Shares may differ by one head: what is sent is
    padded to the largest.
    """
    return start_gather_heads(tensors, adapters, workers)()


def start_gather_heads(
    tensors: Sequence[Mapping[str, Tensor]], adapters: Sequence[SplitAdapter], workers: Group
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


def _padded(tensor: Tensor, heads: int) -> Tensor:
    missing = heads - len(tensor)
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor
