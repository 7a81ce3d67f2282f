"""Which parameters were loaded from a file, and which initialised at random: what ``rest="auto"`` decides by."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def mark_loaded_(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Say that the parameters ``names`` were loaded and not initialised at random; ``names=None`` means all."""
    chosen = None if names is None else set(names)
    for name, p in model.named_parameters(remove_duplicate=False):
        if chosen is None or name in chosen:
            p._lowrank_loaded = True  # type: ignore[attr-defined]


def loaded_parameters(model: nn.Module) -> set[int]:
    """The ids of the loaded parameters: marked by :func:`mark_loaded_`, or by transformers' ``from_pretrained``.

    transformers marks each parameter from version 5 on; before, a model with a name or path counts as all loaded.
    """
    parameters = list(model.parameters())
    marked = {
        id(p) for p in parameters if getattr(p, "_lowrank_loaded", False) or getattr(p, "_is_hf_initialized", False)
    }
    name: object = getattr(model, "name_or_path", None)
    if not marked and name:
        return {id(p) for p in parameters}
    return marked
