"""Whether text fits a model: its positions, and the tokenizer that it knows (another's ids would mislead it)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.data.text.tokenizers import Tokenizer, pretrained_tokenizer, tokenizer_files

STRANGERS = 0.01  # the share of ids that may stand for other tokens: reserved ones that were given a meaning


def positions_of(model: Any) -> int | None:
    """How many positions a language model of transformers has; None where its configuration does not say."""
    config = getattr(model, "config", None)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def check_fits(tokenizer: Tokenizer, model: Any, *, size: bool = True) -> None:
    """Raise ValueError where ``tokenizer`` does not fit ``model``, if the model was loaded from somewhere.

    Refused are: more ids than the model has; ids that stand for other tokens than in the tokenizer that lies with the
    model; where none does, an end of a text that is no special token here. Without ``size`` the first is left to who
    knows which ids there are.
    """
    config = getattr(model, "config", None)
    path = str(getattr(config, "name_or_path", "") or "")
    if not path:
        return
    rows = getattr(config, "vocab_size", None)
    if size and rows is not None and tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer {tokenizer.spec!r} has ids up to {tokenizer.vocab_size - 1:,}, and {path} knows {rows:,}: "
            "it is another model's; leave --data.tokenizer out for the model's own"
        )
    if tokenizer.spec == path:
        return
    own = _beside(path)
    if own is not None and _another_family(own, tokenizer):
        raise ValueError(
            f"the tokenizer {tokenizer.spec!r} is of another family than the one of {path}: the same ids stand for "
            "other tokens; leave --data.tokenizer out for the model's own"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]  # type: ignore[union-attr]
    special = tokenizer.special_ids
    known = [id for id in ends if id is not None and id < (rows or 0)]
    if own is None and special is not None and known and not special & set(known):
        raise ValueError(
            f"the tokenizer {tokenizer.spec!r} does not know what ends a text for {path} (id {known[0]}): it is "
            "another model's; give the model's own by --data.tokenizer"
        )


def _beside(path: str) -> Tokenizer | None:
    """The tokenizer in a model's folder, or of its name where that is on this machine."""
    with contextlib.suppress(Exception):  # of many kinds: it is damaged, or of a kind that is not known here
        if tokenizer_files(Path(path).expanduser()):
            return pretrained_tokenizer(path)
    return None


def _another_family(own: Tokenizer, other: Tokenizer) -> bool:
    first, second = _vocabulary(own), _vocabulary(other)
    if first is None or second is None:
        return own.fingerprint != other.fingerprint
    shared = first.keys() & second.keys()
    different = sum(first[id] != second[id] for id in shared)
    return different > STRANGERS * len(shared)


def _vocabulary(tokenizer: Tokenizer) -> Mapping[int, str] | None:
    """Tokens by id; None for our own kinds, which are known by their fingerprint."""
    backend = getattr(tokenizer, "backend", None)
    return None if backend is None else {id: token for token, id in backend.get_vocab().items()}
