"""Models whose linear layers bitsandbytes quantises: as transformers does it while loading, or of a model at hand.

Output layers, and layers whose weight is tied, stay as they are; so do norms, biases and embeddings.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.infra.extras import import_extra
from lowrank.linalg.quantised_linear import Quantised, bitsandbytes, is_quantised, keep_unpacked_, quantised


def quantise_(model: nn.Module, kind: Quantised, *, double: bool = True, spare: list[str] | None = None) -> nn.Module:
    """Quantise the linear layers of a model of transformers, in place, and return it.

    Args:
        model: its weights in place.
        kind: nf4 or int8.
        double: quantise the scales of nf4 too.
        spare: ends of names of layers to leave; None: those that transformers leaves.
    """
    from transformers import quantizers
    from transformers.pytorch_utils import Conv1D

    bitsandbytes()
    left = quantizers.base.get_keys_to_not_convert(model) if spare is None else spare
    for name, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, Conv1D) or not quantizers.quantizers_utils.should_convert_module(name, left):
            continue
        weight: Any = module.weight
        parent, _, last = name.rpartition(".")
        W = weight.detach() if type(module) is nn.Linear else weight.detach().mT
        setattr(model.get_submodule(parent), last, quantised(module, W, kind, double=double))
    settle_quantised_(model)
    return model


def quantisation_config(path: str | Path, kind: Quantised) -> Any:
    """What tells transformers to quantise so while it loads.

    Raises:
        ImportError: bitsandbytes or accelerate is missing; names the extra.
        ValueError: the model in the folder is quantised already.
    """
    from transformers import AutoConfig, BitsAndBytesConfig

    bitsandbytes()
    import_extra("accelerate", "quantised")
    if getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "quantization_config", None) is not None:
        raise ValueError(f"{path} is quantised already: leave --model.quantise {kind} out")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def quantised_as(model: nn.Module, config: Any) -> nn.Module:
    """A model made of its configuration alone, quantised in place as that says that its weights are saved.

    Raises:
        ValueError: they are saved in another way than nf4 and int8 of bitsandbytes.
    """
    told: Any = getattr(config, "quantization_config", None)
    if told is None:
        return model
    told = told if isinstance(told, dict) else told.to_dict()
    in_8_bits = bool(told.get("load_in_8bit"))
    if told.get("quant_method") != "bitsandbytes" or not (in_8_bits or told.get("bnb_4bit_quant_type") == "nf4"):
        raise ValueError(
            f"the weights are quantised by {told.get('quant_method')}, and what they take is known of nf4 and int8 of "
            "bitsandbytes alone"
        )
    return quantise_(
        model,
        "int8" if in_8_bits else "nf4",
        double=bool(told.get("bnb_4bit_use_double_quant")),
        spare=told.get("llm_int8_skip_modules"),
    )


def settle_quantised_(model: nn.Module) -> None:
    """Let 4-bit layers that compute in float32 by default do so in their input's dtype, as ``nn.Linear`` does, and keep
    their codes in evaluation; let 8-bit ones not warn at every product."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if is_quantised(module):
            keep_unpacked_(module)
            if getattr(module, "compute_dtype", None) is torch.float32:
                module.compute_dtype, module.compute_type_is_set = None, True  # type: ignore[assignment]


def is_quantised_model(model: nn.Module) -> bool:
    """Whether some layer of the model is quantised."""
    return any(map(is_quantised, model.modules()))
