"""Sources of text: what is read is what is in the files, and what cannot be read says why."""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.data import list_sources, open_source, text_source
from lowrank.data.text.files import PIECE_BYTES, read_text
from lowrank.data.text.source import SOURCES, Piece, Source, encodable
from lowrank.data.text.tables import kind_of

Write = Callable[[str, str | bytes], Path]


# Files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'id,article,summary\n1,"one, ""quoted""\nline",x\n2,,y\n3,two,z\n'),
        ("a.tsv", 'id\tTEXT\n1\t"one, ""quoted""\nline"\n3\ttwo\n'),
        ("a.jsonl", '{"id": 1, "text": "one, \\"quoted\\"\\nline"}\n\n{"text": null}\n{"text": "two"}\n'),
        ("a.jsonl", '"one, \\"quoted\\"\\nline"\n"two"\n'),
        ("a.json.gz", gzip.compress(b'{"text": "one, \\"quoted\\"\\nline"}\n{"text": "two"}\n', mtime=0)),
    ],
)
def test_tables_give_a_document_a_row(name: str, content: str | bytes, write: Write) -> None:
    assert list(open_source(write(name, content)).documents()) == ['one, "quoted"\nline', "two"]


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.csv", "id;text\n1;a, b\n2;c\n", {}),
        ("a.csv", "id\ttext\n1\ta, b\n2\tc\n", {}),
        ("a.tsv", "id\ttext\n1\ta, b\n2\tc\n", {}),
        ("a.csv", "id|text\n1|a, b\n2|c\n", {}),
        ("a.csv", "no,a;words\n1;a, b\n2;c\n", {"delimiter": ";", "column": "words"}),
        ("a.csv", "lyrics\na, b\nc\n", {"delimiter": "\t"}),
    ],
)
def test_the_delimiter_is_found_or_told(name: str, content: str, options: dict[str, str], write: Write) -> None:
    assert list(open_source(write(name, content), **options).documents()) == ["a, b", "c"]


def test_a_damaged_parquet_is_named(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [f"row {n} " * 50 for n in range(5000)]}), tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:2000] = bytes(1996)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file, or damaged"):
        list(open_source(tmp_path / "a.parquet").documents())


def test_what_is_no_file_is_left_alone(write: Write, tmp_path: Path) -> None:
    write("f/a.txt", "A")
    os.mkfifo(tmp_path / "f" / "b.txt")
    assert list(open_source(tmp_path / "f").documents()) == ["A"]
    with pytest.raises(ValueError, match="is a pipe, socket or device, which cannot be read twice"):
        open_source(tmp_path / "f" / "b.txt")
    with pytest.raises(ValueError, match="one character that stands between the cells"):
        open_source(tmp_path / "f", delimiter=";")


