"""Text to ids and back: every tokenizer keeps the text, saves without pickle and loads without network."""

import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.data.text.tokenizers import (
    SAVED,
    Bytes,
    Characters,
    Tokenizer,
    check_tokenizer_spec,
    load_tokenizer,
    open_tokenizer,
    pretrained_tokenizer,
    tokenizer_fingerprint,
    train_bpe,
)

LINES = [f"The {a} {b} sat on the mat, said {a}. Ünïcödé {i}\n" for i, (a, b) in enumerate([("cat", "dog")] * 50)]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
BPE = train_bpe(300, LINES)


def opened(spec: str, several: bool = True) -> Tokenizer:
    return open_tokenizer(spec, lambda: LINES, lambda: LINES, several)


@given(TEXTS)
def test_bytes_keep_every_text(text: str) -> None:
    tokenizer = Bytes()
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids


@given(TEXTS)
def test_bpe_keeps_every_text(text: str) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert all(0 <= id < BPE.vocab_size for id in ids)


@given(st.text("abc é\n", max_size=40))
def test_characters_keep_texts_of_their_alphabet(text: str) -> None:
    tokenizer = Characters("cba é\n", True)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_characters_are_numbered_in_code_point_order() -> None:
    tokenizer = Characters("hello world", False)
    assert tokenizer.characters == " dehlorw"
    assert tokenizer.vocab_size == 8
    assert tokenizer.end_of_document is None
    assert tokenizer.encode("hello") == [3, 2, 4, 4, 5]


def test_an_unknown_character_is_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"'z'.*'bytes' or 'bpe:N'"):
        Characters("abc", False).encode("az")
    with pytest.raises(ValueError, match="'\U0001f600'"):
        Characters("abc", False).encode("\U0001f600")


@pytest.mark.parametrize("spec", ["bytes", "chars", "bpe:300"])
def test_saved_tokenizers_load_the_same(spec: str, tmp_path: Path) -> None:
    tokenizer = opened(spec)
    assert tokenizer.spec == spec
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.spec == spec
    assert again.described() == tokenizer.described()
    assert again.encode(LINES[3]) == tokenizer.encode(LINES[3])
    assert again.decode(again.encode(LINES[3])) == LINES[3]
    assert tokenizer.end_of_document is not None
    assert again.decode([tokenizer.end_of_document]) == "<|endoftext|>"
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}


def test_transformers_reads_a_saved_bpe(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    BPE.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs(LINES[0])["input_ids"] == BPE.encode(LINES[0])
    assert (theirs.eos_token_id, len(theirs)) == (BPE.end_of_document, 300)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"needs tokenizers: pip install 'lowrank-training\[text\]'"):
        train_bpe(300, LINES)


def test_bpe_training_is_deterministic_and_merges() -> None:
    again = train_bpe(300, LINES)
    assert again.backend.to_str() == BPE.backend.to_str()
    assert len(BPE.encode("the cat")) < len("the cat")
    assert BPE.vocab_size == 300


def test_training_a_bpe_passes_errors_on_and_hears_ctrl_c() -> None:
    def failing() -> Iterator[str]:
        yield LINES[0]
        raise ValueError("line 2 is not JSON")

    with pytest.raises(ValueError, match="line 2 is not JSON"):
        train_bpe(300, failing())

    def endless() -> Iterator[str]:
        for n in itertools.count():
            if n == 1000:
                os.kill(os.getpid(), signal.SIGINT)
            yield LINES[0]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            train_bpe(300, endless())
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_text_that_spells_a_special_token_does_not_become_one() -> None:
    ids = BPE.encode("a<|endoftext|>b")
    assert BPE.end_of_document not in ids
    assert BPE.decode(ids) == "a<|endoftext|>b"


def test_a_folder_with_only_a_tokenizer_json(tmp_path: Path) -> None:
    BPE.backend.save(str(tmp_path / "tokenizer.json"))
    for spec in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        tokenizer = pretrained_tokenizer(spec)
        assert tokenizer.end_of_document == BPE.end_of_document
        assert tokenizer.encode(LINES[0]) == BPE.encode(LINES[0])
        assert (tokenizer.spec, tokenizer.vocab_size) == (spec, 300)


def test_the_end_of_a_document_comes_from_the_configuration(tmp_path: Path) -> None:
    BPE.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert pretrained_tokenizer(str(tmp_path)).end_of_document == BPE.backend.token_to_id("a")


def test_a_folder_saved_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=BPE.backend, eos_token="<|endoftext|>")
    made.save_pretrained(str(tmp_path))
    tokenizer = pretrained_tokenizer(str(tmp_path))
    assert tokenizer.end_of_document == BPE.end_of_document
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_a_tokenizer_of_transformers_without_tokenizer_json(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.ByT5Tokenizer().save_pretrained(str(tmp_path / "byt5"))
    tokenizer = pretrained_tokenizer(str(tmp_path / "byt5"))
    assert tokenizer.kind == "transformers"
    assert tokenizer.end_of_document == 1
    assert tokenizer.encode("né") == [byte + 3 for byte in "né".encode()]
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.encode("né </s>") == tokenizer.encode("né </s>")
    assert again.end_of_document not in again.encode("né </s>")
    assert again.decode(again.encode("né </s>")) == "né </s>"
    assert again.described() == tokenizer.described()


@pytest.mark.parametrize("spec", ["bpe", "bpe:", "bpe:x", "bpe:256", "bpe:-5", "bytes:3"])
def test_a_wrong_specification_says_what_is_right(spec: str) -> None:
    with pytest.raises(ValueError, match=r"bpe:"):
        check_tokenizer_spec(spec)


def test_neither_a_kind_nor_a_folder_nor_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")

    def refuse(name: str, **options: object) -> None:
        raise OSError(f"{name} is not a local folder\nand more")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(OSError, match=r"neither bytes, chars or bpe:N, nor a folder.*not a local folder$"):
        pretrained_tokenizer("charz")
    with pytest.raises(FileNotFoundError, match="no saved tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        pretrained_tokenizer(str(tmp_path))
    (tmp_path / SAVED).write_text('{"kind": "morse"}')
    with pytest.raises(ValueError, match="'morse'"):
        load_tokenizer(tmp_path)


def test_a_fingerprint_follows_the_content(tmp_path: Path) -> None:
    BPE.backend.save(str(tmp_path / "tokenizer.json"))
    before = tokenizer_fingerprint(str(tmp_path))
    train_bpe(290, LINES).backend.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_fingerprint(str(tmp_path)) != before
    assert tokenizer_fingerprint("bpe:300") == "bpe:300"


def test_batches_equal_single_texts() -> None:
    for tokenizer in (Bytes(), opened("chars"), BPE):
        for text, ids in zip(LINES, tokenizer.encode_batch(LINES), strict=True):
            assert ids.dtype.kind == "u"
            assert np.array_equal(ids, tokenizer.encode(text))
