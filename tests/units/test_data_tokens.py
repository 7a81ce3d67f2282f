"""Preparing text: the files hold exactly the text, whatever the number of processes, and never half of it."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.data import check_vocabulary, open_source, prepare
from lowrank.data.cache import cache_root
from lowrank.data.text.prepare import SplitWriter, encode_group, grouped
from lowrank.data.text.source import Piece
from lowrank.data.text.tokenizers import Bytes
from lowrank.infra.progress import bar_on_terminal

Write = Callable[[str, str | bytes], Path]
TEXT = "".join(f"The {n}th line of a text that is long enough.\n" for n in range(500))
ROWS = '"text"\n' + "".join(f'"Document {n}, {"word " * (n % 7)}"\n' for n in range(600))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_bytes_of_one_text_are_the_file(write: Write) -> None:
    tokens = prepare(write("a.txt", TEXT))
    files = [np.fromfile(tokens.folder / f"{split}.bin", "<u2") for split in ("train", "val", "test")]
    assert bytes(np.concatenate(files).astype(np.uint8)).decode() == TEXT
    assert [len(ids) for ids in files] == [tokens.count(split) for split in tokens.splits]
    assert tokens.meta["split_rule"]["rule"] == "position"
    assert [len(tokens.document_ends(split)) for split in tokens.splits] == [1, 1, 1]
    assert tokens.bytes_per_token("val") == 1.0
    assert tokens.folder.parent == cache_root() / "tokens"


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe:400"])
def test_documents_come_back_whole(tokenizer: str, write: Write) -> None:
    source = open_source(write("a.csv", ROWS))
    tokens = prepare(source, tokenizer=tokenizer)
    read = []
    for split in tokens.splits:
        ids, start = tokens.ids(split), 0
        for end in tokens.document_ends(split).astype(int):
            assert ids[end - 1] == tokens.end_of_document
            read.append(tokens.tokenizer.decode(ids[start : end - 1]))
            start = end
        assert start == tokens.count(split) > 0
        assert tokens.maximum_id(split) == ids.max() < tokens.vocab_size
        assert tokens.meta["splits"][split]["utf8_bytes"] == sum(
            len(text.encode()) for text in read[-len(tokens.document_ends(split)) :]
        )
    assert sorted(read) == sorted(source.documents())
    assert tokens.meta["split_rule"]["rule"] == "hash"


@given(st.lists(st.lists(st.text("ab", max_size=3), min_size=1, max_size=3), max_size=6), st.booleans())
def test_any_documents_in_any_pieces(documents: list[list[str]], several: bool) -> None:
    pieces = [
        ("train", Piece(text, place == len(parts) - 1)) for parts in documents for place, text in enumerate(parts)
    ]
    ids, ends = io.BytesIO(), io.BytesIO()
    writer = SplitWriter(ids, ends, "uint16")
    for group in grouped(pieces):
        writer.add(group, encode_group(Bytes(), group, several))
    counts = writer.finish()
    whole = [text for parts in documents if (text := "".join(parts))]
    end = b"\xff" if several else b""
    assert np.frombuffer(ids.getvalue(), "<u2").astype(np.uint8).tobytes() == b"".join(t.encode() + end for t in whole)
    lengths = np.cumsum([len(text) + len(end) for text in whole])
    assert np.frombuffer(ends.getvalue(), "<u8").tolist() == lengths.tolist()
    assert counts["documents"] == len(whole)


def test_a_second_call_does_no_work(write: Write) -> None:
    path = write("a.txt", TEXT)
    calls: list[tuple[int, int | None]] = []
    first = prepare(path, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (len(TEXT), len(TEXT))
    calls.clear()
    assert prepare(path, progress=lambda done, total: calls.append((done, total))) == first
    assert not calls
    others = [
        prepare(path, tokenizer="chars"),
        prepare(path, val_fraction=0.2),
        prepare(path, limit=5000),
        prepare(write("a.txt", TEXT + "more\n")),
    ]
    assert len({tokens.folder for tokens in [first, *others]}) == 5
    assert sum(others[2].count(split) for split in others[2].splits) == 5000


def test_large_vocabularies_need_four_bytes(write: Write) -> None:
    text = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x1F000)]))
    tokens = prepare(write("a.txt", text), tokenizer="chars", val_fraction=0, test_fraction=0)
    assert tokens.meta["dtype"] == "uint32"
    assert tokens.splits == ("train",)
    assert tokens.tokenizer.decode(tokens.ids()) == text
    assert (tokens.folder / "train.bin").stat().st_size == 4 * len(text)


@pytest.mark.parametrize(("most", "every"), [(1 << 28, 1), (5000, 1), (1300, 4)])
def test_a_bpe_learns_from_all_the_text_or_from_pieces_of_all_of_it(
    most: int, every: int, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a corpus that is too large every k-th document, and no more than can be held."""
    path = write("a.jsonl", "".join(f'{{"text": "document {n:02} {"x" * 77}"}}\n' for n in range(40)))  # 101 bytes each
    learnt: list[str] = []

    def noted(spec: str, corpus: object, training: Callable[[], list[str]], several: bool) -> Bytes:
        learnt.extend(training())
        return Bytes()

    module = sys.modules["lowrank.data.text.prepare"]
    monkeypatch.setattr(module, "open_tokenizer", noted)
    monkeypatch.setattr(module, "BPE_BYTES", most)
    prepare(path, tokenizer="bpe:300", val_fraction=0, test_fraction=0)
    assert [int(text.split()[1]) for text in learnt] == list(range(0, 40, every))
    assert sum(map(len, learnt)) <= most


