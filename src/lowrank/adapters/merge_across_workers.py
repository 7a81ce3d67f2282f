"""The cross-worker merge, at once or in flight while training goes on.

A worker is one process, or several in step that act as one (``workers``); if these hold the weights sharded, one
adapted matrix at a time is unsharded while it is merged.

Between merges, nothing travels. At a merge W ← W + (1/N) Σ_h Δ_h over the N heads of all workers, where a matrix
travels as whatever is fewer bytes:

    factors   every worker's (A, B) to all, N·rank·(in + out) numbers; each then computes the very product that one
              process with N heads computes. Kept factors do not travel: each worker keeps those of all heads.
    dense     the sum of the changes, out·in numbers, where N·rank is large
    subspace  of ``Dense`` heads whose changes lie in a subspace Q that all workers know: the sum of QᵀD, rank·long

Numbers travel as ``Merge.exchange`` says (``compression``). Every way all workers hold the same bits of W afterwards.
What rounding leaves out of kept factors stays in the head, which subtracts only what was merged, and so travels with
the next; with error feedback what is left out of a sum stays in dense heads as well. So it is in every checkpoint.
Heads of workers that are left out (not finite, restarted) do not count: the mean is over the others. Workers may weigh
differently: w_h = c_r / (H_r Σ c) for each of the H_r heads of worker r, where c is what each has done.

Overlapped (``Merge.overlap``) what is sent at one merge arrives at the next. With U_h(k) = s·B A of head h at merge k,

    W ← W + (1/N) Σ_h (U_h(k−1) − U_h(k−2)),   head h subtracts U_h(k−1) from now on,   U_h(k) is sent

so that head h goes on with the common W and what it has added since merge k − 1; the mean model is the same before and
after, as always. (Streaming DiLoCo, arXiv 2501.18512, overlaps its outer steps in this way.) One process does the same
with nobody to talk to. The factors sent are kept in the adapter, so that a checkpoint has them; a run that resumes
sends them again, and a worker left out of that merge then counts as one that has added nothing.

Shapes: R workers, N heads in all, H here; A (H, rank, in), B (H, out, rank), D (H, out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowrank.adapters.compression import Compression, decode, encode, start_add_up
from lowrank.adapters.head_gather import split_adapters, start_gather_heads
from lowrank.adapters.layers import adapted_layers, merge_layer_, write_merged_
from lowrank.adapters.merge import Merge
from lowrank.adapters.split_adapter import SplitAdapter
from lowrank.distributed.collectives import Group, share
from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.shards import unsharded_parameter
from lowrank.linalg.rounding import wide
from lowrank.linalg.subspace import Subspace

Heads = Mapping[str, Tensor]  # packed tensors by name, (H, ...) or (N, ...)
Changes = Mapping[SplitAdapter, Tensor]  # (out, in)


@dataclass(frozen=True)
class MergeWeights:
    """Who counts at a merge, and for how much.

    Args:
        left_out: workers whose heads do not count.
        weights: what each worker weighs, shared evenly by its heads; None: every head weighs the same.
        subspaces: of dense heads the subspace, the same on all workers, that their changes lie in.
        intra_worker: the processes of this worker that may hold the weights sharded.
        later: the adapters that are not merged now, but with another fragment.
    """

    left_out: Collection[int] = ()
    weights: Sequence[float] | None = None
    subspaces: Mapping[SplitAdapter, Subspace] = field(default_factory=dict)
    intra_worker: ProcessGroup | None = None
    later: Collection[SplitAdapter] = ()

    def heads(self, heads: int, workers: Group | None) -> list[int]:
        """The numbers of the heads that count, of ``heads`` in all."""
        if workers is None:
            return list(range(heads))
        return [h for r in range(workers.count) if r not in self.left_out for h in share(heads, r, workers.count)]

    def by_head(self, heads: int, workers: Group | None) -> dict[int, float]:
        """Of each head that counts how many times the mean of them it weighs."""
        counting = self.heads(heads, workers)
        if self.weights is None or workers is None:
            return dict.fromkeys(counting, 1.0)
        shares = [share(heads, r, workers.count) for r in range(workers.count)]
        by_head = {h: self.weights[r] / len(own) for r, own in enumerate(shares) for h in own}
        return {h: by_head[h] * len(counting) / sum(self.weights) for h in counting}


def merge_across_workers_(model: nn.Module, workers: Group, merge: Merge, counting: MergeWeights | None = None) -> None:
    """Merge every adapter into the weights, as ``merge_adapters_`` does, over the heads of all workers.

    Raises:
        FloatingPointError: no worker is left to take part.
    """
    start_merge(model, workers, merge, counting)()


@torch.no_grad()
def start_merge(
    model: nn.Module, workers: Group | None, merge: Merge, counting: MergeWeights | None = None
) -> Callable[[], None]:
    """Start a merge over the heads of all workers and go on; the function returned waits for what the others have sent
    and merges it. What is sent are the heads as they are now, overlapped as they were remembered.

    Raises:
        FloatingPointError: no worker is left to take part.
    """
    counting = counting or MergeWeights()
    if workers is not None and len(counting.left_out) == workers.count:
        raise FloatingPointError(
            "the heads of all workers are not finite: resume from the last checkpoint, with a lower --lr"
        )
    adapters = [a for a in split_adapters(model) if a not in counting.later]
    gathered = [a for a in adapters if workers is None or a.gathers_heads]
    summed = [a for a in adapters if a not in gathered]
    heads = _start_heads(gathered, workers, merge.exchange, counting)
    changes = _start_changes(summed, workers, merge.exchange, counting) if workers is not None else _nothing

    @torch.no_grad()
    def arrive() -> None:
        _merge_(model, dict(zip(gathered, heads(), strict=True)), *changes(), workers, merge, counting)

    return arrive


def _merge_(
    model: nn.Module,
    heads: Mapping[SplitAdapter, Heads],
    changes: Changes,
    left: Changes,
    workers: Group | None,
    merge: Merge,
    counting: MergeWeights,
) -> None:
    """W ← W with the mean of all heads, from their tensors or as the change that it is; then they settle, with what was
    ``left`` out of their change."""
    done = {id(adapter) for adapter in counting.later}
    for _, layer in adapted_layers(model):
        if all(id(adapter) in done for adapter in layer.adapters.values()):
            continue
        with unsharded_parameter(layer, "weight", counting.intra_worker):
            for part, adapter, W in layer.pieces():
                if id(adapter) in done or not isinstance(adapter, SplitAdapter) or not adapter.split:
                    continue
                done.add(id(adapter))
                before = W.to(wide(W.dtype))
                if adapter in heads:
                    weights = counting.by_head(adapter.all_heads, workers)
                    merged = adapter.merged_from(heads[adapter], weights, before)
                else:
                    merged = before + changes[adapter]
                write_merged_(W, merge.step(before, merged, adapter), adapter, part)
                with adapter.counting_a_merge():
                    adapter.settle_merged_(heads.get(adapter), counting.subspaces.get(adapter), left.get(adapter))
            merge_layer_(layer, done, merge)


# --- heads gathered --------------------------------------------------------------------------------------------------


def _start_heads(
    adapters: Sequence[SplitAdapter], workers: Group | None, compression: Compression, counting: MergeWeights
) -> Callable[[], list[Heads]]:
    """The packed tensors of all heads, (N, ...), as all workers know them. What is rounded is what they have changed by
    since the last merge, where heads are kept: so rounding is as fine as the change, and what it leaves out stays in
    the head (which subtracts only what was merged) and travels with the next."""
    mine: list[Heads] = [adapter.pack() for adapter in adapters]
    if workers is None:
        return lambda: mine
    if compression == "float32":
        return start_gather_heads(mine, adapters, workers)  # type: ignore[return-value]
    known = [a.known() for a in adapters]
    coded: list[dict[str, Tensor]] = []
    for adapter, packed, bases in zip(adapters, mine, known, strict=True):
        own, tick = slice(adapter.first_head, adapter.first_head + adapter.heads), int(adapter.merges)
        changed = {name: t - bases[name][own] for name, t in packed.items()}
        sent = {name: encode(x, compression, tick * workers.count + workers.rank) for name, x in changed.items()}
        coded.append({f"{name} {i}": t for name, pieces in sent.items() for i, t in enumerate(pieces)})
    arrive = start_gather_heads(coded, adapters, workers)
    return lambda: [_decoded(bases, pieces, compression) for bases, pieces in zip(known, arrive(), strict=True)]


def _decoded(bases: Heads, pieces: Heads, compression: Compression) -> Heads:
    by_name = {name: [pieces[key] for key in sorted(pieces) if key.startswith(f"{name} ")] for name in bases}
    return {n: b + decode(by_name[n], compression, tuple(b.shape), b.dtype) for n, b in bases.items()}


# --- changes summed --------------------------------------------------------------------------------------------------


def _start_changes(
    adapters: Sequence[SplitAdapter], workers: Group, compression: Compression, counting: MergeWeights
) -> Callable[[], tuple[Changes, Changes]]:
    """The mean change over the heads of all workers, by dense sums or in a subspace that all know; and of the mean
    change here what was left out of that."""
    weights, subspaces = counting.weights, counting.subspaces
    sent: list[Tensor] = []
    mine: dict[SplitAdapter, float] = {}
    for adapter in adapters:
        counts = workers.rank not in counting.left_out
        mine[adapter] = (adapter.heads if weights is None else weights[workers.rank]) * counts
        change = adapter.packed_delta() * mine[adapter]
        sent.append(subspaces[adapter].project(change) if adapter in subspaces else change)
    arrive = start_add_up(sent, workers, compression, int(adapters[0].merges) if adapters else 0)

    def lifted(adapter: SplitAdapter, change: Tensor) -> Tensor:
        return subspaces[adapter].lift(change) if adapter in subspaces else change

    def finish() -> tuple[Changes, Changes]:
        found: dict[SplitAdapter, Tensor] = {}
        kept: dict[SplitAdapter, Tensor] = {}
        for adapter, change, left in zip(adapters, sent, arrive(), strict=True):
            heads = len(counting.heads(adapter.all_heads, workers))
            found[adapter] = lifted(adapter, change.div_(heads if weights is None else sum(weights)))
            if left is not None and mine[adapter]:
                kept[adapter] = lifted(adapter, left.div_(mine[adapter]))
        return found, kept

    return finish


def _nothing() -> tuple[Changes, Changes]:
    return {}, {}
