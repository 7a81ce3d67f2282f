"""Folders of tokens that nanoGPT made are read as they are, and no pickle is opened."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lowrank.data import Tokens, check_vocabulary, prepare
from lowrank.data.text.tokenizers import train_bpe

Write = Callable[[str, str | bytes], Path]
TEXT = "".join(f"The {n}th line of a text that is long enough.\n" for n in range(500))


def nanogpt(folder: Path, text: str, **extra: bytes) -> Path:
    folder.mkdir()
    characters = sorted(set(text))
    ids = np.array([characters.index(character) for character in text], np.uint16)
    ids[: len(ids) * 9 // 10].tofile(folder / "train.bin")
    ids[len(ids) * 9 // 10 :].tofile(folder / "val.bin")
    for name, content in extra.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder


def test_nanogpt_shakespeare_char_without_opening_the_pickle(tmp_path: Path) -> None:
    bomb = b"cos\nsystem\n(S'false'\ntR."
    folder = nanogpt(tmp_path / "shakespeare_char", TEXT, meta_pkl=bomb, input_txt=TEXT.encode())
    tokens = prepare(folder)
    assert tokens.splits == ("train", "val")
    assert tokens.tokenizer.decode(tokens.ids("val")) == TEXT[len(TEXT) * 9 // 10 :]
    assert tokens.vocab_size == len(set(TEXT))
    (folder / "input.txt").unlink()
    with pytest.raises(ValueError, match=r"meta\.pkl, a pickle, .* put nanoGPT's input\.txt beside it"):
        _ = Tokens.load(folder).tokenizer
    with pytest.raises(ValueError, match="does not record where documents end"):
        Tokens.load(folder).document_ends()


def test_nanogpt_gpt2_tokens(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "openwebtext", TEXT)
    np.array([5, 6, 50256, 7, 50256, 8], np.uint16).tofile(folder / "train.bin")
    tokens = Tokens.load(folder)
    assert tokens.meta["tokenizer"]["spec"] == "gpt2"
    assert (tokens.vocab_size, tokens.end_of_document, tokens.maximum_id()) == (50257, 50256, 50256)
    assert tokens.document_ends().tolist() == [3, 5, 6]
    assert tokens.bytes_per_token() is None
    with pytest.raises(ValueError, match="token id 50256"):
        check_vocabulary(tokens, 50000)
    (folder / "val.bin").write_bytes(b"odd")
    with pytest.raises(ValueError, match=r"val\.bin has 3 bytes"):
        Tokens.load(folder)


def test_nanogpt_tokens_of_a_told_tokenizer(tmp_path: Path) -> None:
    bpe = train_bpe(300, [TEXT])
    (tmp_path / "tokenizer").mkdir()
    bpe.save(tmp_path / "tokenizer")
    folder = tmp_path / "tokens"
    folder.mkdir()
    np.array(bpe.encode(TEXT), np.uint16).tofile(folder / "train.bin")
    tokens = prepare(folder, tokenizer=str(tmp_path / "tokenizer"))
    assert tokens.vocab_size == 300
    assert tokens.tokenizer.decode(tokens.ids()) == TEXT


def test_no_tokens_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither meta\.json nor train\.bin"):
        Tokens.load(tmp_path)
