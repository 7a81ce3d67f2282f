"""Operations on any rule's state, a nested dict of tensors: walk, copy and compare it, zero a part of it, find it in
what was saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.optim.pairs import OneFactor
from lowrank.optim.rules import Rule, State


def check_forgets(rule: Rule, like: Tensor, name: str) -> None:
    """Raise ValueError unless the rule keeps nothing but moments of the parameter's shape.

    Zeroing the smallest numbers would spoil a basis, or quantised codes.
    """
    state = rule.init(torch.empty_like(like, device="meta"))
    if isinstance(rule, OneFactor) or any(
        t.numel() > 1 and (t.shape != like.shape or not t.is_floating_point()) for _, t in leaves(state)
    ):
        raise ValueError(
            f"a share of the state of {name} cannot be forgotten, since {rule!r} keeps more than moments of its shape; "
            "use forget=0 or forget=1, or AdamW with storage='float32' for the factors"
        )


def forget_smallest_(moments: list[Tensor], share: float) -> None:
    """Zero the ``share`` of the entries at which the first of the moments is smallest, in all of them.

    The same entries everywhere: a first moment that outlived its second would be divided by nearly nothing. In each
    matrix (head) of a stack apart.
    """
    first = moments[0]
    rows = first.flatten(-2) if first.dim() > 2 else first.flatten()
    smallest = rows.abs().topk(int(rows.shape[-1] * share), largest=False, sorted=False).indices
    dropped = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, smallest, True).view(first.shape)
    for moment in moments:
        moment.masked_fill_(dropped, 0)


def leaves(state: State, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted path, tensor) of every tensor in a state."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield prefix + key, value
        else:
            yield from leaves(value, f"{prefix}{key}.")


def mapped(state: State, change: Callable[[str, Tensor], Tensor], prefix: str = "") -> State:
    """The state with ``change(dotted path, tensor)`` in the place of every tensor."""
    return {
        key: change(prefix + key, value) if isinstance(value, Tensor) else mapped(value, change, f"{prefix}{key}.")
        for key, value in state.items()
    }


def matched(ours: State, saved: State, label: str) -> list[tuple[Tensor, Tensor]]:
    """(our tensor, the saved one) for every tensor of the state called ``label``.

    Raises:
        ValueError: a key, shape or dtype differs.
    """
    mine, theirs = dict(leaves(ours)), dict(leaves(saved))
    if mine.keys() != theirs.keys():
        raise ValueError(f"the saved state of {label!r} holds {sorted(theirs)}, its rule needs {sorted(mine)}")
    for key, tensor in mine.items():
        other = theirs[key]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise ValueError(
                f"the saved state {key} of {label!r} is {other.dtype} {tuple(other.shape)}, "
                f"expected {tensor.dtype} {tuple(tensor.shape)}"
            )
    return [(tensor, theirs[key]) for key, tensor in mine.items()]


def find_saved(
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> dict[nn.Parameter, tuple[str | int, State]]:
    """(name or number, saved state) for each parameter of an optimizer's ``groups``, by what ``state_dict()`` gave: by
    name where both have names, else by position. The states themselves are not looked at.

    Raises:
        ValueError: it is of other parameters, or of other rules; the first is named.
    """
    by_key = _by_key(saved, groups)
    found: dict[nn.Parameter, tuple[str | int, State]] = {}
    for group in groups:
        for i, p in enumerate(group["params"]):
            key = group["param_names"][i] if group.get("param_names") else len(found)
            if key not in by_key:
                raise ValueError(
                    f"the saved optimizer state has no parameter {key!r}: it is of another model or method"
                )
            state, rule = by_key[key]
            if rule != repr(group["rule"]):
                raise ValueError(
                    f"the saved state of {key!r} is of rule {rule}, the optimizer's is {group['rule']!r}; resume with "
                    "the method that the run was started with"
                )
            found[p] = (key, state)
    if len(by_key) != len(found):
        raise ValueError(f"the saved state has {len(by_key)} parameters, the optimizer {len(found)}")
    return found


def _by_key(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str | int, tuple[State, str]]:
    """(state, rule as text) of everything saved."""
    theirs = saved["param_groups"]
    if len(theirs) != len(groups):
        raise ValueError(f"the saved state has {len(theirs)} parameter groups, the optimizer {len(groups)}")
    named = all(group.get("param_names") for group in [*theirs, *groups])
    return {
        key: (saved["state"].get(index, {}), group["rule"])
        for group in theirs
        for key, index in zip(group["param_names"] if named else group["params"], group["params"], strict=True)
    }
