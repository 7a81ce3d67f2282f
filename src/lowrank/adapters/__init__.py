"""Low-rank weights: trainable changes to frozen matrices, and when they are merged."""

from typing import TYPE_CHECKING

from lowrank.infra.lazy import attributes

if TYPE_CHECKING:
    from lowrank.adapters.adapter import Adapter, Additive, Site
    from lowrank.adapters.dense import Dense, DenseAdapter
    from lowrank.adapters.dora import DoRA, DoRAAdapter
    from lowrank.adapters.frozen import Unchanged, UnchangedAdapter
    from lowrank.adapters.layers import AdaptedEmbedding, AdaptedLayer, AdaptedLinear
    from lowrank.adapters.lora import LoRA, LoRAAdapter
    from lowrank.adapters.merge import Merge, merge_adapters_, merge_and_unload
    from lowrank.adapters.split_adapter import SplitAdapter

__getattr__ = attributes(__name__, __file__)

__all__ = [
    "AdaptedEmbedding",
    "AdaptedLayer",
    "AdaptedLinear",
    "Adapter",
    "Additive",
    "Dense",
    "DenseAdapter",
    "DoRA",
    "DoRAAdapter",
    "LoRA",
    "LoRAAdapter",
    "Merge",
    "Site",
    "SplitAdapter",
    "Unchanged",
    "UnchangedAdapter",
    "merge_adapters_",
    "merge_and_unload",
]
