"""Batches: a function of (seed, n) alone, every window once an epoch, every token scored once, ranks disjoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowrank.data import Tokens, Windows, evaluation_batches
from lowrank.data.text.batches import Share, permuted, spread

Batch = dict[str, Tensor]


def counting(folder: Path, count: int, **splits: int) -> Tokens:
    """Tokens 0, 1, 2, … in nanoGPT's format, so that an id is its own place."""
    folder.mkdir(exist_ok=True)
    for split, tokens in {"train": count, **splits}.items():
        np.arange(tokens, dtype=np.uint16).tofile(folder / f"{split}.bin")
    return Tokens.load(folder)


def in_memory(count: int) -> Tokens:
    """The same without files, for hundreds of examples."""
    unknown = {"documents": None, "utf8_bytes": None, "maximum_id": None}
    meta = {
        "format": "nanogpt",
        "dtype": "uint16",
        "tokenizer": {"spec": "gpt2", "vocab_size": 50257, "end_of_document": 50256},
        "source": {"name": "made"},
        "splits": {"train": {"tokens": count, **unknown}},
    }
    made = Tokens(folder=Path(), meta=meta)
    made._cache["ids", "train"] = np.arange(count, dtype=np.uint16)
    return made


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return counting(tmp_path / "tokens", 1000, val=101)


def joined(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels")}


# Training windows


def test_labels_are_what_follows(tokens: Tokens) -> None:
    batch = Windows(tokens, "train", 16, 4, seed=0).batch(3)
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)
    assert torch.equal(batch["input_ids"], batch["input_ids"][:, :1] + torch.arange(16))


@given(st.integers(18, 300), st.integers(1, 17), st.integers(0, 5))
def test_an_epoch_visits_every_window_once(count: int, context: int, seed: int) -> None:
    number = Windows(in_memory(count), "train", context, 1, seed).batches_per_epoch
    epochs = Windows(in_memory(count), "train", context, number, seed)
    assert epochs.batches_per_epoch == 1
    for epoch in range(3):
        starts = epochs.batch(epoch)["input_ids"][:, 0].tolist()
        offset = min(starts)
        assert sorted(starts) == [offset + context * n for n in range(number)]
        assert offset < max(context, 2)
        assert max(starts) + context < count
        assert count - number * context < 2 * context + 1


def test_batches_depend_on_seed_and_number_alone(tokens: Tokens) -> None:
    first = Windows(tokens, "train", 8, 4, seed=1)
    order = [first.batch(n)["input_ids"] for n in (0, 5, 70, 5)]
    again = Windows(tokens, "train", 8, 4, seed=1)
    assert torch.equal(again.batch(70)["input_ids"], order[2])
    assert torch.equal(again.batch(5)["input_ids"], order[1])
    assert torch.equal(order[1], order[3])
    assert not torch.equal(Windows(tokens, "train", 8, 4, seed=2).batch(5)["input_ids"], order[1])
    one, two = (
        torch.cat([first.batch(n + e * first.batches_per_epoch)["input_ids"] for n in range(3)]) for e in (0, 1)
    )
    assert not torch.equal(one, two)


def test_offsets_change_between_epochs(tokens: Tokens) -> None:
    windows = Windows(tokens, "train", 50, 1, seed=0)
    offsets = {int(windows.batch(e * windows.batches_per_epoch)["input_ids"][0, 0]) % 50 for e in range(40)}
    assert len(offsets) > 15


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_share_the_same_global_batch(ranks: int, tokens: Tokens) -> None:
    whole = Windows(tokens, "train", 8, 7, seed=3)
    for n in (0, 1, 40):
        parts = [Windows(tokens, "train", 8, 7, seed=3, rank=rank, ranks=ranks).batch(n) for rank in range(ranks)]
        assert torch.equal(joined(parts)["input_ids"], whole.batch(n)["input_ids"])
        assert torch.equal(joined(parts)["labels"], whole.batch(n)["labels"])


def test_a_corpus_of_one_window(tmp_path: Path) -> None:
    windows = Windows(counting(tmp_path, 9), "train", 8, 3, seed=0)
    assert windows.batches_per_epoch == 1
    assert windows.batch(4)["input_ids"].tolist() == [list(range(8))] * 3


