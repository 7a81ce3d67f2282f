"""Side room: models. Presets and local weights, through transformers and timm; nothing here knows a method.

``MODELS``: name -> function(data, *, options); each says the ``task`` that it is for.
"""

from lowrank.infra.registry import Registry

MODELS = Registry(
    "model",
    "lowrank.models.text",
    "lowrank.models.sequences",
    "lowrank.models.vision",
    "lowrank.models.volumes",
    "lowrank.models.segmenter",
)

__all__ = ["MODELS"]
