"""How a run trains: the one loop, its checkpoints, and what it asks of several ranks."""

from lowrank.train.loop import train

__all__ = ["train"]
