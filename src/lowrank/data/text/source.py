"""What a source of text is: named splits of documents, read piece by piece in bounded memory.

A document may be larger than memory (a 5 GB text file), so that a source yields *pieces*: a document's text in order,
the last piece marked as its end. Pieces of one document put together are the document, to the byte.

A source with a name announces itself where it is defined, with :func:`text_source`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """A stretch of one document; ``ends`` says that the document ends here."""

    text: str
    ends: bool


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents of text.

    Attributes:
        name: short, fit for a file name.
        description: one line for people.
        fingerprint: JSON values that change when the text changes; the key of the cache.
        splits: for each split that the source itself has (``train``, ``val``, ``test``), a function that starts reading
            it from the top.
        size_bytes: UTF-8 bytes of all text together, roughly, for progress; None if unknown.
    """

    name: str
    description: str
    fingerprint: Mapping[str, Any]
    splits: Mapping[str, Callable[[], Iterator[Piece]]]
    size_bytes: int | None = None

    def pieces(self, split: str = "train") -> Iterator[Piece]:
        """The split's documents from the top, cut into pieces; without empty documents and with valid UTF-8 only.

        Raises:
            ValueError: the source has no such split of its own.
        """
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r} of its own; it has {', '.join(self.splits)}")
        for text, ends in self.splits[split]():
            if text or ends:
                yield Piece(encodable(text), ends)

    def documents(self, split: str = "train") -> Iterator[str]:
        """The split's documents, each whole (and so each in memory)."""
        parts: list[str] = []
        for text, ends in self.pieces(split):
            parts.append(text)
            if ends:
                if document := "".join(parts):
                    yield document
                parts = []


def encodable(text: str) -> str:
    """``text`` with pairs of surrogates joined and lone ones (JSON can carry them; UTF-8 cannot) replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """A row of ``lowrank data list``, and how it is opened. ``prepared``: its folders of tokens in the cache."""

    name: str
    about: str
    size: str
    licence: str
    needs_network: bool
    open: Callable[[], Source]
    prepared: tuple[Path, ...] = ()


SOURCES: dict[str, SourceInfo] = {}


def text_source(
    *, name: str, about: str, size: str, licence: str, needs_network: bool = True
) -> Callable[[Callable[[], Source]], Callable[[], Source]]:
    """Decorator: the function opens the source of this name. Opening reads nothing yet.

    Raises:
        ValueError: there is a source of that name already.
    """

    def register(opener: Callable[[], Source]) -> Callable[[], Source]:
        if name in SOURCES:
            raise ValueError(f"there is a source of text called {name!r} already")
        SOURCES[name] = SourceInfo(
            name=name, about=about, size=size, licence=licence, needs_network=needs_network, open=opener
        )
        return opener

    return register
