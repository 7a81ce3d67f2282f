"""Which text is for training and which for judging: splits that never share a document and never depend on chance.

The source's own splits are used where it has them. What is missing is cut out of its training split: by a hash of each
document where there are many (so that a document's split does not depend on the others, and a copy of a document lands
on the same side), and by position where there are few or only one (the first part trains, then comes ``val``, then
``test``, as in nanoGPT's Shakespeare).
"""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from lowrank.data.split_names import SPLITS
from lowrank.data.text.source import Piece, Source

DEFAULT_FRACTION = 0.05
FEW_DOCUMENTS = 200  # below this a hash would give splits of very uneven size: cut by position instead
LINE_REACH = 4096  # bytes that a cut by position may move on to reach the end of a line


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """How a source is divided.

    Attributes:
        rule: ``own`` (as the source has it), ``hash`` or ``position``.
        val_fraction, test_fraction: shares of the source's training split, in documents or (``position``) in bytes.
        several: there is more than one document, so that each is ended.
        train_bytes: UTF-8 bytes of the training split, counted only for ``position``.
    """

    rule: str
    val_fraction: float
    test_fraction: float
    several: bool
    train_bytes: int

    def splits(self, source: Source) -> list[str]:
        """The splits that come of it, in the usual order."""
        held_out = {"val": self.val_fraction, "test": self.test_fraction}
        return [split for split in SPLITS if split in source.splits or held_out.get(split, 0) > 0]


def check_fractions(
    name: str, own: Collection[str], val_fraction: float | None, test_fraction: float | None
) -> tuple[float, float]:
    """The shares of the training split that become ``val`` and ``test``, with the defaults filled in.

    A missing ``val`` is cut out by default; a missing ``test`` only where ``train`` is all that the source has of its
    ``own`` splits.

    Raises:
        ValueError: a fraction for a split that the source already has, or fractions out of range.
    """
    for split, fraction in (("val", val_fraction), ("test", test_fraction)):
        if fraction is not None and split in own:
            raise ValueError(f"{name} has its own {split} split: leave {split}_fraction out")
        if fraction is not None and not 0 <= fraction < 1:
            raise ValueError(f"{split}_fraction must be at least 0 and below 1, not {fraction!r}")
    val = (0.0 if "val" in own else DEFAULT_FRACTION) if val_fraction is None else float(val_fraction)
    test = (DEFAULT_FRACTION if set(own) == {"train"} else 0.0) if test_fraction is None else float(test_fraction)
    if val + test >= 1:
        raise ValueError(
            f"val_fraction {val} and test_fraction {test} leave nothing to train on: together they must be below 1"
        )
    return val, test


def survey(source: Source, fractions: tuple[float, float], limit: int | None) -> Splitting:
    """Choose the rule, reading at most the first ``FEW_DOCUMENTS`` documents of the training split.

    Raises:
        ValueError: there is no text at all.
    """
    documents = size = 0
    divided = sum(fractions) > 0
    enough = FEW_DOCUMENTS if divided else 2
    for text, ends in limited(source.pieces("train"), limit):
        size += len(text.encode())
        documents += ends
        if documents >= enough:
            break
    if not size:
        raise ValueError(f"{source.description} holds no text: nothing to train on")
    rule = "own" if not divided else "hash" if documents >= enough else "position"
    val, test = fractions
    return Splitting(
        rule=rule,
        val_fraction=val,
        test_fraction=test,
        several=documents > 1,
        train_bytes=size if rule == "position" else 0,
    )


def divided(source: Source, splitting: Splitting, limit: int | None) -> Iterator[tuple[str, Piece]]:
    """Every piece of the source with its split, each split in the source's order."""
    for own in source.splits:
        pieces = limited(source.pieces(own), limit)
        if own != "train" or splitting.rule == "own":
            yield from ((own, piece) for piece in pieces)
        elif splitting.rule == "hash":
            yield from _by_hash(pieces, splitting)
        else:
            yield from _by_position(pieces, splitting)


def limited(pieces: Iterator[Piece], limit: int | None) -> Iterator[Piece]:
    """The first ``limit`` UTF-8 bytes of the pieces; the document that crosses the limit is cut there."""
    if limit is None:
        yield from pieces
        return
    for piece in pieces:
        data = piece.text.encode()
        if len(data) >= limit:
            yield Piece(data[:limit].decode("utf-8", "ignore"), True)
            return
        limit -= len(data)
        yield piece


def _by_hash(pieces: Iterator[Piece], splitting: Splitting) -> Iterator[tuple[str, Piece]]:
    """A document goes where the hash of its first piece says (for all but huge documents, of all of it)."""
    split = None
    for piece in pieces:
        if split is None:
            digest = hashlib.blake2b(piece.text.encode(), digest_size=8).digest()
            place = int.from_bytes(digest, "big") / 2**64
            val, test = splitting.val_fraction, splitting.test_fraction
            split = "test" if place < test else "val" if place < test + val else "train"
        yield split, piece
        if piece.ends:
            split = None


def _by_position(pieces: Iterator[Piece], splitting: Splitting) -> Iterator[tuple[str, Piece]]:
    """The first bytes train, the next validate, the last test; each cut at the end of a line if one is near."""
    total, val, test = splitting.train_bytes, splitting.val_fraction, splitting.test_fraction
    stages = [("train", round(total * (1 - val - test))), ("val", round(total * (1 - test))), ("test", total)]
    stages = [stage for stage, wanted in zip(stages, (True, val > 0, test > 0), strict=True) if wanted]
    stages[-1] = (stages[-1][0], 2 * total)  # the last takes whatever rounding leaves
    done = 0
    for piece in pieces:
        data = piece.text.encode()
        while done + len(data) > stages[0][1]:
            at = _cut(data, max(0, stages[0][1] - done))
            if at:
                yield stages[0][0], Piece(data[:at].decode(), False)
            done, data = done + at, data[at:]
            stages.pop(0)
        if data or not piece.text:
            yield stages[0][0], Piece(data.decode(), piece.ends)
        done += len(data)


def _cut(data: bytes, at: int) -> int:
    """The first line end from ``at`` on if it is near and not the end of ``data``; else the next character's start."""
    if at == 0:
        return 0
    end = data.find(b"\n", at - 1, at + LINE_REACH) + 1
    if 0 < end < len(data):
        return end
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at += 1
    return at