def test_a_source_announces_itself() -> None:
    @text_source(name="made-here", about="two words", size="8 B", licence="none", needs_network=False)
    def made() -> Source:
        return Source(
            name="made-here", description="", fingerprint={}, splits={"train": lambda: iter([Piece("w", True)])}
        )

    try:
        assert list(open_source("made-here").documents()) == ["w"]
        assert "made-here" in {info.name for info in list_sources()}
        with pytest.raises(ValueError, match="'made-here' already"):
            text_source(name="made-here", about="", size="", licence="")(made)
    finally:
        del SOURCES["made-here"]


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"id": [1, 2, 3], "document": ["one", None, "two"], "length": [3, 0, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(open_source(tmp_path / "a.parquet").documents()) == ["one", "two"]
    with pytest.raises(
        ValueError, match=r"no column 'documents'; it has 'id', 'document', 'length' \(did you mean 'doc"
    ):
        open_source(tmp_path / "a.parquet", column="documents")
    with pytest.raises(ValueError, match="holds int, not text"):
        list(open_source(tmp_path / "a.parquet", column="length").documents())


def test_the_column_is_told_or_found(write: Write) -> None:
    path = write("a.csv", "one,two\na,b\n")
    assert list(open_source(path, column="two").documents()) == ["b"]
    with pytest.raises(ValueError, match="say which: column=… of 'one', 'two'"):
        open_source(path)
    assert list(open_source(write("b.csv", "lyrics\na\n")).documents()) == ["a"]
    with pytest.raises(ValueError, match="plain text and has no columns"):
        open_source(write("a.txt", "a"), column="two")
    with pytest.raises(ValueError, match="builtin has its own text column"):
        open_source("builtin", column="two")


@given(st.binary(max_size=30), st.lists(st.sampled_from(["word", "é\n", "\n", " \n\n", "𝄞", "\r\n"]), max_size=40))
def test_plain_text_is_lossless(head: bytes, words: list[str]) -> None:
    text = head.decode("utf-8", "ignore") + "".join(words)
    pieces = list(read_text(io.BytesIO(text.encode()), "made"))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("line", ["a line of words\n", "no line ends, é𝄞 only ", "\n\n", "x\r\n"])
def test_large_files_are_cut_into_pieces(line: str, write: Write) -> None:
    text = line * (3 * PIECE_BYTES // len(line.encode()))
    path = write("a.txt", text)
    pieces = list(open_source(path).pieces())
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) >= 3
    assert max(len(piece.text.encode()) for piece in pieces) <= 2 * PIECE_BYTES


def test_pieces_tokenise_like_the_whole(write: Write) -> None:
    from lowrank.data.text.tokenizers import train_bpe

    text = "".join(f"Paragraph {n} of words.\nAnd a line\n\n\n  indented\n" for n in range(12_000))
    tokenizer = train_bpe(400, [text[:100_000]])
    pieces = list(open_source(write("a.txt", text)).pieces())
    assert len(pieces) > 1
    assert [id for piece in pieces for id in tokenizer.encode(piece.text)] == tokenizer.encode(text)


def test_folders_are_read_in_order_and_tables_alone(write: Write, tmp_path: Path) -> None:
    write("f/b.txt", "B")
    write("f/a/deep.md", "A")
    write("f/.hidden.txt", "H")
    write("f/picture.png", b"\x89")
    assert list(open_source(tmp_path / "f").documents()) == ["A", "B"]
    write("f/data.jsonl", '{"text": "J"}\n')
    assert list(open_source(tmp_path / "f").documents()) == ["J"]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.txt", "val.txt", "test.txt"], {"train", "val", "test"}),
        (["c4-train.00000-of-00002.txt", "c4-validation.00000.txt"], {"train", "val"}),
        (["train/a.txt", "train/b.txt", "dev/a.txt"], {"train", "val"}),
        (["train.txt", "other.txt"], {"train"}),
        (["val.txt", "test.txt"], {"train"}),
    ],
)
def test_names_make_splits_when_every_file_has_one(names: list[str], splits: set[str], write: Write) -> None:
    for name in names:
        root = write(f"f/{name}", name)
    while root.name != "f":
        root = root.parent
    source = open_source(root)
    assert set(source.splits) == splits
    for split in splits - {"train"}:
        assert all(open_source(root).pieces(split))
    if splits == {"train"}:
        assert len(list(source.documents())) == len(names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", r"not UTF-8: byte 0xe9 at 3.*iconv"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"line 2: not JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"line 2: list; each line must be an object"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b", "id": 1}\n', r"line 2: no 'text', only 'txt', 'id'"),
        ("a.csv", b"id,text\n1,caf\xe9\n", r"a\.csv is not UTF-8 \(byte 0xe9\); convert it"),
        ("a.csv", b"\xff\xfei\x00d\x00", r"a\.csv is not UTF-8 \(byte 0xff\)"),
        ("a.parquet", "not a table of any kind", r"a\.parquet is not a Parquet file"),
        ("a.csv", "id,text\n1,a\n2\n", r"line 3: 1 cells, but the header has 2"),
        ("a.csv", "id,text\n1,a, b\n", r"line 2: 3 cells, but the header has 2 \('id', 'text'\); put .* into quotes"),
        ("a.csv", 'id,text\n1,"a\nb"\n2,"oops\n3,c\n', r"line 4: unexpected end of data; .* must end with one"),
        ("a.csv", 'id,text\n1,"a" b\n', r"line 2: ',' expected after '\"'"),
        ("a.csv", "text,text\na,b\n", r"2 columns 'text', and one is wanted"),
        ("a.csv", "Text,text\na,b\n", r"2 columns 'Text', and one is wanted"),
        ("a.csv", "id;words\n1;a\n", r"say which: column=… of 'id', 'words'"),
        ("a.csv", "lyrics\none, two\n", r"line 2: 2 cells, but the header has 1"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', r"line 1: not JSON \(an object has 'text' twice\)"),
        ("a.jsonl", "[" * 100_000, r"line 1: not JSON"),
        ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:20], r"a\.txt\.gz is cut short or damaged"),
        ("a.csv.gz", gzip.compress(b"text\n" + b"a\n" * 1000, mtime=0)[:-9], r"a\.csv\.gz is cut short or damaged"),
        ("a.jsonl.gz", b"\x1f\x8b no gzip", r"a\.jsonl\.gz is cut short or damaged"),
    ],
)
def test_damaged_files_name_the_place(name: str, content: str | bytes, message: str, write: Write) -> None:
    with pytest.raises(ValueError, match=message):
        list(open_source(write(name, content)).documents())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", ".txt"),
        ("a.TXT.GZ", ".txt"),
        ("v1.2.Jsonl", ".jsonl"),
        ("v1.2.csv.gz", ".csv"),
        ("a.gz", ".gz"),
        ("a", ""),
    ],
)
def test_the_kind_of_a_file_is_its_suffix_before_gz(name: str, kind: str) -> None:
    assert kind_of(Path(name)) == kind


