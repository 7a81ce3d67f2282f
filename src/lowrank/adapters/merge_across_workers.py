"""Merges over several workers, and merges that are under way while training goes on.

A worker is one process, or several in step that act as one (``workers``); if these hold the weights in parts,
one adapted matrix at a time is whole on each while it is merged.

Between merges, nothing travels. At a merge W ← W + (1/N) Σ_h Δ_h over the N heads of all workers, where a matrix
travels as whatever is fewer bytes:

    factors   everyone's (A, B) to everyone, N·rank·(in + out) numbers; every worker then computes the very product
              that
              one process with N heads computes. Kept factors do not travel: each worker keeps those of all heads.
    dense     the sum of the changes, out·in numbers, where N·rank is large
    inside    of ``Dense`` heads whose changes lie in a subspace Q that all workers know: the sum of QᵀD, rank·long

Numbers travel as ``Merge.exchange`` says (``wire``). Every way all workers hold the same bits afterwards. Heads of
workers that are left out (not finite, restarted) do not count: the mean is over the others. Workers may weigh
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

from lowrank.adapters.compression import Exchange, decode, encode, start_add_up
from lowrank.adapters.dense import DenseAdapter
from lowrank.adapters.head_gather import KEPT, SplitAdapter, holding, split_adapters, start_gather_heads
from lowrank.adapters.layers import adapted_layers, fold_, write_merged_
from lowrank.adapters.lora import LoRAAdapter
from lowrank.adapters.merge import Merge
from lowrank.distributed.collectives import Group, share
from lowrank.distributed.process_group import Ranks
from lowrank.distributed.shards import unsharded_parameter
from lowrank.linalg.rounding import wide
from lowrank.linalg.subspace import Subspace

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Terms:
    """Who counts at a merge, and for how much.

    Args:
        left_out: workers whose heads do not count.
        weights: what each worker weighs, shared evenly by its heads; None: every head weighs the same.
        spans: of dense heads the subspace, the same on all workers, that their changes lie in.
        intra_worker: the processes of this worker that may hold the weights in parts.
    """

    left_out: Collection[int] = ()
    weights: Sequence[float] | None = None
    spans: Mapping[SplitAdapter, Subspace] = field(default_factory=dict)
    intra_worker: Ranks | None = None


def merge_across_(model: nn.Module, workers: Group, merge: Merge, terms: Terms | None = None) -> None:
    """Fold every adapter into the weights, as ``merge_adapters_`` does, over the heads of all workers.

    Raises:
        FloatingPointError: no worker is left to take part.
    """
    start_merge(model, workers, merge, terms)()


def remember_(model: nn.Module) -> None:
    """Keep the factors as they are now, to be sent."""
    for adapter in split_adapters(model):
        assert isinstance(adapter, LoRAAdapter), "Merge.prepare_ refuses others"
        adapter.remember_()


def in_flight(model: nn.Module) -> bool:
    """Whether something was sent that has not arrived."""
    return any(isinstance(a, LoRAAdapter) and a.is_in_flight for a in split_adapters(model))


@torch.no_grad()
def start_merge(
    model: nn.Module, workers: Group | None, merge: Merge, terms: Terms | None = None
) -> Callable[[], None]:
    """Start a merge over the heads of all workers and go on; the function returned waits for what the others have sent
    and folds it in. What is sent are the heads as they are now, overlapped as they were remembered.

    Raises:
        FloatingPointError: no worker is left to take part.
    """
    terms = terms or Terms()
    if workers is not None and len(terms.left_out) == workers.count:
        raise FloatingPointError(
            "the heads of all workers are not finite: resume from the last checkpoint, with a lower --lr"
        )
    adapters = split_adapters(model)
    thin = [a for a in adapters if isinstance(a, LoRAAdapter) and (workers is None or a.sends_factors)]
    thick = [a for a in adapters if a not in thin]
    factors = _send_factors(thin, workers, merge, terms)
    changes = _send_changes(thick, workers, merge, terms) if workers is not None else dict

    @torch.no_grad()
    def arrive() -> None:
        _fold_(model, dict(zip(thin, factors(), strict=True)), changes(), workers, merge, terms)

    return arrive


def _fold_(
    model: nn.Module,
    factors: Mapping[SplitAdapter, Factors],
    changes: Mapping[SplitAdapter, Tensor],
    workers: Group | None,
    merge: Merge,
    terms: Terms,
) -> None:
    """W ← W with the mean of all heads, from their factors or as the change that it is; then they settle."""
    done: set[int] = set()
    for _, layer in adapted_layers(model):
        if all(id(adapter) in done for adapter in layer.adapters.values()):
            continue
        with unsharded_parameter(layer, "weight", terms.intra_worker):
            for part, adapter, W in layer.pieces():
                if id(adapter) in done or not isinstance(adapter, SplitAdapter) or not adapter.split:
                    continue
                done.add(id(adapter))
                before = W.to(wide(W.dtype))
                if adapter in factors:
                    counting = _counting(adapter.all_heads, workers, terms)
                    merged = _merged_from(adapter, factors[adapter], counting, before)
                else:
                    merged = before + changes[adapter]
                write_merged_(W, merge.step(before, merged, adapter), adapter, part)
                _settle_(adapter, factors.get(adapter), merge, terms.spans.get(adapter))
            fold_(layer, done, merge)


# --- factors ---------------------------------------------------------------------------------------------------------


def _to_send(adapter: LoRAAdapter, merge: Merge) -> dict[str, Tensor]:
    if merge.overlap:
        return {"A": adapter.sent_A, "B": adapter.sent_B}
    return {name: p.detach() for name, p in adapter.named_parameters()}


def _send_factors(
    adapters: Sequence[LoRAAdapter], workers: Group | None, merge: Merge, terms: Terms
) -> Callable[[], list[dict[str, Tensor]]]:
    """A and B of all heads, (N, ...), as everyone knows them. What is rounded is what they have changed by since the
    last merge, where factors are kept: so rounding is as fine as the change, and what it leaves out stays in the
    head (which subtracts only what was merged) and travels with the next."""
    exchange, mine = merge.exchange, [_to_send(a, merge) for a in adapters]
    if workers is None:
        return lambda: mine
    if exchange == "float32":
        return start_gather_heads(mine, adapters, workers)
    known = [_known_factors(a, workers, terms.left_out) for a in adapters]
    coded: list[dict[str, Tensor]] = []
    for adapter, factors, bases in zip(adapters, mine, known, strict=True):
        own, tick = slice(adapter.first_head, adapter.first_head + adapter.heads), int(adapter.merges)
        changed = {name: t - bases[name][own] for name, t in factors.items()}
        sent = {name: encode(x, exchange, tick * workers.count + workers.rank) for name, x in changed.items()}
        coded.append({f"{name} {i}": t for name, parts in sent.items() for i, t in enumerate(parts)})
    arrive = start_gather_heads(coded, adapters, workers)
    return lambda: [_decoded(bases, parts, exchange) for bases, parts in zip(known, arrive(), strict=True)]


def _decoded(bases: Factors, parts: Factors, exchange: Exchange) -> dict[str, Tensor]:
    by_name = {name: [parts[key] for key in sorted(parts) if key.startswith(f"{name} ")] for name in bases}
    return {n: b + decode(by_name[n], exchange, tuple(b.shape), b.dtype) for n, b in bases.items()}


def _known_factors(adapter: LoRAAdapter, workers: Group, left_out: Collection[int]) -> dict[str, Tensor]:
    """What every worker knows already of the factors of all heads: those kept, of heads that have not begun anew."""
    if not adapter.keep:
        shapes = {name: (adapter.all_heads, *p.shape[1:]) for name, p in adapter.named_parameters()}
        return {name: adapter.A.new_zeros(shape) for name, shape in shapes.items()}
    same = torch.zeros(adapter.all_heads, 1, 1, dtype=adapter.A.dtype, device=adapter.A.device)
    same[_taking_part(adapter.all_heads, workers, left_out)] = 1
    return {"A": adapter.kept_A * same, "B": adapter.kept_B * same}


def _merged_from(adapter: SplitAdapter, factors: Factors, counting: Mapping[int, float], W: Tensor) -> Tensor:
    """``merged(W)`` of the heads counting, by the arithmetic of one process that holds just these; ``counting``: by
    head, how many times the mean of them it weighs."""
    kept = {n: b for n, b in adapter.named_buffers() if n in KEPT}
    everything = {**factors, **kept}
    if len(counting) < adapter.all_heads:
        everything = {name: tensor[list(counting)] for name, tensor in everything.items()}
    if any(weight != 1.0 for weight in counting.values()):
        scale = W.new_tensor(list(counting.values()))[:, None, None]
        everything = {n: t * scale if n in ("B", "kept_B") else t for n, t in everything.items()}
    with holding(adapter, everything, len(counting)):
        return adapter.merged(W)


# --- changes ---------------------------------------------------------------------------------------------------------


def _send_changes(
    adapters: Sequence[SplitAdapter], workers: Group, merge: Merge, terms: Terms
) -> Callable[[], dict[SplitAdapter, Tensor]]:
    """The mean change (out, in) over the heads of all workers: dense sums, or inside a subspace that all know."""
    weights, spans = terms.weights, terms.spans
    inside: list[Tensor] = []
    for adapter in adapters:
        mine = adapter.heads if weights is None else weights[workers.rank]
        change = _change(adapter, merge) * (0 if workers.rank in terms.left_out else mine)
        inside.append(spans[adapter].project(change) if adapter in spans else change)
    arrive = start_add_up(inside, workers, merge.exchange, int(adapters[0].merges) if adapters else 0)

    def finish() -> dict[SplitAdapter, Tensor]:
        arrive()
        found: dict[SplitAdapter, Tensor] = {}
        for adapter, change in zip(adapters, inside, strict=True):
            parted = len(_taking_part(adapter.all_heads, workers, terms.left_out))
            change.div_(parted if weights is None else sum(weights))
            found[adapter] = spans[adapter].lift(change) if adapter in spans else change
        return found

    return finish


def _change(adapter: SplitAdapter, merge: Merge) -> Tensor:
    if isinstance(adapter, LoRAAdapter) and merge.overlap:
        with holding(adapter, _to_send(adapter, merge), adapter.heads):
            return adapter.delta()
    return adapter.delta()


# --- both ------------------------------------------------------------------------------------------------------------


def _settle_(adapter: SplitAdapter, factors: Factors | None, merge: Merge, span: Subspace | None) -> None:
    """After the merge: subtract from now on what was merged, and no more."""
    if isinstance(adapter, LoRAAdapter) and adapter.keep and (factors is not None or merge.overlap):
        merged = _to_send(adapter, merge) if factors is None else factors
        adapter.settle_with_(merged["A"], merged["B"])
    elif isinstance(adapter, DenseAdapter) and span is not None:
        outside = adapter.D - span.lift(span.project(adapter.D))
        adapter.settle_()
        adapter.D.copy_(outside)  # nothing but rounding, unless the subspace has moved since the last merge
    else:
        adapter.settle_()


def _taking_part(heads: int, workers: Group | None, left_out: Collection[int]) -> list[int]:
    if workers is None:
        return list(range(heads))
    return [h for r in range(workers.count) if r not in left_out for h in share(heads, r, workers.count)]


def _counting(heads: int, workers: Group | None, terms: Terms) -> dict[int, float]:
    """The heads taking part: by number, how many times the mean of them each weighs."""
    part, weights = _taking_part(heads, workers, terms.left_out), terms.weights
    if weights is None or workers is None:
        return dict.fromkeys(part, 1.0)
    shares = [share(heads, r, workers.count) for r in range(workers.count)]
    by_head = {h: weights[r] / len(own) for r, own in enumerate(shares) for h in own}
    return {h: by_head[h] * len(part) / sum(weights) for h in part}