def test_prepared_folders_are_sources(write: Write) -> None:
    tokens = prepare(write("a.txt", TEXT), tokenizer="chars")
    assert prepare(tokens.folder) == tokens
    assert prepare(str(tokens.folder), tokenizer="chars") == tokens
    with pytest.raises(ValueError, match="made by tokenizer 'chars', not 'bytes'"):
        prepare(tokens.folder, tokenizer="bytes")
    with pytest.raises(ValueError, match="holds tokens already, so that val_fraction cannot apply"):
        prepare(tokens.folder, val_fraction=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "bpe:10"}, "at least 257"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"val_fraction": 2}, "below 1"),
        ({"column": "text"}, "plain text and has no columns"),
    ],
)
def test_wrong_options_are_refused_before_any_work(options: dict, message: str, write: Write) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(write("a.txt", TEXT), **options)
    assert not (cache_root() / "tokens").exists()


def test_too_little_text(write: Write) -> None:
    with pytest.raises(ValueError, match=r"the val split of .*a\.txt would be empty \(5 tokens in train\)"):
        prepare(write("a.txt", "words"), val_fraction=0.01, test_fraction=0)
    with pytest.raises(ValueError, match="holds no text"):
        prepare(write("a.jsonl", '{"text": ""}\n'))
    assert not [path for path in (cache_root() / "tokens").iterdir() if path.is_dir()]


def test_unknown_splits_are_named(write: Write) -> None:
    tokens = prepare(write("a.txt", TEXT), test_fraction=0)
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        tokens.ids("test")
    assert str(tokens).startswith("a: bytes, 256 ids, uint16, in ")
    assert "val" in str(tokens)


def test_ids_beyond_a_models_vocabulary(write: Write) -> None:
    tokens = prepare(write("a.txt", TEXT))
    check_vocabulary(tokens, 256)
    largest = max(TEXT.encode())
    with pytest.raises(
        ValueError, match=rf"token id {largest}, but the model's vocabulary ends at 64; .* vocab_size=256"
    ):
        check_vocabulary(tokens, 65)
    check_vocabulary(tokens, largest + 1)


# Progress


def test_progress_is_one_line_on_a_terminal_and_silent_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write: Write
) -> None:
    prepare(write("a.txt", TEXT))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show = bar_on_terminal(delay=0)
    show(10**6, 4 * 10**6)
    show(4 * 10**6, 4 * 10**6)
    shown = capsys.readouterr().err
    assert shown.startswith("\rtokenising")
    assert "4.00M/4.00M" in shown
    assert shown.count("\n") == 1


# Real data


def test_real_data(shared_data: Path) -> None:
    shakespeare = prepare(shared_data / "tinyshakespeare.txt", tokenizer="chars", val_fraction=0.1, test_fraction=0)
    assert shakespeare.vocab_size == 65  # as nanoGPT's
    assert shakespeare.count("train") + shakespeare.count("val") == 1_115_394
    news = prepare(shared_data / "cnn_dailymail_sample.csv", tokenizer="bpe:512", limit=400_000)
    assert news.vocab_size == 512
    assert sum(of["utf8_bytes"] for of in news.meta["splits"].values()) in range(399_997, 400_001)
    assert "CNN" in news.tokenizer.decode(news.ids("train")[:100])
