"""Full training, the controls, and the methods with low-rank weights: LoRA and its relatives, LTE, ReLoRA."""

from __future__ import annotations

from typing import Literal

from lowrank.adapters import DoRA, LoRA, Merge, Unchanged
from lowrank.adapters.targets import Targets
from lowrank.infra.registry import register
from lowrank.infra.signatures import also
from lowrank.methods.groups import adapted, groups, merged, others
from lowrank.methods.method import FACTOR_B, FACTORS, Adapt, Method, Use
from lowrank.methods.schedule import Rewarm
from lowrank.optim.muon import MuonScale
from lowrank.optim.products import LoraMuon, LoraRite
from lowrank.optim.rules import AdamW
from lowrank.optim.storage import Storage


@register("method", family="none")
@also(others, groups)
def full(*, storage: Storage = "float32") -> Method:
    """Full training: every weight, by AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    ``storage="bfloat16"`` keeps its moments in half the bytes; ``full_8bit`` in a quarter.
    """
    return Method(name="full", rules=(Use("*", AdamW(storage=storage)),))


@register("method", family="none")
@also(others, groups)
def frozen(target_modules: Targets = "attention", *, exclude_modules: Targets = ()) -> Method:
    """The control of every comparison: the targets frozen as they are, no adapter, everything else trained.

    What an adapter method gains over this is due to its adapters. Not from a paper.
    """
    return Method(name="frozen", adapt=(Adapt(target_modules, Unchanged(), exclude_modules),))


@register("method", family="none")
@also(groups)
def linear_probe(target_modules: Targets = "head", *, freeze: Targets = ()) -> Method:
    """Linear probing (Alain and Bengio, arXiv 1610.01644): the output layer alone is trained, all else is frozen."""
    return Method(name="linear_probe", rules=(Use(target_modules, AdamW()),), rest="freeze", freeze=freeze)


@register("method", family="none")
@also(groups)
def apla(target_modules: Targets = ("o", "head"), *, freeze: Targets = ()) -> Method:
    """APLA (Sorkhei et al., arXiv 2503.18873): attention's output projections are trained whole, and the output layer.

    Nothing is added to the model, all else is frozen. An output layer that is tied to an embedding cannot be named:
    ``target_modules="o"`` leaves it as it is.
    """
    return Method(name="apla", rules=(Use(target_modules, AdamW()),), rest="freeze", freeze=freeze)


@register("method", family="adapter")
@also(adapted, groups)
def lora(
    target_modules: Targets = ("q", "v"), *, rank: int = 8, alpha: float | None = 16, dropout: float = 0.0
) -> Method:
    """LoRA (Hu et al., arXiv 2106.09685): W + (alpha/rank)·B A, on q and v as in the paper.

    A starts Kaiming-uniform, B at zero.
    """
    make = LoRA(rank=rank, alpha=alpha, dropout=dropout)
    return Method(name="lora", adapt=(Adapt(target_modules, make),))


@register("method", family="adapter")
@also(adapted, groups)
def rslora(
    target_modules: Targets = ("q", "v"), *, rank: int = 8, alpha: float | None = 16, dropout: float = 0.0
) -> Method:
    """Rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732): LoRA at scale alpha/√rank.

    High ranks then learn as fast as low ones.
    """
    make = LoRA(rank=rank, alpha=alpha, dropout=dropout, rank_stabilised=True)
    return Method(name="rslora", adapt=(Adapt(target_modules, make),))


@register("method", family="adapter")
@also(adapted, groups)
def dora(
    target_modules: Targets = "all-linear", *, rank: int = 8, alpha: float | None = 16, dropout: float = 0.0
) -> Method:
    """DoRA (Liu et al., arXiv 2402.09353): the weight's magnitude and direction apart, LoRA on the direction."""
    make = DoRA(LoRA(rank=rank, alpha=alpha, dropout=dropout))
    return Method(name="dora", adapt=(Adapt(target_modules, make),))


@register("method", family="adapter")
@also(adapted, groups)
def pissa(
    target_modules: Targets = "all-linear", *, rank: int = 16, alpha: float | None = None, dropout: float = 0.0
) -> Method:
    """PiSSA (Meng et al., arXiv 2404.02948): LoRA that starts from the leading singular vectors of W.

    The scale is 1 by default (``alpha`` None means alpha = rank).
    """
    make = LoRA(rank=rank, alpha=alpha, dropout=dropout, init="pissa")
    return Method(name="pissa", adapt=(Adapt(target_modules, make),))


@register("method", family="adapter")
@also(adapted, groups)
def lora_plus(
    target_modules: Targets = ("q", "v"),
    *,
    rank: int = 8,
    alpha: float | None = 16,
    ratio: float = 16.0,
    dropout: float = 0.0,
) -> Method:
    """LoRA+ (Hayou et al., arXiv 2402.12354): LoRA with ``ratio`` times the learning rate for B (the paper's λ)."""
    make = LoRA(rank=rank, alpha=alpha, dropout=dropout)
    return Method(
        name="lora_plus",
        adapt=(Adapt(target_modules, make),),
        rules=(Use(FACTOR_B, AdamW(), lr=ratio, decay=False), Use("*", AdamW())),
    )


