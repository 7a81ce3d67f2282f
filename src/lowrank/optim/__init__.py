"""Low-rank gradients: update rules, the subspaces they can run in, and the one optimizer that runs them."""

from typing import TYPE_CHECKING

from lowrank.infra.lazy import attributes

if TYPE_CHECKING:
    from lowrank.linalg.basis import SVD, Basis, Gaussian, JointBasis, PowerIteration
    from lowrank.optim.adafactor import Adafactor
    from lowrank.optim.capture import CapturedStep
    from lowrank.optim.dion import Dion
    from lowrank.optim.galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
    from lowrank.optim.lifts import GaLore, Lift, Rescale, Residual, Signed
    from lowrank.optim.moment_transport import ErrorFeedback
    from lowrank.optim.muon import Muon
    from lowrank.optim.normalised import ColumnNormalised
    from lowrank.optim.optimizer import Optimizer
    from lowrank.optim.pairs import PairRule
    from lowrank.optim.products import LoraMuon, LoraRite
    from lowrank.optim.projected import Projected
    from lowrank.optim.refresh_clock import Lazy
    from lowrank.optim.rules import SGD, AdamW, Rule, State
    from lowrank.optim.soap import Soap

__getattr__ = attributes(__name__, __file__)

__all__ = [
    "SGD",
    "SVD",
    "Adafactor",
    "AdamW",
    "Basis",
    "CapturedStep",
    "ColumnNormalised",
    "Dion",
    "ErrorFeedback",
    "GaLore",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "Gaussian",
    "JointBasis",
    "Lazy",
    "Lift",
    "LoraMuon",
    "LoraRite",
    "Muon",
    "Optimizer",
    "PairRule",
    "PowerIteration",
    "Projected",
    "Rescale",
    "Residual",
    "Rule",
    "Signed",
    "Soap",
    "State",
]
