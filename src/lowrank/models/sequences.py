"""Models that give a class or a score to a sequence: any encoder or decoder of transformers with a new output layer."""

from __future__ import annotations

from torch import nn

from lowrank.data.text.glue import Glue
from lowrank.infra.loaded_parameters import mark_all_but_
from lowrank.infra.registry import register
from lowrank.models.new_head import with_new_head
from lowrank.models.text import weights_dtype


@register("model", "sequence-classifier", task="sequences", tokenizer="path")
def sequence_classifier(data: Glue, *, path: str = "", dtype: str = "float32") -> nn.Module:
    """A pre-trained model of transformers with an output layer for sequences, new where the folder has none.

    Args:
        path: a local folder, or a name on the hub, such as ``FacebookAI/roberta-base``.
        dtype: of the weights; ``auto`` is the one that they are saved in.
    """
    model, new = with_new_head("AutoModelForSequenceClassification", path, data.outputs, weights_dtype(dtype))
    model.config.pad_token_id = data.padding
    return mark_all_but_(model, *new)
