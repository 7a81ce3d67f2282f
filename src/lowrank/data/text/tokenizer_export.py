"""Tokenizers as transformers' ``AutoTokenizer`` opens them, for a model that goes elsewhere.

    bytes       a BPE without merges over the 256 bytes (GPT-2's letters for them), id = byte; 0xFF ends a document
    chars       one word a character; a character that the corpus did not have is an error, as here
    ours, BPE   as it is
    others      everything that they came with (chat template, added tokens, padding side), where that is still to be
                had and is the tokenizer that the model was trained with

``lowrank_tokenizer.json`` lies beside, by which this package opens the very same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank.data.text.tokenizers import END_OF_DOCUMENT, Bytes, Characters, Fast, Tokenizer
from lowrank.infra.extras import import_extra


def save_for_transformers(
    tokenizer: Tokenizer, folder: Path, *, origins: Sequence[str] = (), context: int | None = None
) -> None:
    """Write ``tokenizer`` into an existing folder.

    Args:
        tokenizer: of any kind.
        folder: where the model lies.
        origins: folders or names where the tokenizer may be whole: the base model's.
        context: positions of the model, for the tokenizer to warn of longer texts.
    """
    if isinstance(tokenizer, (Bytes, Characters)):
        backend = _bytes() if isinstance(tokenizer, Bytes) else _characters(tokenizer)
        wrapper = import_extra("transformers", "text").PreTrainedTokenizerFast
        end = {} if tokenizer.end_of_document is None else {"eos_token": END_OF_DOCUMENT}
        long = {} if context is None else {"model_max_length": context}
        made = wrapper(tokenizer_object=backend, clean_up_tokenization_spaces=False, **end, **long)
        made.save_pretrained(str(folder))
    elif isinstance(tokenizer, Fast) and (original := _original(tokenizer, origins)) is not None:
        original.save_pretrained(str(folder))
        Tokenizer.save(tokenizer, folder)
        return
    tokenizer.save(folder)


def _bytes() -> Any:
    """id = byte: byte-level BPE's pre-tokenizer writes each byte as one letter, and there is nothing to merge."""
    library = import_extra("tokenizers", "text")
    vocabulary = {letter: byte for byte, letter in enumerate(_letters())} | {END_OF_DOCUMENT: 0xFF}
    del vocabulary[_letters()[0xFF]]  # a byte that UTF-8 never has
    backend = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = library.decoders.ByteLevel()
    backend.add_special_tokens([END_OF_DOCUMENT])
    return backend


def _letters() -> list[str]:
    """The letter of each byte: printable ones of Latin-1 are themselves, the others follow from U+0100 on (GPT-2)."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


def _characters(tokenizer: Characters) -> Any:
    library = import_extra("tokenizers", "text")
    vocabulary = {character: id for id, character in enumerate(tokenizer.characters)}
    if tokenizer.end_of_document is not None:
        vocabulary[END_OF_DOCUMENT] = tokenizer.end_of_document
    # The unknown token is one that there is not, so that an unknown character is an error and no silent gap.
    backend = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    backend.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"[\s\S]"), "isolated")
    backend.decoder = library.decoders.Fuse()
    if tokenizer.end_of_document is not None:
        backend.add_special_tokens([END_OF_DOCUMENT])
    return backend


def _original(tokenizer: Fast, origins: Sequence[str]) -> Any:
    """The tokenizer of transformers that ``tokenizer`` was made of; None where it is not to be had, or is another."""
    loader = import_extra("transformers", "text").AutoTokenizer
    for place in dict.fromkeys([*origins, tokenizer.spec]):
        if not place or place.startswith("bpe:"):
            continue
        path = Path(place).expanduser()
        try:
            how = {"trust_remote_code": False, "local_files_only": True}
            found = loader.from_pretrained(str(path) if path.exists() else place, **how)
        except Exception:  # of many kinds: without it the tokenizer itself is written
            continue
        fast = getattr(found, "backend_tokenizer", None)
        if fast is not None and _model(fast) == _model(tokenizer.backend):
            return found
    return None


def _model(backend: Any) -> Any:
    content = json.loads(backend.to_str())
    return [content[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
