"""Two ranks against one process with everything: law 3, what is said and when, and what ranks refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import mlp
from tests.ranks.launch import launch
from tests.ranks.worker import SCENARIOS, lte, tiny_run, trained

import lowrank
from lowrank.infra import checkpoint
from lowrank.infra.ranks import ring_gather_bytes, ring_sum_bytes
from lowrank.infra.record import read_log
from lowrank.run import Run
from lowrank.traffic import forecast, merge_words
from lowrank.train import train

RANKS = 2
TRAINED = [name for name, (function, _) in SCENARIOS.items() if getattr(function, "func", None) is trained]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank has found."""
    results = launch("tests.ranks.worker", str(folder), ranks=RANKS, LOWRANK_CACHE=str(folder / "cache"))
    assert [code for code, _ in results] == [0] * RANKS, "\n".join(error for _, error in results)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(RANKS)]


def flat(nest: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(nest, torch.Tensor):
        return {path: nest}
    return {name: t for key, value in nest.items() for name, t in flat(value, f"{path}/{key}").items()}


# --- law 3 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TRAINED if SCENARIOS[name][1]])
def test_ranks_equal_one_process_on_the_same_batches(name: str, found: list[dict[str, Any]]) -> None:
    """Weights, factors of all heads, optimizer state and the function: R × H heads are 1 × R·H heads."""
    alone = SCENARIOS[name][0](None)
    for rank in range(RANKS):
        theirs = found[rank][name]
        for part in ("state", "moments"):
            mine, others = flat(alone[part]), flat(theirs[part])
            assert mine.keys() == others.keys()
            for key, tensor in mine.items():
                torch.testing.assert_close(others[key], tensor, rtol=1e-7, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
        torch.testing.assert_close(theirs["output"], alone["output"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", TRAINED)
def test_the_whole_model_is_bitwise_the_same_on_all_ranks(name: str, found: list[dict[str, Any]]) -> None:
    one, other = (found[rank][name] for rank in range(RANKS))
    assert all(torch.equal(tensor, other["state"][key]) for key, tensor in one["state"].items())
    assert torch.equal(one["output"], other["output"])


@pytest.mark.parametrize("name", ["lte", "lte-reset", "lte-dense", "lte-uneven", "lte-train", "explorers"])
def test_weights_are_bitwise_the_same_at_every_step(name: str, found: list[dict[str, Any]]) -> None:
    one, other = (found[rank][name]["own"]["weights"] for rank in range(RANKS))
    for mine, theirs in zip(one, other, strict=True):
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


# --- what is said, and when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lte", "lte-reset", "lte-dense", "lte-uneven", "lte-local"])
def test_nothing_is_said_between_merges(name: str, found: list[dict[str, Any]]) -> None:
    said = found[0][name]["own"]["said"]
    assert [collectives > 0 for collectives, _ in said] == [False, False, True, False, False, True, False]


def test_bytes_of_a_merge_are_those_of_factors_or_of_dense_sums(found: list[dict[str, Any]]) -> None:
    numbers = [2 * (10 + 14), 2 * (14 + 14)]  # of one head's factors of rank 2, on fc1 and fc2
    finite = ring_gather_bytes(4, RANKS)  # each rank says whether its numbers are finite
    factors = found[0]["lte"]["own"]["said"][2][1]
    assert factors == ring_gather_bytes(8 * sum(numbers), RANKS) + finite
    dense = found[0]["lte-dense"]["own"]["said"][2][1]
    assert dense == ring_sum_bytes(8 * (10 * 14 + 14 * 14), RANKS) + finite


@pytest.mark.parametrize("name", ["lte", "lte-dense", "lte-uneven", "lte-local", "explorers", "galore", "full"])
def test_what_is_counted_was_forecast(name: str, found: list[dict[str, Any]]) -> None:
    method = SCENARIOS[name][0].keywords["method"]
    plan = lowrank.apply_(mlp(torch.float64), method)
    ahead = forecast(plan, RANKS)
    said = [sent for _, sent in found[0][name]["own"]["said"]]
    present = ring_sum_bytes(4 * sum(row.rule is not None and row.across == "shared" for row in plan.rows), RANKS)
    averaged = ahead.average if ahead.rest_every == 6 else 0
    if ahead.merge_every:
        assert said[2] - said[1] == ahead.merge + merge_words(RANKS, loop=False)
        assert said[5] - said[4] == ahead.merge + averaged + merge_words(RANKS, loop=False)
    if ahead.gradients:
        assert max(said[:2]) == ahead.gradients + present
        assert min(said) == ahead.gradients_between + present


def test_a_rest_that_trains_locally_is_averaged_at_its_own_interval(found: list[dict[str, Any]]) -> None:
    one, other = (found[rank]["lte-local"]["own"] for rank in range(RANKS))
    same = [torch.equal(one["weights"][n]["head.weight"], other["weights"][n]["head.weight"]) for n in range(7)]
    assert same == [False, False, False, False, False, True, False]
    assert one["said"][5][1] > one["said"][2][1] > 0
    assert any("averaged every 6 steps (the default here, rest='local')" in note for note in one["notes"])
    alone = found[0]["full-local"]["own"]["said"]
    assert all(collectives == 0 for collectives, _ in alone)  # its interval is longer than these steps


def test_projected_gradients_travel_small_between_refreshes(found: list[dict[str, Any]]) -> None:
    said = found[0]["galore"]["own"]["said"]
    whole = found[0]["full"]["own"]["said"][1][1]
    assert said[0][1] > 0.9 * whole  # all matrices refresh at the first step
    assert min(sent for _, sent in said) < 0.5 * whole
    assert found[0]["apollo"]["own"]["said"][1][1] > 0.9 * whole  # its lift needs G


def test_sums_and_gatherings(found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        talk = found[rank]["talking"]
        assert talk["sums"][0].tolist() == [3.0] * 5
        assert talk["sums"][1].dtype == torch.bfloat16
        assert (talk["sums"][1] == 4).all()
        assert float(talk["sums"][2]) == 2.0
        assert talk["gathered"][0].tolist() == [[0, 0], [1, 1]]
        assert talk["objects"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}]
        assert talk["counted"] > 0


# --- what is refused, and who is left out ----------------------------------------------------------------------------


def test_ranks_that_differ_are_refused_by_name(found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        message = found[rank]["disagreeing"]["message"]
        assert "rank 1 has step 4, rank 0 has 3" in message
        assert "code" not in message


def test_a_rank_whose_numbers_are_not_finite_is_left_out_and_begins_anew(found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        assert found[rank]["lte-nan"]["own"]["left_out"] == [1]
        assert all(tensor.isfinite().all() for tensor in found[rank]["lte-nan"]["state"].values())
        assert found[rank]["lte-nan"]["output"].isfinite().all()
    after = [found[rank]["lte-nan"]["own"]["weights"][2] for rank in range(RANKS)]  # right after the merge
    assert all(torch.equal(after[0][key], after[1][key]) for key in after[0])


def test_ranks_share_a_batch_of_images() -> None:
    pytest.importorskip("sklearn")
    from lowrank.data.images import images

    data = images("digits")
    whole = data.train(5, 1).batch(3)["labels"]
    shares = [data.train(5, 1, rank, 2).batch(3)["labels"] for rank in range(2)]
    assert [len(labels) for labels in shares] == [2, 3]
    assert torch.equal(torch.cat(shares), whole)
    with pytest.raises(ValueError, match="does not go round 2 ranks"):
        data.train(1, 1, 0, 2)


def test_fewer_heads_than_ranks_are_refused() -> None:
    from lowrank.adapters import LoRA, Site

    with pytest.raises(ValueError, match="heads=1 on 2 ranks"):
        LoRA(rank=1, heads=1, split=True)(Site("fc1", torch.zeros(4, 4), rank=0, ranks=2))


def test_an_interval_for_a_rest_that_is_not_local_is_refused() -> None:
    with pytest.raises(ValueError, match="rest='local'"):
        lte(rest="train", rest_every=5)


def test_a_rank_that_dies_is_named_within_the_timeout() -> None:
    (code, error), (dead, _) = launch("tests.ranks.dying", ranks=RANKS, LOWRANK_TIMEOUT="20")
    assert dead == -9
    assert code == 3, error
    assert "rank 1 (127.0.0.1) is gone" in error


def test_a_rank_that_does_not_answer_in_time_is_named() -> None:
    (code, error), _ = launch("tests.ranks.dying", "late", ranks=RANKS, LOWRANK_TIMEOUT="2")
    assert code == 3, error
    assert "rank 1 lives but did not answer rank 0 in a sum within 2 s" in error


# --- the loop --------------------------------------------------------------------------------------------------------


def test_a_run_on_two_ranks_equals_one_process(found: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    alone = train(tiny_run(), tmp_path / "run", quiet=True)
    summary = found[0]["runs"]["run"]
    assert summary["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)
    assert summary["val_tokens"] == alone["val_tokens"]
    one, two = (read_log(at / "run" / "log.jsonl") for at in (tmp_path, folder))
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["step"] == mine["step"]
        for name in {"loss", "val_loss", "grad_norm"} & mine.keys():
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4)
    saved = [checkpoint.load(checkpoint.latest(at / "run" / "checkpoints")) for at in (tmp_path, folder)]
    assert [each.step for each in saved] == [9, 9]
    for key, tensor in saved[0].tensors.items():
        torch.testing.assert_close(saved[1].tensors[key], tensor, rtol=1e-4, atol=1e-5)
    training = [record for record in two if "loss" in record]
    assert all(record["bytes_sent"] == record["bytes_received"] > 0 for record in training)
    assert not any("bytes_sent" in record for record in one)
    assert summary["ranks"] == 2


def test_one_rank_asked_to_stop_stops_all(found: list[dict[str, Any]], folder: Path) -> None:
    """At the next merge, step 6; and they go on from there as if they had not stopped, bitwise."""
    assert [found[rank]["runs"]["stopped"]["steps"] for rank in range(RANKS)] == [6, 6]
    assert all(found[rank]["runs"]["stopped"]["interrupted"] for rank in range(RANKS))
    assert [found[rank]["runs"]["resumed"]["steps"] for rank in range(RANKS)] == [9, 9]
    one, other = (checkpoint.load(checkpoint.latest(folder / name / "checkpoints")) for name in ("stopped", "straight"))
    assert (one.step, other.step) == (9, 9)
    for mine, theirs in ((one.tensors, other.tensors), (one.optimizer["state"], other.optimizer["state"])):
        theirs = flat(theirs)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in flat(mine).items())


def test_one_process_goes_on_from_the_checkpoint_of_two(found: list[dict[str, Any]], folder: Path) -> None:
    run = Run.read(folder / "run" / "run.json")
    longer = Run.from_json({**run.to_json(), "steps": 12})
    summary = train(longer, folder / "run", resume=True, quiet=True)
    assert summary["steps"] == 12
    assert summary["parameters_trained"] > found[0]["runs"]["run"]["parameters_trained"]  # all heads are here now
