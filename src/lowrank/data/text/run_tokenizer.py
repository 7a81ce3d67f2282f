"""The tokenizer that belongs to a run: beside `run.json` and in each checkpoint, used in the place of any other."""

from __future__ import annotations

from pathlib import Path

from lowrank.data.cache import published
from lowrank.data.text.tokenizers import Tokenizer, load_tokenizer

RUN_TOKENIZER = "tokenizer"  # a folder beside run.json


def save_run_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write a run's tokenizer into ``folder/tokenizer``, whole or not at all; one that lies there already stays.

    Args:
        tokenizer: the one that made what the run trains on.
        folder: the run's, or wherever its weights go.
    """
    final = folder / RUN_TOKENIZER
    if not final.is_dir():
        with published(final) as beside:
            tokenizer.save(beside)
    return final


def open_run_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer that ``save_run_tokenizer`` wrote into ``folder``, exactly; None where a run was saved without one.

    Raises:
        ValueError, FileNotFoundError: it is damaged.
    """
    final = folder / RUN_TOKENIZER
    return load_tokenizer(final) if final.is_dir() else None
