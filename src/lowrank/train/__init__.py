"""How a run trains: the one loop, its checkpoints, and what it asks of several ranks."""

from typing import TYPE_CHECKING

from lowrank.infra.lazy import attributes

if TYPE_CHECKING:
    from lowrank.train.loop import train

__getattr__ = attributes(__name__, __file__)

__all__ = ["train"]
