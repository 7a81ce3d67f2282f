"""Language models, through transformers: GPT-2 shapes from scratch, and any causal model from a folder or the hub.

Functions here are what a run's model can be; their keyword arguments are the run's ``--model.…`` options. The first
argument is the data, which gives the vocabulary and the context where they are left open.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank.data.text.corpora import Corpus
from lowrank.data.text.fits_model import positions_of
from lowrank.infra.checks import check_choice
from lowrank.infra.hub import located
from lowrank.infra.loaded_parameters import mark_all_but_, mark_loaded_
from lowrank.infra.registry import register
from lowrank.linalg.quantised_linear import Quantised
from lowrank.models.nanogpt import is_nanogpt, read_nanogpt
from lowrank.models.quantised import quantisation_config, quantise_, settle_quantised_

# Above so many logits at once the loss is computed in chunks, each of which is recomputed in the backward pass.
CHUNK_ABOVE = 1 << 26
CHUNKED_MODELS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")  # whose logits are lm_head(hidden) and nothing more


@register("model", task="text")
def gpt2(
    data: Corpus,
    *,
    n_layer: int = 12,
    n_head: int = 12,
    n_embd: int = 768,
    vocab_size: int | Literal["auto"] = "auto",
    context: int | Literal["auto"] = "auto",
    dropout: float = 0.0,
) -> nn.Module:
    """A GPT-2 of this shape with random weights (Radford et al., 2019); the defaults are the 124M model's.

    Args:
        n_layer, n_head, n_embd: blocks, attention heads, width.
        vocab_size: ``auto`` takes the tokens'.
        context: positions; ``auto`` takes the data's.
        dropout: of embeddings, attention and residuals; 0 is right for training from scratch.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    if n_embd % n_head:
        raise ValueError(f"model.n_embd={n_embd} must be a multiple of model.n_head={n_head}")
    positions = data.context if context == "auto" else context
    if data.context > positions:
        raise ValueError(f"data.context={data.context} is beyond the model's context={positions}")
    vocabulary = data.vocab_size if vocab_size == "auto" else vocab_size
    data.check_vocabulary(vocabulary)
    end = data.end_of_document
    config = GPT2Config(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        vocab_size=vocabulary,
        n_positions=positions,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config)


# GaLore's shapes (arXiv 2403.03507): hidden, feed-forward, heads, layers. Untied, 32,000 tokens, RMSNorm eps 1e-6.
LLAMA_SHAPES = {
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "35m": (384, 1024, 8, 6),
    "40m": (416, 1024, 8, 8),
    "60m": (512, 1376, 8, 8),
    "71m": (512, 1368, 8, 12),
    "100m": (640, 1708, 10, 12),
    "130m": (768, 2048, 12, 12),
    "250m": (768, 2560, 16, 24),
    "350m": (1024, 2736, 16, 24),
    "1b": (2048, 5461, 32, 24),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
}
LlamaSize = Literal["9m", "20m", "35m", "40m", "60m", "71m", "100m", "130m", "250m", "350m", "1b", "3b", "7b"]


