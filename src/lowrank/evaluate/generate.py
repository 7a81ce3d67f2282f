"""Text from a trained model: one token at a time, from the merged weights.

Up to the model's context the keys and values of earlier tokens are kept; beyond it the window slides and is computed
anew each time, since the positions of all its tokens change.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.data.text.tokenizers import Tokenizer, pretrained_tokenizer
from lowrank.models.text import load_pretrained
from lowrank.run.session import pick_device, restore


def generate(
    source: str,
    prompt: str = "\n",
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 200,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """``prompt`` and the model's continuation of it.

    Args:
        source: a run's folder or one of its checkpoints, or a model's folder or name on the hub.
        prompt: where to begin.
        tokens: how many to add.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: sample among so many likeliest tokens; None among all.
        seed: of the sampling.
        device: auto, cpu or cuda.
    """
    _check(prompt, tokens, temperature, top_k)
    model, tokenizer = _open(source, device)
    ids = torch.tensor([tokenizer.encode(prompt)], device=next(model.parameters()).device)
    chosen = list(continuation(model, ids, tokens, temperature=temperature, top_k=top_k, seed=seed))
    return prompt + tokenizer.decode(chosen)


@torch.no_grad()
def continuation(
    model: nn.Module, ids: Tensor, tokens: int, *, temperature: float = 0.8, top_k: int | None = 200, seed: int = 0
) -> Iterator[int]:
    """The next ``tokens`` ids after ``ids`` (1, length), each drawn from the model's distribution."""
    noise = torch.Generator(device=ids.device).manual_seed(seed)
    config: Any = model.config
    context = getattr(config, "max_position_embeddings", None) or config.n_positions
    model.eval()
    past: Any = None
    for _ in range(tokens):
        if ids.shape[1] <= context:
            out = model(input_ids=ids if past is None else ids[:, -1:], past_key_values=past, use_cache=True)
            past = out.past_key_values
        else:
            out = model(input_ids=ids[:, -context:], use_cache=False)
        chosen = _choose(out.logits[:, -1].float(), temperature, top_k, noise)
        ids = torch.cat([ids, chosen], dim=1)
        yield int(chosen)


def _choose(logits: Tensor, temperature: float, top_k: int | None, noise: torch.Generator) -> Tensor:
    """One id (1, 1) from logits (1, vocabulary)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=noise)


def _open(source: str, device: str) -> tuple[nn.Module, Tokenizer]:
    """The model and tokenizer of a run, or of a pre-trained model that was never trained here."""
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        session, _ = restore(folder, device=device)
        if session.run.task != "text":
            raise ValueError(f"{source} is a run on {session.run.task}: only language models generate text")
        return session.model, session.data.tokenizer
    return load_pretrained(source).to(pick_device(device)), pretrained_tokenizer(source)


def _check(prompt: str, tokens: int, temperature: float, top_k: int | None) -> None:
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character, such as a new line")
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or none")
