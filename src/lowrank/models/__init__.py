"""Side room: models. Presets and local weights, through transformers and timm; nothing here knows a method.

``MODELS``: name -> function(data, *, options); ``TASK_OF``: name -> the task that it is for.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from lowrank.models import text, vision

MODELS: dict[str, Callable[..., nn.Module]] = {**text.MODELS, **vision.MODELS}
TASK_OF: dict[str, Any] = {**dict.fromkeys(text.MODELS, "text"), **dict.fromkeys(vision.MODELS, "images")}

__all__ = ["MODELS", "TASK_OF"]