@register("method", family="adapter")
@also(adapted, groups)
def lora_rite(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> Method:
    """LoRA-RITE (Yen et al., arXiv 2410.20625): LoRA whose steps on BA do not depend on how BA is split.

    Adam with matrices for second moments, in coordinates that turn with the factors; AdamW elsewhere. The scale is 1 by
    default (``alpha`` None means alpha = rank).
    """
    rules = (Use(FACTORS, LoraRite(), decay=False), Use("*", AdamW()))
    adapt = (Adapt(target_modules, LoRA(rank=rank, alpha=alpha, dropout=dropout)),)
    return Method(name="lora_rite", adapt=adapt, rules=rules)


@register("method", family="adapter")
@also(adapted, groups)
def lora_muon(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 16,
    alpha: float | None = None,
    momentum: float = 0.95,
    scale: MuonScale = "rms",
    dropout: float = 0.0,
) -> Method:
    """LoRA-Muon (Cesista et al., arXiv 2606.12921): Muon's step on BA, half by each factor; AdamW elsewhere.

    ``scale`` is by the shape of BA, as in ``muon`` (the paper's is ``none``). BA itself counts once by default
    (``alpha`` None means alpha = rank).
    """
    rules = (Use(FACTORS, LoraMuon(momentum=momentum, scale=scale), decay=False), Use("*", AdamW()))
    adapt = (Adapt(target_modules, LoRA(rank=rank, alpha=alpha, dropout=dropout)),)
    return Method(name="lora_muon", adapt=adapt, rules=rules)


@register("method", family="adapter")
@also(adapted, groups)
def multihead_lora(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 4,
    heads: int = 4,
    alpha: float | None = None,
    init: Literal["orthogonal", "kaiming", "reference"] = "orthogonal",
    dropout: float = 0.0,
) -> Method:
    """Multi-head LoRA (Huh et al., arXiv 2402.16828, section 3.2): W + (s/N) Σ_h B_h A_h, all heads on every batch.

    The mean over N heads makes a step N times smaller than that of one LoRA of rank N·rank, so ``alpha`` defaults to
    4·rank, as for ``lte``.
    """
    make = LoRA(rank=rank, alpha=_four_times(alpha, rank), heads=heads, init=init, dropout=dropout)
    return Method(name="multihead_lora", adapt=(Adapt(target_modules, make),))


@register("method", family="adapter")
@also(merged, adapted, groups)
def lte(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 4,
    heads: int = 4,
    alpha: float | None = None,
    merge_every: int = 10,
    keep: bool = True,
    forget: float = 0.0,
    overlap: bool = False,
    fragments: int = 1,
    init: Literal["orthogonal", "kaiming", "reference"] = "orthogonal",
    dropout: float = 0.0,
) -> Method:
    """LoRA-the-Explorer (Huh et al., arXiv 2402.16828): heads train on shards of the batch and are merged regularly.

    They merge every ``merge_every`` steps, reset-less by default (``keep=True``): the factors go on, and what they had
    added at the merge is subtracted. The paper's ViT-S runs use 32 heads of rank 64 at T = 10, and it advises
    heads·rank of at least the largest side; the small defaults here suit small models. ``alpha`` defaults to 4·rank, by
    our own measurement; ``init="reference"`` (A times √(in/rank)) goes with the reference's alpha of 4096.

    Under ``torchrun`` each rank trains its share of the heads on its share of the batch, and ranks communicate only at
    merges and, where the rest of the model trains locally, when it is averaged: every ``rest_every`` steps (by default
    four merge intervals). ``exchange``: numbers travel as they are, rounded to bfloat16 or int8, or with error feedback
    in ``2bit`` or the largest 3 or 1 % of them alone (``topk3``, ``topk1``; MuLoCo, arXiv 2505.23725, and SparseLoCo,
    2508.15706); ``weigh``: ranks weigh the same, or by what they have done since the last merge. With ``outer_lr`` or
    ``outer_momentum`` an outer optimizer takes the step at merges (DiLoCo, arXiv 2311.08105: 0.7 and 0.9), and with
    ``overlap`` what is sent at one merge arrives at the next, and with ``fragments`` groups of matrices merge at
    different steps of the interval (Streaming DiLoCo, arXiv 2501.18512), on one rank as on many. See ``Merge``.
    """
    make = LoRA(rank=rank, alpha=_four_times(alpha, rank), heads=heads, split=True, init=init, dropout=dropout)
    return Method(
        name="lte",
        adapt=(Adapt(target_modules, make),),
        merge=Merge(merge_every, keep=keep, forget=forget, overlap=overlap, fragments=fragments),
    )


@register("method", family="adapter")
@also(adapted, groups)
def relora(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 128,
    alpha: float | None = 32,
    merge_every: int = 1000,
    forget: float = 0.9,
    restart_warmup: int | None = None,
    dropout: float = 0.0,
) -> Method:
    """ReLoRA (Lialin et al., arXiv 2307.05695): LoRA merged and restarted every ``merge_every`` steps.

    At a restart the factors are drawn anew, a share ``forget`` of their moments is zeroed (where the first moment is
    smallest), and the learning rate ramps up again over ``restart_warmup`` steps, by default a tenth of ``merge_every``
    and at most 100. The paper's 5000 steps of full training before the first LoRA (its greatest single gain) are a run
    of their own: ``--method full``, then ``--init-from`` that run.
    """
    warmup = min(100, merge_every // 10) if restart_warmup is None else restart_warmup
    return Method(
        name="relora",
        adapt=(Adapt(target_modules, LoRA(rank=rank, alpha=alpha, dropout=dropout)),),
        merge=Merge(merge_every, keep=False, forget=forget),
        lr=Rewarm(every=merge_every, warmup=warmup),
    )


def _four_times(alpha: float | None, rank: int) -> float:
    return 4.0 * rank if alpha is None else alpha
