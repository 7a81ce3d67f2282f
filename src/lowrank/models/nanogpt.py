"""nanoGPT's checkpoints (github.com/karpathy/nanoGPT), read into transformers' GPT-2 and written from it.

    ckpt.pt   model        transformer.h.0.attn.c_attn.weight (3·n_embd, n_embd), … as nn.Linear stores them
              model_args   n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout
              iter_num, best_val_loss, and what training keeps beside

The two differ in that GPT-2's ``Conv1D`` stores its matrices transposed, in the biases, which nanoGPT may do without
(here they are zero then), and in the activation: nanoGPT's GELU is exact, GPT-2's is its approximation by tanh.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.infra.loaded_parameters import mark_loaded_

ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, kept as buffers by older versions


def is_nanogpt(path: str) -> bool:
    """Whether a path is a file that may be such a checkpoint."""
    file = Path(path).expanduser()
    return file.suffix in (".pt", ".pth") and file.is_file()


def read_nanogpt(path: str) -> nn.Module:
    """The model of a checkpoint, its parameters known as loaded.

    Raises:
        ValueError: it is none, cannot be read without running code, or has other weights than it says.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    file = Path(path).expanduser()
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        raise ValueError(
            f"{file} cannot be read safely: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    told = found.get("model_args") if isinstance(found, Mapping) else None
    missing = [name for name in ARGUMENTS if not isinstance(told, Mapping) or name not in told]
    if missing or not isinstance(told, Mapping) or not isinstance(found.get("model"), Mapping):
        raise ValueError(f"{file} is no checkpoint of nanoGPT: its model_args have no {', '.join(missing) or 'model'}")
    sizes = {name: int(told[name]) for name in ARGUMENTS}
    config = GPT2Config(
        n_positions=sizes.pop("block_size"),
        **sizes,  # type: ignore[arg-type]
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=50256 if sizes["vocab_size"] > 50256 else None,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    state = {name.removeprefix("_orig_mod."): t for name, t in found["model"].items()}
    state = {name: _turned(name, t) for name, t in state.items() if not name.endswith(_MASKS)}
    ours = model.state_dict()
    state |= {n: torch.zeros_like(t) for n, t in ours.items() if n.endswith(".bias") and n not in state}
    wrong = [n for n in ours if n not in state or state[n].shape != ours[n].shape] + [n for n in state if n not in ours]
    if wrong:
        raise ValueError(f"{file}: the weights do not fit its model_args at {', '.join(wrong[:5])}")
    model.load_state_dict(state)
    mark_loaded_(model)
    return model


def write_nanogpt(model: nn.Module, file: Path, *, step: int = 0) -> str:
    """Write a plain GPT-2 as nanoGPT's checkpoint; returns what the reader should know, or nothing.

    Raises:
        ValueError: the model is no GPT-2 of nanoGPT's form.
    """
    config = check_nanogpt(model)
    content = {
        "model": {name: _turned(name, t).detach().cpu().contiguous() for name, t in model.state_dict().items()},
        "model_args": {
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "block_size": config.n_positions,
            "bias": True,
            "vocab_size": config.vocab_size,
            "dropout": config.resid_pdrop,
        },
        "iter_num": step,
        "best_val_loss": float("inf"),
        "config": {},
    }
    torch.save(content, file)
    if config.activation_function == "gelu":
        return ""
    return f"nanoGPT's GELU is exact and this model's is {config.activation_function}: outputs differ by about 1e-3"


def check_nanogpt(model: nn.Module) -> Any:
    """The configuration of a model that nanoGPT could have.

    Raises:
        ValueError: it is no GPT-2, or of another form.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind != "gpt2" or config.n_inner not in (None, 4 * config.n_embd) or not config.tie_word_embeddings:
        raise ValueError(f"nanoGPT's checkpoint holds a GPT-2 with tied embeddings; this model is {kind}")
    return config


def _turned(name: str, t: Tensor) -> Tensor:
    return t.mT if name.endswith(_TRANSPOSED) else t
