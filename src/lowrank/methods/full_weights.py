"""Full weights, by other rules than AdamW or in local steps: the baselines that a method of low rank has to beat.

Every weight trains. ``target_modules`` are the matrices that follow the method's rule (by default every linear layer
but the output); everything else follows AdamW at the same learning rate, times the ratios that every method takes
(``methods.groups``).
"""

from __future__ import annotations

from typing import Literal

from lowrank.adapters import Dense, Merge
from lowrank.adapters.targets import Targets
from lowrank.infra.checks import check_choice
from lowrank.infra.registry import register
from lowrank.infra.signatures import also
from lowrank.methods.groups import adapted, groups, merged, others
from lowrank.methods.method import FACTORS, Adapt, Method, Use
from lowrank.optim.adafactor import Adafactor
from lowrank.optim.dion import Dion
from lowrank.optim.muon import Muon, MuonScale, Precision
from lowrank.optim.normalised import ColumnNormalised
from lowrank.optim.rules import AdamW, Rule
from lowrank.optim.soap import Soap
from lowrank.optim.storage import Storage

Inner = Literal["adamw", "muon"]


@register("method", family="none")
@also(others, groups)
def full_8bit(*, storage: Storage = "int8") -> Method:
    """Full training by AdamW whose moments are kept in 8 bits (Dettmers et al., arXiv 2110.02861), or in bfloat16.

    ``storage`` is ``int8`` (blocks of 256, dithered), ``bfloat16`` or ``float32``, which is ``full``.
    """
    return Method(name="full_8bit", rules=(Use("*", AdamW(storage=storage)),))


@register("method", family="none")
@also(others, groups)
def muon(
    target_modules: Targets = "all-linear",
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    iterations: int = 5,
    scale: MuonScale = "rms",
    precision: Precision = "float32",
    exclude_modules: Targets = (),
) -> Method:
    """Muon (Jordan et al. 2024; Liu et al., arXiv 2502.16982): orthogonalised momentum on matrices, AdamW elsewhere.

    With ``scale="rms"`` steps are as long as AdamW's, so that one learning rate serves both; ``keller`` and
    ``spectral`` are the other scales by shape in use. ``iterations`` are of Newton and Schulz, in ``precision``. Fused
    q, k, v are orthogonalised one by one.
    """
    rule = Muon(momentum=momentum, nesterov=nesterov, iterations=iterations, scale=scale, precision=precision)
    rules = (Use(target_modules, rule, exclude_modules=exclude_modules), Use("*", AdamW()))
    return Method(name="muon", rules=rules)


@register("method", family="none")
@also(others, groups)
def scale(*, momentum: float = 0.9) -> Method:
    """SCALE (Glentis et al., arXiv 2506.16659): gradients normalised by column, momentum on the output layer alone.

    No matrix but the output layer has any state; vectors follow AdamW.
    """
    rules = (Use("head", ColumnNormalised(momentum=momentum)), Use("*", ColumnNormalised()))
    return Method(name="scale", rules=rules)


@register("method", family="none")
@also(others, groups)
def soap(
    target_modules: Targets = "all-linear",
    *,
    refresh_every: int = 10,
    largest: int = 10_000,
    exclude_modules: Targets = (),
) -> Method:
    """SOAP (Vyas et al., arXiv 2409.11321): Adam in the eigenbasis of Shampoo's preconditioners, AdamW elsewhere.

    The bases are refreshed every ``refresh_every`` steps by one power iteration and QR; a side longer than ``largest``
    has none. ``betas`` and ``eps``, where given, are also of AdamW; else SOAP's betas are the paper's, 0.95 and 0.95.
    """
    rule = Soap(refresh_every=refresh_every, largest=largest)
    rules = (Use(target_modules, rule, exclude_modules=exclude_modules), Use("*", AdamW()))
    return Method(name="soap", rules=rules)


@register("method", family="none")
@also(others, groups)
def dion(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 128,
    momentum: float = 0.95,
    scale: MuonScale = "spectral",
    exclude_modules: Targets = (),
) -> Method:
    """Dion (Ahn et al., arXiv 2504.05295): orthonormal steps of low rank with error feedback, AdamW elsewhere.

    What a step leaves out stays in the momentum, which is whole: this saves time and communication, not memory. Steps
    are scaled by shape as in ``muon``, by default with the paper's √(out/in). Fused q, k, v are stepped one by one.
    """
    rule = Dion(rank=rank, momentum=momentum, scale=scale)
    rules = (Use(target_modules, rule, exclude_modules=exclude_modules), Use("*", AdamW()))
    return Method(name="dion", rules=rules)


@register("method", family="none")
@also(others, groups)
def adafactor(
    *,
    beta1: float | None = None,
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    scale_parameter: bool = False,
    relative_step: bool = False,
) -> Method:
    """Adafactor (Shazeer and Stern, arXiv 1804.04235) on every parameter: row and column means for second moments.

    Its state is a few numbers a row and column, with ``beta1`` also a first moment. ``scale_parameter`` multiplies each
    step by the parameter's RMS and ``relative_step`` by min(0.01, 1/√t), as in the paper; both are off by default, so
    that the run's learning rate means what it means for other methods.
    """
    rule = Adafactor(
        beta1=beta1,
        clip_threshold=clip_threshold,
        decay_rate=decay_rate,
        scale_parameter=scale_parameter,
        relative_step=relative_step,
    )
    return Method(name="adafactor", rules=(Use("*", rule),))


@register("method", family="none")
@also(merged, adapted, groups, outer_lr=0.7, outer_momentum=0.9, rest="local")
def diloco(
    target_modules: Targets = "all-linear",
    *,
    inner: Inner = "adamw",
    heads: int = 4,
    merge_every: int = 30,
    fragments: int = 1,
) -> Method:
    """DiLoCo (Douillard et al., arXiv 2311.08105): whole weights trained locally, an outer Nesterov step at merges.

    A head is one of the paper's workers: a change of W of full rank, trained on its shard of the batch by the inner
    rule, AdamW or Muon (MuLoCo, arXiv 2505.23725). At a merge the mean of the changes is minus the outer gradient, and
    every head starts again from the weights that the outer step leaves; the inner rule's state goes on. Under
    ``torchrun`` ranks divide the heads between them; in one process all are there, at heads · out · in numbers and
    their states. Everything else trains on each rank by itself and is averaged, plainly, at every merge unless
    ``rest_every`` says otherwise. The run's weight decay is not for the matrices: it would decay the changes.

    Args:
        heads: local copies of every matrix, each trained on its shard of the batch: the paper's workers.
        merge_every: steps between two outer steps: 500 in DiLoCo, 30 in MuLoCo and here.

    Raises:
        ValueError: an unknown inner rule.
    """
    check_choice("inner", inner, Inner)
    rule: Rule = AdamW() if inner == "adamw" else Muon()
    return Method(
        name="diloco",
        adapt=(Adapt(target_modules, Dense(heads=heads, split=True)),),
        rules=(Use(FACTORS, rule, decay=False), Use("*", AdamW())),
        merge=Merge(merge_every, fragments=fragments),
        rest_merges=1,
    )
