"""A conversation with a model, through the chat template of its tokenizer.

What has been said is written by the template anew for every answer; where it outgrows the model's context, the oldest
question and answer are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from lowrank.data.text.pretrained_tokenizer import PretrainedTokenizer
from lowrank.evaluate.generate import check_sampling, context_of, continuation, ends_of, open_model


def chat(
    source: str,
    questions: Iterable[str],
    *,
    system: str | None = None,
    tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = 200,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    base: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[str]:
    """The model's answer to each question, given what has been said before.

    Args:
        source: a run's folder or one of its checkpoints, or a model's folder or name on the hub, or an adapter's
            folder.
        questions: what the user says, one after the other; an empty one is passed over.
        system: what the model is told first.
        tokens: how many an answer has at most.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: sample among so many likeliest tokens; None among all.
        seed: of the sampling.
        device: auto, cpu or cuda.
        base: of an adapter's folder, where its base is; by default where the adapter says.
        note: is told what a reader should know beside the answers.

    Raises:
        ValueError: an argument out of its range, a tokenizer without a chat template, or a run that is not on text.
        FloatingPointError: the model's logits are not finite.
    """
    check_sampling(tokens, temperature, top_k)
    model, tokenizer = open_model(source, device, base=base)
    if not isinstance(tokenizer, PretrainedTokenizer) or tokenizer.template is None:
        raise ValueError(
            f"{source} has no chat template: it was not trained on turns; use lowrank generate, or give one when "
            "training, --data.chat_template plain, chatml or FILE"
        )
    told = [] if system is None else [{"role": "system", "content": system}]
    ends = [*dict.fromkeys([*tokenizer.ends_of_turn, *ends_of(model, tokenizer)])]
    said: list[dict[str, str]] = []
    for number, question in enumerate(text for text in questions if text.strip()):
        said.append({"role": "user", "content": question})
        ids, dropped = _within(tokenizer, told, said, context_of(model) - 1)
        if dropped:
            note(f"the model's context is full: {dropped} of the oldest turns are left out")
        room = max(1, min(tokens, context_of(model) - len(ids)))
        how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "seed": seed + number, "ends": ends}
        answer = tokenizer.decode(continuation(model, ids, room, **how)).strip()
        said.append({"role": "assistant", "content": answer})
        yield answer


def _within(
    tokenizer: PretrainedTokenizer, told: list[dict[str, str]], said: list[dict[str, str]], most: int
) -> tuple[list[int], int]:
    """(ids of the conversation, how many turns were dropped from ``said`` so that they are at most ``most``)."""
    dropped = 0
    while True:
        ids = tokenizer.ids([tokenizer.chat([*told, *said], answer=True)], special=False)[0]
        if len(ids) <= most:
            return ids, dropped
        if len(said) == 1:
            raise ValueError(
                f"the question has {len(ids):,} tokens with its template, and the model's context {most:,}"
            )
        del said[:2]
        dropped += 2
