"""Pytrees of data and tensors (optimizer state, random states) as JSON beside a flat dict of tensors.

`flatten` replaces each tensor of a pytree by a reference and keeps what JSON alone would lose: integer keys, tuples and
floats that are not finite. `pack` makes a flat dict fit for safetensors, which stores neither shared memory nor
strides: a tensor that stands under several names is kept once, and one stored in another order than by rows is
transposed and the order noted.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

PyTree: TypeAlias = Any  # dict (string or integer keys) | list | tuple | str | bool | int | float | None | Tensor
_TENSOR, _FLOAT, _TUPLE, _ITEMS = "*tensor", "*float", "*tuple", "*items"


def flatten(tree: PyTree, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split a pytree into JSON and tensors by path; `unflatten` puts them together again.

    Raises:
        TypeError: something in it is neither data nor a tensor; the message gives its path.

    >>> flatten({"state": {0: (1, None)}})
    ({'state': {'*items': [[0, {'*tuple': [1, None]}]]}}, {})
    """
    if isinstance(tree, Tensor):
        return {_TENSOR: path}, {path: tree}
    if isinstance(tree, float) and not math.isfinite(tree):
        return {_FLOAT: str(tree)}, {}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree, {}
    leaves: dict[str, Tensor] = {}

    def inner(key: object, value: PyTree) -> Any:
        json, found = flatten(value, f"{path}.{key}" if path else str(key))
        leaves.update(found)
        return json

    if isinstance(tree, Mapping):
        if not all(isinstance(key, (str, int)) for key in tree):
            raise TypeError(f"{path or 'the pytree'} has keys that are neither strings nor integers: {list(tree)[:3]}")
        if all(isinstance(key, str) and not key.startswith("*") for key in tree):
            return {key: inner(key, value) for key, value in tree.items()}, leaves
        return {_ITEMS: [[key, inner(key, value)] for key, value in tree.items()]}, leaves
    if isinstance(tree, (list, tuple)):
        items = [inner(index, value) for index, value in enumerate(tree)]
        return (items if isinstance(tree, list) else {_TUPLE: items}), leaves
    raise TypeError(
        f"{path or 'the pytree'} is a {type(tree).__name__}; "
        "a checkpoint holds tensors, numbers, strings, None, lists, tuples and dicts"
    )


def unflatten(tree: Any, leaves: Mapping[str, Tensor]) -> PyTree:
    """The pytree that `flatten` split."""
    if isinstance(tree, list):
        return [unflatten(item, leaves) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return leaves[tree[_TENSOR]]
    if _FLOAT in tree:
        return float(tree[_FLOAT])
    if _TUPLE in tree:
        return tuple(unflatten(item, leaves) for item in tree[_TUPLE])
    if _ITEMS in tree:
        return {key: unflatten(item, leaves) for key, item in tree[_ITEMS]}
    return {key: unflatten(item, leaves) for key, item in tree.items()}


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors fit for safetensors, with notes on what it cannot store: {"aliases": …, "orders": …}."""
    packed: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    orders: dict[str, list[int]] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        place = (tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        order = _order(tensor)
        if order:
            orders[name] = order
            tensor = tensor.permute(order)
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a view into something larger, or overlapping another name
        storages.add(storage.data_ptr())
        packed[name] = tensor
    return packed, {"aliases": aliases, "orders": orders}


def unpack(packed: Mapping[str, Tensor], notes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that `pack` took, or some of them; names that shared one tensor share it again."""
    tensors = dict(packed)
    for name, order in notes["orders"].items():
        if name in tensors:
            inverse = sorted(range(len(order)), key=order.__getitem__)
            tensors[name] = tensors[name].permute(inverse)
    for name, original in notes["aliases"].items():
        if original in tensors:
            tensors[name] = tensors[original]
    return tensors


def random_state() -> dict[str, PyTree]:
    """State of every global random generator: Python's, NumPy's, torch's on the CPU and on each GPU."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }


def set_random_state_(state: Mapping[str, PyTree]) -> None:
    """Put the generators back where `random_state` found them (GPUs only where there are as many as then)."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([saved.cpu() for saved in state["cuda"]])


def _order(tensor: Tensor) -> list[int]:
    """The order of dimensions in which a tensor lies densely in memory, or [] if it is by rows (or not dense)."""
    if tensor.is_contiguous() or not tensor.numel():
        return []
    order = sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim]), reverse=True)
    return order if tensor.permute(order).is_contiguous() else []
