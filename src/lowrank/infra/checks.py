"""Checks of values in one form of words: what was given, what is allowed, and what is near."""

from __future__ import annotations

from typing import Any, get_args

from lowrank.infra.convert import nearest


def check_choice(name: str, value: object, allowed: Any) -> None:
    """ValueError, calling it ``name``, unless ``value`` is one of ``allowed``: names, or a Literal of them."""
    names: tuple[str, ...] = get_args(allowed) or tuple(allowed)
    if value not in names:
        raise ValueError(f"{name}={value!r} is unknown; it is one of {', '.join(names)}{nearest(str(value), names)}")


def check_integer(name: str, value: object) -> int:
    """``value`` as an int; ValueError, calling it ``name``, unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    return value
