"""Text as people see it: names that come from files must not steer a terminal, and lists of them end."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def printable(text: str, keep: str = "\n\t") -> str:
    r"""``text`` with control characters, and marks that turn the direction of writing, written out.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(c if c in keep or unicodedata.category(c) not in hidden else _escaped(c) for c in text)


def one_line(text: str) -> str:
    r"""``text`` for a cell or a label: all that is no visible character or plain space is written out.

    >>> one_line("a\x1b[31m b\n")
    'a\\x1b[31m b\\n'
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def some(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
