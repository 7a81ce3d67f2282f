"""What we offer: the catalogue of the field's methods, each a value of one type.

    A method is what we add to the weights (adapt), how we turn gradients into steps (rules), and when the first is
    merged into the weights (merge).

Each function here returns the ``Method`` of one paper with that paper's defaults; its docstring cites it and says
where the defaults differ. Arguments mean the same everywhere:

* ``target_modules``, ``exclude_modules``: which linear layers (``lowrank.targets`` lists the groups and forms);
* ``rank``, ``alpha``, ``heads``, ``dropout``: of the adapters; the scale is alpha / rank, heads are averaged. For the
  methods with low-rank gradients, ``rank`` is that of the subspace;
* ``merge_every``: steps between two merges;
* ``refresh_every``: steps between two refreshes of a gradient's basis; ``scale`` multiplies the projected steps;
* ``rest``: what becomes of the parameters that were not chosen: ``"train"``, ``"freeze"``, or ``"auto"`` (train what
  was initialised at random, freeze what was loaded). Over several ranks ``"train"`` sums their gradients every step;
  ``"local"`` trains them on each rank by itself and averages them every ``rest_every`` steps (by default four merge
  intervals, of ``diloco`` one), which is what ``"auto"`` does for methods whose heads split the batch;
* ``freeze``: patterns frozen in any case, such as ``"*.bias"``, ``"wte"`` or ``"first:4"`` (the first four blocks);
* ``ties``: a chosen layer whose weight is tied to another's (GPT-2's ``lm_head`` and ``wte``): ``"adapt"`` both as the
  one matrix that they are, ``"leave"`` it alone, or ``"untie"`` it first;
* ``embedding_lr``, ``head_lr``, ``vector_lr`` and ``embedding_decay``, ``head_decay``, ``vector_decay``: ratios to the
  run's learning rate and weight decay for embedding tables, output layers, and norms and biases; ``betas``, ``eps``: of
  every rule of Adam's kind. Every method takes these (``lowrank.methods.groups``).
"""

from typing import TYPE_CHECKING

from lowrank.infra.lazy import attributes
from lowrank.infra.registry import Registry

if TYPE_CHECKING:
    from lowrank.methods.combined import lte_galore
    from lowrank.methods.full_weights import adafactor, diloco, dion, full_8bit, muon, scale, soap
    from lowrank.methods.low_rank_gradients import (
        apollo,
        apollo_mini,
        fira,
        frugal,
        galore,
        galore_8bit,
        galore_adafactor,
        galore_muon,
        ldadam,
    )
    from lowrank.methods.low_rank_weights import (
        apla,
        dora,
        frozen,
        full,
        linear_probe,
        lora,
        lora_muon,
        lora_plus,
        lora_rite,
        lte,
        multihead_lora,
        pissa,
        relora,
        rslora,
    )
    from lowrank.methods.method import Adapt, Family, Groups, Method, Use

__getattr__ = attributes(__name__, __file__)


METHODS = Registry(
    "method",
    "lowrank.methods.low_rank_weights",
    "lowrank.methods.full_weights",
    "lowrank.methods.low_rank_gradients",
    "lowrank.methods.combined",
)


def summary(name: str) -> str:
    """The first line of a method's docstring."""
    return METHODS.signature(name).doc.partition("\n")[0]


__all__ = [
    "METHODS",
    "Adapt",
    "Family",
    "Groups",
    "Method",
    "Use",
    "adafactor",
    "apla",
    "apollo",
    "apollo_mini",
    "diloco",
    "dion",
    "dora",
    "fira",
    "frozen",
    "frugal",
    "full",
    "full_8bit",
    "galore",
    "galore_8bit",
    "galore_adafactor",
    "galore_muon",
    "ldadam",
    "linear_probe",
    "lora",
    "lora_muon",
    "lora_plus",
    "lora_rite",
    "lte",
    "lte_galore",
    "multihead_lora",
    "muon",
    "pissa",
    "relora",
    "rslora",
    "scale",
    "soap",
    "summary",
]
