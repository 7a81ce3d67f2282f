"""Text that every Python has, for trying things offline: its own language reference (``pydoc_data.topics``).

It is some 465 KB of English, but the topics repeat each other (the chapter on special method names also appears cut
into its sections), so that a held-out part would partly be training text. Here every paragraph appears once, at its
place in the longest topic that has it, which leaves about 375 KB, in passages of about 1,500 characters: short enough
that enough of them can be held out. The text differs a little between versions of Python.
"""

import hashlib
import platform
import re
from collections.abc import Iterator

from lowrank.data.text.source import Piece, Source

PASSAGE = 1500
SHORT = 20  # headings and single words may repeat


def builtin() -> Source:
    """Python's language reference as a source of passages."""
    passages = list(_passages())
    text = "\0".join(passages).encode()
    return Source(
        name="builtin",
        description=f"the language reference of Python {platform.python_version()} (pydoc_data.topics)",
        fingerprint={"builtin": hashlib.blake2b(text, digest_size=16).hexdigest()},
        splits={"train": lambda: (Piece(passage, True) for passage in passages)},
        size_bytes=len(text),
    )


def _passages() -> Iterator[str]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        passage = ""
        for paragraph in re.split(r"\n\s*\n", topics[name].strip("\n")):
            if paragraph.strip() in seen:
                continue
            if len(paragraph) > SHORT:
                seen.add(paragraph.strip())
            passage += paragraph + "\n\n"
            if len(passage) >= PASSAGE:
                yield passage
                passage = ""
        if len(passage) > PASSAGE // 10:  # not the headings of a topic that stands elsewhere
            yield passage
