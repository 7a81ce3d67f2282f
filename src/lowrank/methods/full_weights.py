"""Full weights, by other rules than AdamW: the baselines that a method of low rank has to beat.

Every weight trains. ``target_modules`` are the matrices that follow the method's rule (by default every linear layer
but the output); everything else follows AdamW at the same learning rate, times the ratios that every method takes
(``methods.groups``).
"""

from __future__ import annotations

from lowrank.adapters.targets import Targets
from lowrank.infra.registry import register
from lowrank.infra.signatures import also
from lowrank.methods.groups import groups
from lowrank.methods.method import Method, Rest, Use
from lowrank.optim.muon import Muon, MuonScale, Precision
from lowrank.optim.normalised import ColumnNormalised
from lowrank.optim.rules import AdamW
from lowrank.optim.storage import Storage


@register("method", family="none")
@also(groups)
def full_8bit(*, storage: Storage = "int8", rest: Rest = "train", freeze: Targets = ()) -> Method:
    """Full training by AdamW whose moments are kept in 8 bits (Dettmers et al., arXiv 2110.02861), or in bfloat16.

    ``storage`` is ``int8`` (blocks of 256, dithered), ``bfloat16`` or ``float32``, which is ``full``.
    """
    return Method(name="full_8bit", rules=(Use("*", AdamW(storage=storage)),), rest=rest, freeze=freeze)


@register("method", family="none")
@also(groups)
def muon(
    target_modules: Targets = "all-linear",
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    iterations: int = 5,
    scale: MuonScale = "rms",
    precision: Precision = "float32",
    exclude_modules: Targets = (),
    rest: Rest = "train",
    freeze: Targets = (),
) -> Method:
    """Muon (Jordan et al. 2024; Liu et al., arXiv 2502.16982): orthogonalised momentum on matrices, AdamW elsewhere.

    With ``scale="rms"`` steps are as long as AdamW's, so that one learning rate serves both; ``keller`` and
    ``spectral`` are the other scales by shape in use. ``iterations`` are of Newton and Schulz, in ``precision``. Fused
    q, k, v are orthogonalised one by one.
    """
    rule = Muon(momentum=momentum, nesterov=nesterov, iterations=iterations, scale=scale, precision=precision)
    rules = (Use(target_modules, rule, exclude_modules=exclude_modules), Use("*", AdamW()))
    return Method(name="muon", rules=rules, rest=rest, freeze=freeze)


@register("method", family="none")
@also(groups)
def scale(*, momentum: float = 0.9, rest: Rest = "train", freeze: Targets = ()) -> Method:
    """SCALE (Glentis et al., arXiv 2506.16659): gradients normalised by column, momentum on the output layer alone.

    No matrix but the output layer has any state; vectors follow AdamW.
    """
    rules = (Use("head", ColumnNormalised(momentum=momentum)), Use("*", ColumnNormalised()))
    return Method(name="scale", rules=rules, rest=rest, freeze=freeze)
