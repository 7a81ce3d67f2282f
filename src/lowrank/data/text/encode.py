"""Examples as ids, and which of them are answers.

========  ==================================================================================================
``Pair``  prompt and completion as one text, verbatim, then the end of a text; the answer begins where the ids
          of prompt and text part from those of the prompt alone, as in TRL's ``SFTTrainer``
``Chat``  as the chat template writes it; answers are what it marks by ``{% generation %}``, or else what comes
          between the text up to "now the assistant speaks" and the text up to the end of that turn; of turns given
          as prompt and completion, all that follows the prompt
``Plain``  the text, then its end; all of it counts
========  ==================================================================================================

A template may write a turn otherwise once it is no longer the last (Qwen3's leaves out what was thought): then a
conversation becomes one example for each answer, each as the model will see it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np

from lowrank.data.text.examples import Chat, Example, Pair, Plain
from lowrank.data.text.packing import Encoded
from lowrank.data.text.pretrained_tokenizer import PretrainedTokenizer

Loss = Literal["completion", "all"]
BATCH = 512  # examples tokenised in one go
TAIL = 40  # characters at a turn's end by which it is looked for in what a template has written


class Encoder:
    """Examples to ids under a tokenizer; ``loss``: on the answers alone, or on everything.

    ``split_chats`` counts the conversations that became several examples.
    """

    def __init__(self, tokenizer: PretrainedTokenizer, loss: Loss):
        self.tokenizer, self.loss = tokenizer, loss
        self.split_chats = 0
        self._marked = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.template or "") is not None

    def encode(self, examples: Iterable[tuple[str, Example]]) -> Iterator[Encoded]:
        """(where, example) one after the other; where it stands is for messages.

        Raises:
            ValueError: a template that refuses turns or leaves some out, a tokenizer without an end of a text.
        """
        rest = iter(examples)
        while group := list(islice(rest, BATCH)):
            texts = [each for _, each in group if not isinstance(each, Chat)]
            encoded = iter(self._texts(texts))
            for where, example in group:
                if isinstance(example, Chat):
                    yield from self._chat(example, where)
                else:
                    yield next(encoded)

    def _texts(self, examples: Sequence[Pair | Plain]) -> Iterator[Encoded]:
        whole = [self._ended(e.prompt + e.completion if isinstance(e, Pair) else e.text) for e in examples]
        prompts = [e.prompt for e in examples if isinstance(e, Pair)]
        before = iter(self.tokenizer.ids(prompts))
        for example, ids in zip(examples, self.tokenizer.ids(whole), strict=True):
            start = common(next(before), ids) if isinstance(example, Pair) else 0
            yield self._encoded(ids, [(start, len(ids))])

    def _ended(self, text: str) -> str:
        end = self.tokenizer.backend.eos_token
        if end is None:
            raise ValueError(
                f"the tokenizer {self.tokenizer.spec!r} has no end of a text (eos_token): nothing could end an answer"
            )
        return text if self.tokenizer.ends_by_itself or text.endswith(end) else text + end

    def _chat(self, chat: Chat, where: str) -> Iterator[Encoded]:
        try:
            whole = self.tokenizer.chat(chat.messages)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        self._check_whole(chat.messages, whole, where)
        if self.loss == "all":
            yield self._encoded(self.tokenizer.ids([whole], special=False)[0], [])
            return
        if chat.first:
            ids, prompt = self.tokenizer.ids([whole, self._before(chat, chat.first)], special=False)
            yield self._encoded(ids, [(common(prompt, ids), len(ids))])
            return
        if self._marked:
            yield self._by_marks(chat)
            return
        turns = [n for n, each in enumerate(chat.messages) if each["role"] == "assistant"]
        pairs = [(self._before(chat, n), self.tokenizer.chat(chat.messages[: n + 1])) for n in turns]
        if all(whole.startswith(before) and whole.startswith(after) for before, after in pairs):
            flat = [whole, *(text for pair in pairs for text in pair)]
            ids, *parts = self.tokenizer.ids(flat, special=False)
            ends = [common(part, ids) for part in parts]
            yield self._encoded(ids, list(zip(ends[::2], ends[1::2], strict=True)))
            return
        self.split_chats += 1
        for before, after in pairs:
            prompt, ids = self.tokenizer.ids([before, after], special=False)
            yield self._encoded(ids, [(common(prompt, ids), len(ids))])

    def _before(self, chat: Chat, turn: int) -> str:
        return self.tokenizer.chat(chat.messages[:turn], answer=True) if turn else ""

    def _by_marks(self, chat: Chat) -> Encoded:
        """What a template that says so itself marks as the assistant's."""
        found = self.tokenizer.backend.apply_chat_template(
            list(chat.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, count = np.asarray(found["input_ids"], np.int32), np.asarray(found["assistant_masks"], bool)
        return Encoded(ids=ids, count=count)

    def _encoded(self, ids: Sequence[int], answers: Sequence[tuple[int, int]]) -> Encoded:
        count = np.full(len(ids), self.loss == "all")
        for start, end in answers:
            count[start:end] = True
        return Encoded(ids=np.asarray(ids, np.int32), count=count)

    def _check_whole(self, messages: Sequence[Mapping[str, Any]], whole: str, where: str) -> None:
        for number, message in enumerate(messages, 1):
            tail = message["content"].strip()[-TAIL:]
            if tail not in whole:
                raise ValueError(
                    f"{where}: the chat template of {self.tokenizer.spec!r} leaves out turn {number} "
                    f"({message['role']}: …{tail!r}): give a template that writes every turn by --data.chat_template "
                    "FILE, or leave such turns out of the data"
                )


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two texts begin with alike."""
    same = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return min(len(first), len(second)) if same is None else same