def test_sizes_are_of_the_text_roughly(write: Write) -> None:
    write("set/a.txt", "x" * 1000)
    whole = gzip.compress(b"y" * 1000, mtime=0)
    folder = write("set/b.txt.gz", whole).parent
    assert open_source(folder).size_bytes == 1000 + 3 * len(whole)


def test_what_is_not_there_or_not_text(write: Write, tmp_path: Path) -> None:
    write("corpus.txt", "a")
    with pytest.raises(FileNotFoundError, match=r"corpos\.txt.*has corpus\.txt .*sources: builtin, tiny-shakespeare"):
        open_source(tmp_path / "corpos.txt")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        open_source(tmp_path / "nowhere" / "a.txt")
    with pytest.raises(FileNotFoundError, match="did you mean 'openwebtext'"):
        open_source("openwebtxt")
    with pytest.raises(ValueError, match="is empty"):
        open_source(write("empty.txt", ""))
    readable = r"\.txt \.md \.csv \.tsv \.jsonl \.ndjson \.json \.parquet \(also \.gz\), or a folder of them$"
    with pytest.raises(ValueError, match=rf"a\.pdf is none of the files that can be read: {readable}"):
        open_source(write("a.pdf", "a"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no text files: found nothing"):
        open_source(tmp_path / "nothing")


def test_fingerprints_follow_the_content(write: Write) -> None:
    before = open_source(write("a.txt", "one")).fingerprint
    assert open_source(write("b/a.txt", "one")).fingerprint == before
    assert open_source(write("a.txt", "two")).fingerprint != before


def test_lone_surrogates_become_encodable(write: Write) -> None:
    assert list(open_source(write("a.jsonl", '{"text": "a\\ud83d b"}\n')).documents()) == ["a\ufffd b"]
    assert encodable("\ud834\udd1e") == "𝄞"


def test_the_real_sample(shared_data: Path) -> None:
    source = open_source(shared_data / "cnn_dailymail_sample.csv")
    documents = list(source.documents())
    assert len(documents) == 1000
    assert documents[0].startswith("(CNN)Share, and your gift will be multiplied.")
    text = "".join(open_source(shared_data / "tinyshakespeare.txt").documents())
    assert text.encode() == (shared_data / "tinyshakespeare.txt").read_bytes()


# Documents in plain text, JSON arrays, and what `datasets` saves


def test_plain_text_may_hold_documents(write: Write) -> None:
    lines = write("a.txt", "one\ntwo\n\nthree\n")
    assert list(open_source(lines).documents()) == ["one\ntwo\n\nthree\n"]
    assert list(open_source(lines, separator="\\n").documents()) == ["one", "two", "three"]
    marked = write("b.txt", "a b<|endoftext|>c\nd<|endoftext|>")
    assert list(open_source(marked, separator="<|endoftext|>").documents()) == ["a b", "c\nd"]
    assert open_source(lines).fingerprint != open_source(lines, separator="\\n").fingerprint
    with pytest.raises(ValueError, match="a table, whose rows are its documents"):
        open_source(write("c.jsonl", '{"text": "x"}'), separator="\\n")


def test_a_separator_is_found_across_pieces(write: Write) -> None:
    documents = ["x" * (PIECE_BYTES - 3), "y" * (2 * PIECE_BYTES), "z"]
    path = write("a.txt", "<|end|>".join(documents))
    assert list(open_source(path, separator="<|end|>").documents()) == documents


def test_an_array_and_a_saved_data_set_are_tables(write: Write, tmp_path: Path) -> None:
    rows = [{"text": "one", "n": 1}, {"text": "two", "n": 2}]
    assert list(open_source(write("a.json", json.dumps(rows, indent=1))).documents()) == ["one", "two"]
    with pytest.raises(ValueError, match=r"a\.json: not JSON"):
        list(open_source(write("b/a.json", "[1,")).documents())
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    parts = {"train": datasets.Dataset.from_list(rows), "validation": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert list(open_source(tmp_path / "saved").documents()) == ["one", "two"]
    assert list(open_source(tmp_path / "both").documents("val")) == ["one"]
