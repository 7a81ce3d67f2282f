"""Which parameters were loaded and which initialised at random: what ``rest="auto"`` decides by.

Marks come first: ``mark_loaded_`` (the loaders of ``lowrank.models`` call it), and those of transformers'
``from_pretrained``. Without marks the model itself tells: an initialised normalisation layer multiplies by 1 (or 0) and
adds 0, and training moves it; so where one is otherwise, the model was loaded. An output layer that still looks as
initialised is then a new one on a loaded body.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Origin:
    """The ids of the ``loaded`` parameters, and ``why`` they are taken for that, in words; None where nothing tells."""

    loaded: frozenset[int]
    why: str | None


def mark_loaded_(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Say that the parameters ``names`` were loaded (None: all), and the others, unless marked before, were not."""
    chosen = None if names is None else set(names)
    for name, p in model.named_parameters(remove_duplicate=False):
        p._lowrank_loaded = chosen is None or name in chosen or getattr(p, "_lowrank_loaded", False)  # type: ignore[attr-defined]


def mark_all_but_(model: M, *fresh: str) -> M:
    """Mark as loaded every parameter but ``fresh`` ones, named alone or by their module, and return the model."""
    of_modules = tuple(f"{name}." for name in fresh)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    mark_loaded_(model, [name for name in names if name not in fresh and not name.startswith(of_modules)])
    return model


def origin(model: nn.Module, output_layers: Iterable[nn.Module] = ()) -> Origin:
    """Which parameters of ``model`` were loaded, and how that is known."""
    parameters = list(model.parameters())
    by_us = {id(p) for p in parameters if getattr(p, "_lowrank_loaded", False)}
    by_transformers = {id(p) for p in parameters if getattr(p, "_is_hf_initialized", False)}
    if by_transformers or any(hasattr(p, "_lowrank_loaded") for p in parameters):
        why = "marked by transformers" if by_transformers else "marked by mark_loaded_"
        return Origin(frozenset(by_us | by_transformers), why)
    layers = list(_normalisations(model))
    if not layers:
        name = getattr(model, "name_or_path", None)  # transformers before version 5 marks no parameters
        return Origin(frozenset(map(id, parameters if name else [])), f"its name_or_path is {name}" if name else None)
    used = next((name for name, module in layers if not _is_fresh(module)), None)
    if used is None:
        return Origin(frozenset(), "all its normalisation layers are as initialised")
    new = {id(p) for layer in output_layers if looks_new(layer) for p in layer.parameters()}
    return Origin(frozenset(map(id, parameters)) - new, f"the normalisation layer {used} is not as initialised")


def _normalisations(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and "norm" in type(module).__name__.lower() and weight.dim() == 1:
            yield name, module


def _is_fresh(module: nn.Module) -> bool:
    """Whether weights are all 1, or all 0 where 1 is added to them, and biases 0; without values (meta) it is so."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    if weight.is_meta:
        return True
    return bool((weight == 1).all() or (weight == 0).all()) and (bias is None or not bool(bias.any()))


@torch.no_grad()
def looks_new(layer: nn.Module) -> bool:
    """Whether an output layer has a bias of zeros, or numbers that just fill ``nn.Linear``'s own ±1/√in."""
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    if not bool(weight.any()) or (bias is not None and not bool(bias.any())):
        return True
    bound = weight[0].numel() ** -0.5 * (1 + 1e-3)
    fills = 0.8 * bound < float(weight.abs().max()) <= bound
    return fills and (bias is None or float(bias.abs().max()) <= bound)
