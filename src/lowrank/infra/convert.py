"""From text to values, by annotation; and the nearest name, for messages.

A setting has one source of truth, the signature it reaches: `rank: int = 8` makes `--method.rank 4` an integer and
`--method.rank four` an error. Understood are int, float, bool, str (and Path), None, Literal, lists of these, and
unions; the narrowest member that fits wins, so `int | str` makes 4 of "4".
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import operator
import types
from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

Scalar: TypeAlias = str | bool | int | float | None
Setting: TypeAlias = Scalar | tuple[Scalar, ...]

_TRUE, _FALSE, _NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null")
_LISTS = (list, tuple, set, frozenset, Sequence, Collection, Iterable, AbstractSet)


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for a message: " (did you mean 'rank'?)", or "" where nothing is near.

    >>> nearest("rnak", ["rank", "alpha"])
    " (did you mean 'rank'?)"
    """
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def as_option(name: str) -> str:
    """A setting as it is typed.

    >>> as_option("batch_size"), as_option("model.image_size")
    ('--batch-size', '--model.image_size')
    """
    return f"--{name if '.' in name else name.replace('_', '-')}"


def convert(value: object, annotation: Any, name: str) -> Setting:
    """`value` as the annotation wants it.

    Args:
        value: text from a command line, or a value from JSON or Python, which keeps its kind (an integer may stand
            for a float).
        annotation: a type, resolved (not a string).
        name: what to call the setting in a message.

    Raises:
        ValueError: it does not fit; the message says what would.

    >>> convert("4", int | None, "--rank"), convert("none", int | None, "--rank"), convert("q,v", list[str], "--parts")
    (4, None, ('q', 'v'))
    """
    members = _members(annotation)
    for fits in (_none, _boolean, _integer, _number, _choice, _list, _text):
        found, converted = fits(value, members)
        if found:
            return converted
    hint = nearest(value, map(str, _choices(members))) if isinstance(value, str) else ""
    shown = value if isinstance(value, str) else repr(value)
    raise ValueError(f"{name} {shown}: expected {describe(annotation)}{hint}")


def describe(annotation: Any) -> str:
    """In words, what `convert` would accept.

    >>> describe(float | None)
    'a number or none'
    """
    return " or ".join(_words(annotation)) or "something that cannot be written as text: set it in Python"


def _words(annotation: Any) -> list[str]:
    """The kinds of value `describe` joins; none for a type that only Python can write."""
    members = _members(annotation)
    words = []
    if bool in members:
        words.append("true or false")
    if float in members:
        words.append("a number")
    elif int in members:
        words.append("a whole number")
    if str in members or Path in members:
        words.append("text")
    if choices := _choices(members):
        words.append("one of " + ", ".join(map(str, choices)))
    words += [f"a list (of {describe(_item(member))}, separated by commas)" for member in members if _is_list(member)]
    if type(None) in members:
        words.append("none")
    return words


Fit: TypeAlias = tuple[bool, Any]
_NO: Fit = (False, None)


def _none(value: object, members: list[Any]) -> Fit:
    given = value is None or (isinstance(value, str) and value.lower() in _NONE)
    return (True, None) if given and type(None) in members else _NO


def _boolean(value: object, members: list[Any]) -> Fit:
    if bool not in members:
        return _NO
    if isinstance(value, bool):
        return True, value
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return True, value.lower() in _TRUE
    return _NO


def _integer(value: object, members: list[Any]) -> Fit:
    """Whole numbers; "5e4" and "10_000" are two. Written out it keeps every digit; a float has only 53 bits of them."""
    number = _finite(value)
    if int not in members or number is None or not number.is_integer():
        return _NO
    with suppress(ValueError):
        return True, int(value)  # type: ignore[call-overload]
    return True, int(number)


def _number(value: object, members: list[Any]) -> Fit:
    number = _finite(value)
    return (True, number) if float in members and number is not None else _NO


def _choice(value: object, members: list[Any]) -> Fit:
    for choice in _choices(members):
        if value == choice or (isinstance(value, str) and value == str(choice)):
            return True, choice
    return _NO


def _list(value: object, members: list[Any]) -> Fit:
    """Lists, or text such as "q,v" and "[1, 2]"; text without a comma is a list only where it cannot be text."""
    kinds = [member for member in members if _is_list(member)]
    if not kinds:
        return _NO
    if isinstance(value, str):
        if value.startswith("["):
            try:
                value = json.loads(value)
            except ValueError:
                return _NO
        elif "," in value or (str not in members and Path not in members):
            value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        return _NO
    try:
        return True, tuple(convert(part, _item(kinds[0]), "") for part in value)
    except ValueError:
        return _NO


def _text(value: object, members: list[Any]) -> Fit:
    if isinstance(value, (str, Path)) and (str in members or Path in members):
        return True, str(value)
    return _NO


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a union, nested ones included."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _choices(members: list[Any]) -> list[Any]:
    return [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]


def _is_list(member: Any) -> bool:
    return member in (list, tuple) or get_origin(member) in _LISTS


def _item(member: Any) -> Any:
    """What a list holds; text where it does not say."""
    arguments = [part for part in get_args(member) if part is not Ellipsis]
    if not arguments:
        return str
    return functools.reduce(operator.or_, arguments)


def can_be_set(annotation: Any) -> bool:
    """Whether values of this type can be written as data: not a rule or a schedule, which only Python can make."""
    return _words(annotation) not in ([], ["none"])
