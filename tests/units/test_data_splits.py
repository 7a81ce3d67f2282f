"""Splits never share a document, keep every character and do not depend on chance."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.data import open_source
from lowrank.data.text.source import Piece, Source
from lowrank.data.text.splits import check_fractions, divided, limited, survey

Write = Callable[[str, str | bytes], Path]


def source_of(documents: list[str], **splits: list[str]) -> Source:
    def reading(texts: list[str]) -> Callable[[], Iterator[Piece]]:
        return lambda: (Piece(text, True) for text in texts)

    named = {"train": documents, **splits}
    return Source(
        name="made", description="a made source", fingerprint={}, splits={k: reading(v) for k, v in named.items()}
    )


def split_up(source: Source, val: float | None = None, test: float | None = None) -> dict[str, str]:
    fractions = check_fractions(source.name, source.splits, val, test)
    texts: dict[str, str] = {}
    for split, piece in divided(source, survey(source, fractions, None), None):
        texts[split] = texts.get(split, "") + piece.text
    return texts


def test_one_text_is_split_by_position_at_line_ends(write: Write) -> None:
    text = "".join(f"line {n}\n" for n in range(1000))
    texts = split_up(open_source(write("a.txt", text)), 0.1, 0.05)
    assert texts["train"] + texts["val"] + texts["test"] == text
    assert all(part.endswith("\n") for part in texts.values())
    assert len(texts["train"]) == pytest.approx(0.85 * len(text), abs=20)
    assert len(texts["val"]) == pytest.approx(0.1 * len(text), abs=20)


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=40, max_size=300), st.floats(0, 0.45), st.floats(0, 0.45)
)
def test_splits_by_position_keep_every_character(text: str, val: float, test: float) -> None:
    texts = split_up(source_of([text[:30], text[30:]]), val, test)
    assert texts["train"] + texts.get("val", "") + texts.get("test", "") == text
    assert ("val" in texts) <= (val > 0)
    assert ("test" in texts) <= (test > 0)


def test_many_documents_are_split_by_hash_without_overlap() -> None:
    documents = [f"document {n % 900}" for n in range(1000)]  # a hundred of them twice
    texts = split_up(source_of(documents), 0.2, 0.1)
    assert sorted("".join(texts.values())) == sorted("".join(documents))
    parts = {split: {f"document {n}" for n in text.split("document ")[1:]} for split, text in texts.items()}
    assert not parts["train"] & parts["val"]
    assert not parts["train"] & parts["test"]
    assert not parts["val"] & parts["test"]
    assert len(parts["val"]) == pytest.approx(180, abs=40)
    # A document's split does not depend on the others.
    fewer = split_up(source_of(documents[:500]), 0.2, 0.1)
    assert texts["val"].startswith(fewer["val"])


def test_own_splits_are_kept() -> None:
    source = source_of(["a"] * 3, val=["v"], test=["t"])
    assert split_up(source) == {"train": "aaa", "val": "v", "test": "t"}
    with pytest.raises(ValueError, match="has its own val split: leave val_fraction out"):
        check_fractions(source.name, source.splits, 0.1, None)
    assert check_fractions("a", ["train", "val"], None, None) == (0.0, 0.0)


@pytest.mark.parametrize("fractions", [(-0.1, None), (1.0, None), (None, 1.5), (0.6, 0.4)])
def test_impossible_fractions(fractions: tuple[float | None, float | None]) -> None:
    with pytest.raises(ValueError, match="below 1"):
        check_fractions("a", ["train"], *fractions)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50), st.integers(1, 80))
def test_a_limit_cuts_at_a_character(text: str, limit: int) -> None:
    cut = "".join(piece.text for piece in limited(iter([Piece(text[:20], True), Piece(text[20:], True)]), limit))
    assert text.startswith(cut)
    assert min(limit, len(text.encode())) - 3 <= len(cut.encode()) <= limit
