"""Models without their weights: what a plan of a run goes through, made from a configuration and marked as loaded.

``UNLOADED``: name in ``MODELS`` -> function(data, *, options), of the models that load weights whatever their options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.infra.hub import located
from lowrank.infra.loaded_parameters import mark_all_but_
from lowrank.infra.registry import Registry, register
from lowrank.linalg.quantised_linear import Quantised
from lowrank.models.quantised import quantise_, quantised_as
from lowrank.models.text import weights_dtype
from lowrank.models.vision import ImageSpec

UNLOADED = Registry("unloaded", "lowrank.models.without_weights")


@register("unloaded")
def pretrained(
    data: Any, *, path: str = "gpt2", dtype: str = "float32", quantise: Quantised | None = None
) -> nn.Module:
    if not path:
        raise ValueError("which model? give --model.path FOLDER|NAME, a causal language model of transformers")
    config = _configuration(path)
    made = _of_transformers("AutoModelForCausalLM", config, dtype)
    return mark_all_but_(quantised_as(made, config) if quantise is None else quantise_(made, quantise))


@register("unloaded", "sequence-classifier")
def sequence_classifier(data: Any, *, path: str = "", dtype: str = "float32") -> nn.Module:
    config = _configuration(path)
    config.num_labels = data.outputs
    return mark_all_but_(_of_transformers("AutoModelForSequenceClassification", config, dtype), "classifier", "score")


@register("unloaded", "hf-vit")
def hf_vit(data: Any, *, path: str = "", image_size: int | None = None) -> nn.Module:
    config = _configuration(path)
    config.num_labels = len(data.classes)
    if image_size is not None:
        config.image_size = image_size
    made: Any = _of_transformers("AutoModelForImageClassification", config, "float32")
    made.image_spec = ImageSpec(size=config.image_size)
    return mark_all_but_(made, "classifier")


def _of_transformers(auto: str, config: Any, dtype: str) -> nn.Module:
    """The model of a configuration; ``dtype`` is that of its weights, or "auto" for the configuration's own."""
    import transformers

    own = getattr(config, "dtype", None) or torch.float32
    made: nn.Module = getattr(transformers, auto).from_config(
        config, trust_remote_code=False, dtype=own if dtype == "auto" else weights_dtype(dtype)
    )
    return made


def _configuration(path: str) -> Any:
    """transformers' configuration from a folder or the hub.

    Raises:
        FileNotFoundError: there is none.
    """
    import transformers

    folder = Path(path).expanduser()
    if (path.startswith((".", "/", "~")) or folder.is_dir()) and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model.path={path!r} has no config.json, from which its memory could be told")
    try:
        return transformers.AutoConfig.from_pretrained(located(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise ValueError(f"{folder / 'config.json'} is none of transformers' configurations: {error}") from error
        raise FileNotFoundError(
            f"the configuration of {path} could not be had from the hub ({type(error).__name__}): give a folder with "
            "config.json, --model.path FOLDER"
        ) from error
