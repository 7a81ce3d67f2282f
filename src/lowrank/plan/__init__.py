"""Binds a method to a model: which parameter trains by which adapter and rule, and what that costs."""

from lowrank.plan.assignment import Row
from lowrank.plan.memory import Ledger
from lowrank.plan.plan import Plan, apply_, merge_

__all__ = ["Ledger", "Plan", "Row", "apply_", "merge_"]
