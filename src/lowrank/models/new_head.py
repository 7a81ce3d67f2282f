"""Pre-trained models of transformers with an output layer of a task's own size, new where theirs is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowrank.infra.hub import located
from lowrank.models.text import without_bars


def with_new_head(auto: str, path: str, outputs: int, dtype: torch.dtype | str) -> tuple[Any, set[str]]:
    """(a model with so many outputs, the names of those of its parameters that are new).

    Args:
        auto: the class of transformers that finds it, ``AutoModelFor…``.
        path: a local folder with ``config.json``, or a name on the hub.
        outputs: classes or scores.
        dtype: of the weights, or ``auto``.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    import transformers

    if not path or (path.startswith((".", "/", "~")) and not (Path(path).expanduser() / "config.json").is_file()):
        raise FileNotFoundError(f"model.path={path!r} is no folder with config.json; give one, or a name on the hub")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would report the new head, which is meant
    try:
        with without_bars():
            model, info = getattr(transformers, auto).from_pretrained(
                located(path),
                num_labels=outputs,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
                dtype=dtype,
            )
    finally:
        transformers.logging.set_verbosity(level)
    return model, set(info["missing_keys"]) | {mismatch[0] for mismatch in info["mismatched_keys"]}
