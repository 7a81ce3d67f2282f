"""LLaMA at GaLore's shapes with random weights, made on the device; text as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.models.text import LLAMA_SHAPES, next_token_loss

VOCABULARY, CONTEXT = 32_000, 256
TINY = (32, 48, 2, 2)  # hidden, feed-forward, heads, layers


def shape_of(size: str) -> tuple[int, int, int, int]:
    return TINY if size == "tiny" else LLAMA_SHAPES[size]


def llama(
    size: str, device: torch.device, dtype: torch.dtype = torch.float32, *, vocabulary: int = VOCABULARY
) -> nn.Module:
    """A LLaMA of this size ("tiny", or one of ``LLAMA_SHAPES``), its weights drawn on the device in ``dtype``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, feed_forward, heads, layers = shape_of(size)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        vocab_size=min(vocabulary, 256) if size == "tiny" else vocabulary,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device(device), default_dtype(dtype):
        return LlamaForCausalLM(config)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def batch(model: nn.Module, rows: int, length: int = CONTEXT) -> dict[str, Tensor]:
    """Random tokens, as next_token_loss takes them."""
    config: Any = model.config
    device = next(model.parameters()).device
    ids = torch.randint(0, config.vocab_size, (rows, length + 1), device=device)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def mean_loss(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return next_token_loss(model, given) / given["labels"].numel()


def bytes_of(text: Path | None, limit: int = 32 << 20) -> Tensor:
    """A text's bytes as numbers; without a text, this checkout's own sources and pages, one after the other."""
    if text is not None:
        raw = text.read_bytes()[:limit]
    else:
        root = Path(__file__).resolve().parents[2]
        folders = [root / name for name in ("src", "docs", "benchmarks", "tests", "examples")]
        files = sorted(f for folder in folders for f in folder.rglob("*") if f.suffix in (".py", ".md", ".txt"))
        raw = b"\n".join(f.read_bytes() for f in [*sorted(root.glob("*.md")), *files])[:limit]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
