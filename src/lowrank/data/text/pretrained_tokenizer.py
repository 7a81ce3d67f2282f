"""A pre-trained model's own tokenizer, with everything that it came with: special tokens, chat template, its ways.

Unlike the tokenizers of corpora (``tokenizers``), it puts the beginning of a text where its model expects one, and a
special token that is spelt out in a text is that token. As the tokenizer of a corpus (``encode_batch``) it is like
them: nothing is added and nothing recognised.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lowrank.data.text.tokenizers import SAVED, Slow, check_tokenizer_spec, tokenizer_files
from lowrank.infra.extras import import_extra
from lowrank.infra.hub import located

# Turns in plain words, for models that have never seen a chat: nothing but the end of a text is a special token.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] | trim }}"
    "{{ eos_token + '\\n\\n' if message['role'] == 'assistant' else '\\n\\n' }}{% endfor %}"
    "{{ '### Assistant:\\n' if add_generation_prompt else '' }}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"
)
TEMPLATES = {"plain": PLAIN_TEMPLATE, "chatml": CHATML_TEMPLATE}


class PretrainedTokenizer(Slow):
    """A tokenizer of transformers as it is; ``backend`` is it."""

    kind = "pretrained"
    subfolder = ""

    def __init__(self, backend: Any, spec: str):
        super().__init__(backend, spec)
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1

    @classmethod
    def from_folder(cls, folder: Path, saved: Mapping[str, Any]) -> PretrainedTokenizer:
        return cls(_load(str(folder)), saved["spec"])

    @cached_property
    def digest(self) -> str:
        found = hashlib.blake2b(digest_size=8)
        fast = getattr(self.backend, "backend_tokenizer", None)
        model = fast.to_str() if fast is not None else json.dumps(self.backend.get_vocab(), sort_keys=True)
        special = sorted((name, str(token)) for name, token in self.backend.special_tokens_map.items())
        found.update(json.dumps([_without_runtime(model), special, self.template], sort_keys=True).encode())
        return found.hexdigest()

    @property
    def fingerprint(self) -> str:
        return self.digest

    @property
    def template(self) -> str | None:
        """The chat template; None where it has none."""
        found = self.backend.chat_template
        return found.get("default") if isinstance(found, dict) else found

    def ids(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Texts as the model has been trained on them; ``special``: with what the tokenizer itself puts round them."""
        return self.backend(list(texts), add_special_tokens=special, verbose=False)["input_ids"] if texts else []

    def prompt(self, text: str) -> list[int]:
        """A text to go on from: its beginning is marked as usual, and no end."""
        ids = self.ids([text])[0]
        return ids[:-1] if self.ends_by_itself and ids[-1:] == [self.backend.eos_token_id] else ids

    @cached_property
    def ends_by_itself(self) -> bool:
        """Whether the tokenizer itself puts the end after a text, as T5's does."""
        return self.backend.eos_token_id is not None and self.ids(["a"])[0][-1:] == [self.backend.eos_token_id]

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = False) -> str:
        """Turns as the chat template writes them; ``answer``: up to where the assistant begins.

        Raises:
            ValueError: there is no template, or it refuses these turns.
        """
        if self.template is None:
            raise ValueError(
                f"the tokenizer {self.spec!r} has no chat template: say how turns are written by --data.chat_template, "
                f"a Jinja file or one of {', '.join(TEMPLATES)}"
            )
        jinja = import_extra("jinja2", "text")
        try:
            return self.backend.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        except (jinja.exceptions.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template of {self.spec!r} refuses these turns: {error}") from error

    @cached_property
    def ends_of_turn(self) -> list[int]:
        """Ids that end an answer: the end of a text, and the special token that the template puts after what the
        assistant says."""
        ends = [] if self.end_of_document is None else [self.end_of_document]
        if self.template is None:
            return ends
        written = self.chat([{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}])
        after = self.ids([written.rpartition("answer")[2].lstrip()], special=False)[0]
        return list(dict.fromkeys([*ends, *(id for id in after[:1] if id in self.special_ids)]))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text."""
        added = {id for id, token in self.backend.added_tokens_decoder.items() if token.special}
        return frozenset({*added, *self.backend.all_special_ids})


def model_tokenizer(spec: str, chat_template: str | None = None) -> PretrainedTokenizer:
    """The tokenizer of a model in a folder or by name, whole.

    Args:
        spec: the model's folder or name, or a folder with a tokenizer alone.
        chat_template: ``plain``, ``chatml``, or a Jinja file, in the place of its own.

    Raises:
        ValueError, OSError: there is none that transformers could load.
    """
    if not spec:
        raise ValueError("which tokenizer? --model.path MODEL brings its own, or say --data.tokenizer FOLDER|NAME")
    check_tokenizer_spec(spec)
    if spec in ("bytes", "chars") or spec.startswith("bpe:"):
        raise ValueError(f"tokenizer {spec!r}: a pre-trained model is fine-tuned with its own; leave it out")
    tokenizer = PretrainedTokenizer(_load(spec), spec)
    if chat_template is not None:
        tokenizer.backend.chat_template = _template(chat_template)
    return tokenizer


def _load(spec: str) -> Any:
    loader = import_extra("transformers", "text").AutoTokenizer
    path = Path(spec).expanduser()
    if path.is_dir() and not tokenizer_files(path):  # of which transformers would make an empty one
        raise FileNotFoundError(f"{spec} holds no tokenizer: say which by --data.tokenizer FOLDER|NAME")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loader.from_pretrained(str(located(spec)), trust_remote_code=False)
    except Exception as error:  # of many kinds
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = f"; {SAVED} says that it is one of ours" if (path / SAVED).is_file() else ""
        raise ValueError(
            f"{spec} has no tokenizer that transformers could load ({said}){hint}: say which by --data.tokenizer "
            "FOLDER|NAME"
        ) from error


def _template(told: str) -> str:
    if told in TEMPLATES:
        return TEMPLATES[told]
    file = Path(told).expanduser()
    if not file.is_file():
        near = difflib.get_close_matches(told, TEMPLATES, n=1)
        raise FileNotFoundError(
            f"chat_template={told!r} is no file{f' (did you mean {near[0]!r}?)' if near else ''}: give a file with a "
            f"Jinja template, or one of {', '.join(TEMPLATES)}"
        )
    return file.read_text(encoding="utf-8")


def _without_runtime(text: str) -> str:
    """A fast tokenizer's JSON without what calls change: truncation and padding."""
    if not text.startswith("{"):
        return text
    content = json.loads(text)
    return json.dumps({name: value for name, value in content.items() if name not in ("truncation", "padding")})
