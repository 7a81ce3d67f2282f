"""What one does with a trained run: score it, predict with it, generate from it; and the tasks with their metrics."""

from lowrank.evaluate.evaluator import evaluate

__all__ = ["evaluate"]
