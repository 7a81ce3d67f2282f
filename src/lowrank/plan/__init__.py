"""Binds a method to a model: which parameter trains by which adapter and rule, and what that costs."""

from typing import TYPE_CHECKING

from lowrank.infra.lazy import attributes

if TYPE_CHECKING:
    from lowrank.plan.ledger import Ledger
    from lowrank.plan.plan import Plan, apply_, merge_
    from lowrank.plan.row import Row

__getattr__ = attributes(__name__, __file__)

__all__ = ["Ledger", "Plan", "Row", "apply_", "merge_"]
