"""What one does with a trained run: score it, predict with it, generate from it; and the tasks with their metrics."""

from typing import TYPE_CHECKING

from lowrank.infra.lazy import attributes

if TYPE_CHECKING:
    from lowrank.evaluate.evaluator import evaluate

__getattr__ = attributes(__name__, __file__)

__all__ = ["evaluate"]
