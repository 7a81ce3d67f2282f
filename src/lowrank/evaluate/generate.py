"""Text from a trained model, from the merged weights, by transformers' own ``generate``.

A prompt is taken as it is, begun as the model's own tokenizer begins a text; what ends a text ends it. Where the text
outgrows the model's context, it goes on from the last half of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank.data.text.fits_model import positions_of
from lowrank.data.text.pretrained_tokenizer import model_tokenizer
from lowrank.data.text.tokenizers import Bytes, Tokenizer, saved_tokenizer
from lowrank.interop.adapter_start import base_of, base_options, is_adapter, use_adapter_
from lowrank.models.nanogpt import is_nanogpt
from lowrank.models.text import load_pretrained
from lowrank.run.session import is_run, pick_device, restore


def generate(
    source: str,
    prompt: str = "\n",
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 200,
    seed: int = 0,
    tokenizer: str | None = None,
    base: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> str:
    """``prompt`` and the model's continuation of it.

    Args:
        source: a run's folder or one of its checkpoints, a model's folder or name on the hub, or an adapter's folder.
        prompt: where to begin.
        tokens: how many to add at most; the end of a text ends it.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: sample among so many likeliest tokens; None among all.
        seed: of the sampling.
        tokenizer: a pre-trained model's, where it is not its own.
        base: of an adapter's folder: where its base is; by default where the adapter says.
        device: auto, cpu or cuda.

    Raises:
        ValueError: an argument out of its range, or a run that is not on text.
        FloatingPointError: the model's logits are not finite.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character, such as a new line")
    if not prompt.isascii() and prompt != prompt.encode("utf-8", "replace").decode():
        raise ValueError(f"the prompt {prompt[:40]!r} is not UTF-8: give it in your terminal's encoding")
    check_sampling(tokens, temperature, top_k, seed)
    model, own = open_model(source, device, tokenizer=tokenizer, base=base)
    ids = own.prompt(prompt)
    how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "seed": seed, "ends": ends_of(model, own)}
    made = continuation(model, ids, tokens, **how)
    before, whole = own.decode(ids), own.decode([*ids, *made])  # some drop the space that they begin with
    return prompt + (whole[len(before) :] if whole.startswith(before) else own.decode(made))


def context_of(model: Any) -> int:
    """How many tokens the model can see; no bound where it names none."""
    return positions_of(model) or sys.maxsize


def continuation(
    model: Any,
    ids: list[int],
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 200,
    seed: int = 0,
    ends: Sequence[int] = (),
) -> list[int]:
    """At most ``tokens`` ids after ``ids``, by the model's own ``generate``; fewer where one of ``ends`` is drawn.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    from transformers import GenerationConfig

    context = context_of(model)
    sampling = {"temperature": temperature, "top_k": top_k or 0} if temperature else {}
    model.generation_config = GenerationConfig(
        do_sample=temperature > 0, eos_token_id=list(ends) or None, pad_token_id=ends[0] if ends else 0, **sampling
    )  # in the place of what the model's authors chose: top_p, penalties, lengths
    made: list[int] = []
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while len(made) < tokens and not (made and made[-1] in ends):
            seen = [*ids, *made]
            if len(seen) >= context:
                seen = seen[-max(1, context // 2) :]
            given = torch.tensor([seen], device=device)
            room = min(tokens - len(made), context - len(seen))
            more = {"attention_mask": torch.ones_like(given), "logits_processor": [_refuse_not_finite]}
            made += model.eval().generate(given, max_new_tokens=room, **more)[0, len(seen) :].tolist()
    return made[:-1] if made and made[-1] in ends else made


def _refuse_not_finite(ids: Tensor, logits: Tensor) -> Tensor:
    if (logits.isnan() | logits.isposinf()).any():
        raise FloatingPointError("the model's logits are not finite: its weights have diverged, or were damaged")
    return logits


def ends_of(model: Any, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text: the tokenizer's, and what the model's authors say ends an answer."""
    theirs = model.generation_config.eos_token_id
    theirs = theirs if isinstance(theirs, list) else [theirs]
    if tokenizer.special_ids is not None:  # a configuration's default may be any word
        theirs = [id for id in theirs if id in tokenizer.special_ids]
    return [id for id in dict.fromkeys([tokenizer.end_of_document, *theirs]) if id is not None]


def open_model(
    source: str, device: str, *, tokenizer: str | None = None, base: str | None = None
) -> tuple[Any, Tokenizer]:
    """The model and tokenizer of a run, of a pre-trained model that was never trained here, or of an adapter."""
    folder = Path(source).expanduser()
    if is_adapter(folder):
        place = base_of(folder, base)
        model = use_adapter_(load_pretrained(place, **base_options(folder)), folder).to(pick_device(device))
        own = source if (folder / "tokenizer_config.json").is_file() else place
        return model, _whole_tokenizer(tokenizer or own)
    if base is not None:
        raise ValueError(f"--base goes with the folder of an adapter, which {source} is not")
    if is_run(folder):
        if tokenizer is not None:
            raise ValueError(f"{source} was trained with a tokenizer of its own: leave --tokenizer out")
        session, _ = restore(folder, device=device)
        if not getattr(session.model, "can_generate", bool)():
            raise ValueError(f"{source} is a run on {session.run.task}: only language models generate text")
        if not hasattr(session.data, "tokenizer"):
            raise ValueError(f"{source} was trained on ids without a tokenizer: there is no text to read or write")
        return session.model, session.data.tokenizer
    if is_nanogpt(source) and tokenizer is None:
        raise ValueError(f"{source} brings no tokenizer: give --tokenizer gpt2, or a folder with its own")
    return load_pretrained(source).to(pick_device(device)), _whole_tokenizer(tokenizer or source)


def _whole_tokenizer(spec: str) -> Tokenizer:
    """One of ours, or a pre-trained model's with all that it came with."""
    if spec == "bytes":
        return Bytes()
    return saved_tokenizer(spec) or model_tokenizer(spec)


def check_sampling(tokens: int, temperature: float, top_k: int | None, seed: int = 0) -> None:
    """Raise ValueError for a number out of its range."""
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1")
    if tokens > 2**31 - 1:
        raise ValueError(f"tokens={tokens}: at most {2**31 - 1} can be meant")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be at least 0 and below 2^63")
    if temperature < 0 or 0 < temperature < 1e-6:
        raise ValueError(f"temperature={temperature} must be 0, which takes the likeliest token, or at least 1e-6")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or none")
