"""One document a sequence, prepared or streamed: padded and cut as published, a function of (seed, n)."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank.data import Documents, EvaluationRows, ShuffledRows, Streamed, Tokens, prepare
from lowrank.data.text.source import Piece, Source
from lowrank.data.text.tokenizers import Bytes, Tokenizer, train_bpe

Batch = dict[str, Tensor]


def joined(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels")}


@pytest.fixture
def rows(tmp_path: Path) -> Tokens:
    """300 documents, the nth of them n characters and then its end (0xFF)."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{chr(97 + n % 26) * (1 + n % 12)}"}}\n' for n in range(300)))
    return prepare(path, val_fraction=0, test_fraction=0)


def test_a_document_is_padded_or_cut_as_published(rows: Tokens) -> None:
    batch = joined(list(EvaluationRows(Documents(rows, "train", 8), 7)))
    assert batch["input_ids"].shape == (300, 8)
    for n, (inputs, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
        letters, length = 97 + n % 26, 1 + n % 12
        sequence = ([letters] * length + [0xFF])[:8]
        sequence[-1] = 0xFF  # also where the document was cut
        assert inputs == sequence + [0] * (8 - len(sequence))
        assert labels == sequence[1:] + [-100] * (9 - len(sequence))


def test_an_epoch_of_documents_visits_each_once(rows: Tokens) -> None:
    source = ShuffledRows(Documents(rows, "train", 16), 10, seed=0)
    assert source.batches_per_epoch == 30
    lengths = [
        Counter((joined([source.batch(n + 30 * e) for n in range(30)])["labels"] != -100).sum(1).tolist())
        for e in (0, 1)
    ]
    assert lengths[0] == lengths[1] == Counter(1 + n % 12 for n in range(300))
    assert not torch.equal(source.batch(0)["input_ids"], source.batch(30)["input_ids"])
    assert torch.equal(
        source.batch(41)["input_ids"], ShuffledRows(Documents(rows, "train", 16), 10, seed=0).batch(41)["input_ids"]
    )
    parts = [ShuffledRows(Documents(rows, "train", 16), 10, seed=0, rank=rank, ranks=3).batch(7) for rank in range(3)]
    assert torch.equal(joined(parts)["input_ids"], source.batch(7)["input_ids"])


def test_part_of_the_documents_and_by_ranks(rows: Tokens) -> None:
    assert len(EvaluationRows(Documents(rows, "train", 8), 7)) == 43
    assert len(EvaluationRows(Documents(rows, "train", 8), 7, limit=3)) == 3
    whole = EvaluationRows(Documents(rows, "train", 8), 7)
    parts = [EvaluationRows(Documents(rows, "train", 8), 7, rank=rank, ranks=2).batch(42) for rank in range(2)]
    assert torch.equal(joined(parts)["input_ids"], whole.batch(42)["input_ids"])
    with pytest.raises(IndexError, match="batch 43 of 43"):
        whole.batch(43)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        ShuffledRows(Documents(rows, "train", 1), 7, seed=0)


# Streamed


def stream(documents: int = 100, reads: list[int] | None = None) -> Source:
    def reading() -> Iterator[Piece]:
        for n in range(documents):
            if reads is not None:
                reads.append(n)
            yield Piece(f"document {n} " + "word " * (n % 9), True)

    return Source(name="stream", description="a stream", fingerprint={}, splits={"train": reading})


@pytest.mark.parametrize("packed", [False, True])
def test_a_stream_is_a_function_of_seed_and_number(packed: bool) -> None:
    def made(seed: int = 0, **ranks: int) -> Streamed:
        return Streamed(stream(), Bytes(), "train", 16, 6, seed, packed=packed, shuffle_documents=20, **ranks)

    source = made()
    batches = [source.batch(n) for n in range(60)]  # more than one epoch
    assert batches[0]["input_ids"].shape == (6, 16)
    resumed = made()
    for n in (31, 32, 4, 5, 59):
        assert torch.equal(resumed.batch(n)["input_ids"], batches[n]["input_ids"])
        assert torch.equal(resumed.batch(n)["labels"], batches[n]["labels"])
    assert not torch.equal(made(seed=1).batch(0)["input_ids"], batches[0]["input_ids"])
    parts = [made(rank=rank, ranks=4).batch(3) for rank in range(4)]
    assert torch.equal(joined(parts)["labels"], batches[3]["labels"])


def test_an_epoch_of_a_stream_has_every_document_once() -> None:
    source = Streamed(stream(), Bytes(), "train", 80, 10, 0, shuffle_documents=30)
    epochs = [joined([source.batch(n + 10 * epoch) for n in range(10)])["input_ids"] for epoch in (0, 1)]
    texts = [sorted(bytes(row[row > 0].tolist()[:-1]).decode() for row in epoch) for epoch in epochs]
    assert texts[0] == texts[1] == sorted(stream().documents())
    assert not torch.equal(epochs[0], epochs[1])
    in_order = Streamed(stream(), Bytes(), "train", 80, 10, 0, shuffle_documents=1)
    first = in_order.batch(0)["input_ids"][0]
    assert bytes(first[first > 0].tolist()[:-1]).decode() == "document 0 "


def test_packed_windows_follow_each_other_without_a_gap() -> None:
    source = Streamed(stream(), Bytes(), "train", 16, 4, 0, packed=True, shuffle_documents=1)
    batches = joined([source.batch(n) for n in range(20)])
    expected = b"".join(text.encode() + b"\xff" for text in stream().documents())
    assert bytes(batches["input_ids"].flatten().tolist()) == expected[: 20 * 4 * 16]
    assert bytes(batches["labels"].flatten().tolist()) == expected[1 : 20 * 4 * 16 + 1]


def test_resuming_a_stream_skips_without_tokenising() -> None:
    class Counted(Bytes):
        encoded = 0

        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:  # type: ignore[override]
            Counted.encoded += len(texts)
            return super().encode_batch(texts)

    Streamed(stream(), Counted(), "train", 16, 5, 0, shuffle_documents=1).batch(15)
    assert Counted.encoded == 5


def test_streams_check_ids_and_say_what_they_cannot() -> None:
    bpe = train_bpe(300, list(stream().documents()))
    with pytest.raises(
        ValueError, match=r"has token id 2\d\d, but the model's vocabulary ends at 63; .*vocab_size=300"
    ):
        Streamed(stream(), bpe, "train", 16, 4, 0, vocab_size=64).batch(0)
    Streamed(stream(), bpe, "train", 16, 4, 0, vocab_size=300).batch(0)
    with pytest.raises(ValueError, match="say steps instead of epochs"):
        _ = Streamed(stream(), bpe, "train", 16, 4, 0).batches_per_epoch
    with pytest.raises(ValueError, match="holds no text"):
        Streamed(stream(0), bpe, "train", 16, 4, 0).batch(0)
    with pytest.raises(ValueError, match="no split 'val' of its own"):
        Streamed(stream(), bpe, "val", 16, 4, 0).batch(0)
    with pytest.raises(ValueError, match="shuffle_documents must be at least 1"):
        Streamed(stream(), bpe, "train", 16, 4, 0, shuffle_documents=0)
    endless: Tokenizer = train_bpe(300, ["a"])
    endless.end_of_document = None
    with pytest.raises(ValueError, match="no id that ends a document"):
        Streamed(stream(), endless, "train", 16, 4, 0, packed=True)