@register("model", task="text", given_by={"size": ("hidden", "feed_forward", "n_head", "n_layer")})
def llama(
    data: Corpus,
    *,
    size: LlamaSize | None = None,
    hidden: int = 128,
    feed_forward: int = 352,
    n_head: int = 4,
    n_layer: int = 4,
    vocab_size: int | Literal["auto"] = "auto",
    context: int | Literal["auto"] = "auto",
    quantise: Quantised | None = None,
) -> nn.Module:
    """A LLaMA with random weights (Touvron et al., arXiv 2302.13971), of one of GaLore's sizes or your own shape.

    Args:
        size: ``9m`` to ``7b``; gives the next four where it is set.
        hidden, feed_forward, n_head, n_layer: the shape.
        vocab_size: ``auto`` takes the tokens'; the papers' configurations say 32,000.
        context: positions; ``auto`` takes the data's.
        quantise: its linear layers to 4 bits (``nf4``) or 8 (``int8``), which then stay as they are.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if size is not None:
        hidden, feed_forward, n_head, n_layer = LLAMA_SHAPES[size]
    if hidden % n_head:
        raise ValueError(f"model.hidden={hidden} must be a multiple of model.n_head={n_head}")
    positions = data.context if context == "auto" else context
    if data.context > positions:
        raise ValueError(f"data.context={data.context} is beyond the model's context={positions}")
    vocabulary = data.vocab_size if vocab_size == "auto" else vocab_size
    data.check_vocabulary(vocabulary)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_attention_heads=n_head,
        num_hidden_layers=n_layer,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=data.end_of_document,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    if quantise is not None:
        mark_loaded_(quantise_(model, quantise))  # it is a base for adapters: what is not quantised stays as well
    return model


@register("model", task="text", tokenizer="path")
def pretrained(
    data: Corpus, *, path: str = "gpt2", dtype: str = "float32", quantise: Quantised | None = None
) -> nn.Module:
    """Any causal language model of transformers, from a local folder or by its name on the hub, with its tokenizer.

    Args:
        path: the folder, or the name; or a ckpt.pt of nanoGPT.
        dtype: of the weights: float32 unless told; ``auto`` is the one that they are saved in.
        quantise: the linear layers, while loading, to 4 bits (``nf4``) or 8 (``int8``), which then stay as they are.
    """
    return _checked(load_pretrained(path, dtype=dtype, quantise=quantise), data, path)


def load_pretrained(path: str, *, dtype: str = "float32", quantise: Quantised | None = None) -> nn.Module:
    """A causal language model from a folder or the hub, its loaded parameters known as such (``rest="auto"``)."""
    if not path:
        raise ValueError("which model? give --model.path FOLDER|NAME, a causal language model of transformers")
    import transformers

    if is_nanogpt(path):
        wanted = weights_dtype(dtype)
        model: Any = read_nanogpt(path) if wanted == "auto" else read_nanogpt(path).to(wanted)
        return model if quantise is None else quantise_(model, quantise)
    if _looks_local(path) and not Path(path).expanduser().is_dir():
        raise FileNotFoundError(
            f"model.path={path!r} is no folder; give a folder with config.json, nanoGPT's ckpt.pt, or a name on the hub"
        )
    place = located(path)
    auto: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": weights_dtype(dtype), "output_loading_info": True, "trust_remote_code": False}
    logging.getLogger("transformers.modeling_utils").addFilter(_is_needed)
    if quantise is not None:
        options["quantization_config"] = quantisation_config(place, quantise)
    try:
        with without_bars():
            model, info = auto.from_pretrained(place, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path} needs Python code that it brings itself, which is not executed here: take a model of an "
            "architecture that transformers has"
        ) from error
    settle_quantised_(model)
    return mark_all_but_(model, *info["missing_keys"])


def _is_needed(record: logging.LogRecord) -> bool:
    """transformers advises a mask where rows end in padding; causal models need none, and padding does not count."""
    return "passing in an `attention_mask`" not in record.getMessage()


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers draws no progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The sum of the cross-entropy, in nats, over the labels that count.

    ``batch``: input_ids, labels (batch, context) int64, the labels shifted already, −100 not counted; perhaps
    position_ids of the same shape, which begin anew with every text of a row. The sum is
    float32 whatever the model's dtype. Where the logits would outweigh everything else, they are made in chunks and
    made again in the backward pass.
    """
    labels = batch["labels"]
    inputs: dict[str, Tensor] = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", 0)
    if labels.numel() * vocabulary <= CHUNK_ABOVE or getattr(config, "model_type", "") not in CHUNKED_MODELS:
        return _cross_entropy(model(**inputs, use_cache=False).logits, labels)
    within: Any = getattr(model, "within_forward", None)  # a sharded model (``sharding``) must be told
    args = (inputs, labels, vocabulary)
    return _chunked_loss(model, *args) if within is None else within(_chunked_loss, *args)


def _chunked_loss(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, vocabulary: int) -> Tensor:
    """The same loss from the model's pieces, without a call of the model itself."""
    body = _body(model)
    hidden = body(**inputs, use_cache=False).last_hidden_state
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    width = max(1, CHUNK_ABOVE // (labels.shape[0] * vocabulary))
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(hidden.split(width, dim=1), labels.split(width, dim=1), strict=True):
        total = total + checkpoint(lambda h, y: _cross_entropy(head(h), y), part, wanted, use_reentrant=False)
    return total


def _body(model: nn.Module) -> Any:
    """The model without its output layer; of a compiled model, whose attributes are those of the plain one, compiled as
    well, once."""
    body = getattr(model, str(model.base_model_prefix))
    if not hasattr(model, "_orig_mod"):
        return body
    if "compiled_body" not in vars(model):
        vars(model)["compiled_body"] = torch.compile(body)
    return vars(model)["compiled_body"]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def _checked(model: nn.Module, data: Corpus, path: str) -> nn.Module:
    config: Any = model.config
    data.check_vocabulary(config.vocab_size)
    positions = positions_of(model)
    if positions and (data.context or 0) > positions:
        raise ValueError(f"data.context={data.context} is beyond the {positions} positions of {path}")
    return model


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or Path(path).exists()


def weights_dtype(name: str) -> torch.dtype | Literal["auto"]:
    known: dict[str, torch.dtype | Literal["auto"]] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    known |= {"float16": torch.float16, "auto": "auto"}
    check_choice("model.dtype", name, known)
    return known[name]