def test_a_corpus_too_short_for_a_window(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"8 tokens, too few for one window of context 8 .* context of at most 7"):
        Windows(counting(tmp_path, 8), "train", 8, 3, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rank": 4, "ranks": 4}, "rank must be in 0 … 3 for ranks=4, not 4"),
        ({"batch_size": 2, "ranks": 3}, "does not go round 3 ranks"),
        ({"split": "test"}, "no split 'test'; it has train, val"),
    ],
)
def test_wrong_sizes(options: dict, message: str, tokens: Tokens) -> None:
    with pytest.raises(ValueError, match=message):
        Windows(**{"tokens": tokens, "split": "train", "context": 8, "batch_size": 4, "seed": 0, **options})


@given(st.integers(1, 3000), st.integers(0, 2**62), st.integers(0, 100))
def test_permutations_permute(size: int, seed: int, epoch: int) -> None:
    result = permuted(np.arange(size, dtype=np.uint64), size, (seed, epoch))
    assert sorted(result.tolist()) == list(range(size))


def test_permutations_look_random() -> None:
    """Where neighbours land is uncorrelated, every place is reached alike, about one place is a fixed point."""
    size = 1000
    drawn = np.stack([permuted(np.arange(size, dtype=np.uint64), size, (0, epoch)) for epoch in range(200)]).astype(
        float
    )
    correlation = np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]
    assert abs(correlation) < 0.01  # 200,000 pairs: one sigma is 0.0022
    assert abs(drawn.mean(0) - (size - 1) / 2).max() < 5 * size / np.sqrt(12 * 200)
    assert 0.6 < (drawn == np.arange(size)).sum(1).mean() < 1.4


def test_permutations_of_huge_ranges_need_no_memory() -> None:
    result = permuted(np.arange(1000, dtype=np.uint64), 2**50 + 1, (7, 0))
    assert len(set(result.tolist())) == 1000
    assert result.max() < 2**50 + 1


@given(st.integers(1, 50), st.integers(1, 12))
def test_shares_are_even_and_complete(batch_size: int, ranks: int) -> None:
    if batch_size < ranks:
        return
    shares = [Share(batch_size=batch_size, rank=rank, ranks=ranks).rows() for rank in range(ranks)]
    taken = [row for share in shares for row in range(batch_size)[share]]
    assert taken == list(range(batch_size))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


# Evaluation


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 9))
def test_every_token_is_scored_once(count: int, context: int, batch_size: int) -> None:
    batches = evaluation_batches(in_memory(count), "train", context, batch_size)
    assert len(list(batches)) == len(batches)
    all_rows = joined(list(batches))
    scored = all_rows["labels"] != -100
    assert all_rows["labels"][scored].tolist() == list(range(1, count))
    assert all_rows["input_ids"][scored].tolist() == list(range(count - 1))
    assert all_rows["input_ids"].shape[1] == context
    assert (~scored).sum() < context


def test_a_limit_is_a_fixed_part_spread_over_the_split(tokens: Tokens) -> None:
    batches = evaluation_batches(tokens, "train", 10, 4, limit=5)
    assert len(batches) == 5
    starts = joined(list(batches))["input_ids"][:, 0]
    assert starts.tolist() == [10 * (n * 100 // 20) for n in range(20)]
    assert torch.equal(batches.batch(2)["labels"], list(batches)[2]["labels"])
    assert len(evaluation_batches(tokens, "train", 10, 4, limit=500)) == 25
    assert spread(3, 2, None).tolist() == [0, 1, 2]


def test_ranks_evaluate_disjoint_rows(tokens: Tokens) -> None:
    labels: list[int] = []
    for rank in range(3):
        for batch in evaluation_batches(tokens, "val", 8, 4, rank=rank, ranks=3):
            labels += batch["labels"][batch["labels"] != -100].tolist()
    assert sorted(labels) == list(range(1, 101))


def test_evaluation_of_nearly_nothing(tmp_path: Path) -> None:
    batches = evaluation_batches(counting(tmp_path / "two", 2), "train", 8, 4)
    assert batches.batch(0)["labels"].tolist() == [[1] + [-100] * 7]
    with pytest.raises(IndexError, match="batch 1 of 1"):
        batches.batch(1)
    with pytest.raises(ValueError, match="at least 2"):
        evaluation_batches(counting(tmp_path / "one", 1), "train", 8, 4)
    with pytest.raises(ValueError, match="limit must be at least 1 batch"):
        evaluation_batches(counting(tmp_path / "two", 2), "train", 8, 4, limit=0)
