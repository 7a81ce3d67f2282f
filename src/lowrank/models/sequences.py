"""Models that give a class or a score to a sequence: any encoder or decoder of transformers with a new output layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowrank.data.text.glue import Glue
from lowrank.infra.hub import located
from lowrank.infra.loaded_parameters import mark_loaded_
from lowrank.infra.registry import register
from lowrank.models.text import weights_dtype, without_bars


@register("model", "sequence-classifier", task="sequences", tokenizer="path")
def sequence_classifier(data: Glue, *, path: str = "", dtype: str = "float32") -> nn.Module:
    """A pre-trained model of transformers with an output layer for sequences, new where the folder has none.

    Args:
        path: a local folder, or a name on the hub, such as ``FacebookAI/roberta-base``.
        dtype: of the weights; ``auto`` is the one that they are saved in.
    """
    import transformers

    folder = Path(path).expanduser()
    if not path or (path.startswith((".", "/", "~")) and not (folder / "config.json").is_file()):
        raise FileNotFoundError(f"model.path={path!r} is no folder with config.json; give one, or a name on the hub")
    auto: Any = transformers.AutoModelForSequenceClassification
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would report the new head, which is meant
    try:
        with without_bars():
            model, info = auto.from_pretrained(
                located(path),
                num_labels=data.outputs,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
                dtype=weights_dtype(dtype),
            )
    finally:
        transformers.logging.set_verbosity(level)
    model.config.pad_token_id = data.padding
    new = set(info["missing_keys"]) | {mismatch[0] for mismatch in info["mismatched_keys"]}
    mark_loaded_(model, [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in new])
    return model
