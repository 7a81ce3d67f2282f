"""Low-rank training of neural networks: adapters, projected optimizers, merging, and an honest comparison.

In short:

    method = lowrank.methods.lte(target_modules="attention", rank=4, heads=4, merge_every=10)
    plan = lowrank.apply_(model, method)
    opt = plan.optimizer(lr=6e-4, weight_decay=0.1)
    ...                                              # loss.backward(); opt.step(); opt.zero_grad()
    lowrank.merge_and_unload(model)
"""

from typing import TYPE_CHECKING

from lowrank.infra import old_names
from lowrank.infra.lazy import attributes

if TYPE_CHECKING:
    from lowrank import adapters, methods, optim
    from lowrank.adapters import merge_and_unload
    from lowrank.doctor.check import check
    from lowrank.infra.loaded_parameters import mark_loaded_
    from lowrank.methods import METHODS, Adapt, Method, Use
    from lowrank.optim.optimizer import Optimizer
    from lowrank.plan.measure import ledger
    from lowrank.plan.plan import Plan, apply_, merge_

__getattr__ = attributes(__name__, __file__)

__version__ = "0.1.0"

old_names.register()

__all__ = [
    "METHODS",
    "Adapt",
    "Method",
    "Optimizer",
    "Plan",
    "Use",
    "adapters",
    "apply_",
    "check",
    "ledger",
    "mark_loaded_",
    "merge_",
    "merge_and_unload",
    "methods",
    "optim",
]
