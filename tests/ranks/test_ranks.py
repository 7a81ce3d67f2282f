"""Two ranks against one process with everything: law 3, what is said and when, and what ranks refuse."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import mlp
from tests.ranks.launch import RANKS, assert_close_logs, assert_same, assert_same_checkpoint, launch
from tests.ranks.worker import SCENARIOS, lte, tiny_run, trained

import lowrank
from lowrank.distributed.collectives import ring_gather_bytes, ring_sum_bytes
from lowrank.infra import checkpoint
from lowrank.plan.communication import forecast, merge_words
from lowrank.run.overrides import override, resolve
from lowrank.run.run import Run
from lowrank.train.loop import train

TRAINED = [name for name, (function, _) in SCENARIOS.items() if getattr(function, "func", None) is trained]


# --- law 3 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TRAINED if SCENARIOS[name][1]])
def test_ranks_equal_one_process_on_the_same_batches(name: str, found: list[dict[str, Any]]) -> None:
    """Weights, factors of all heads, optimizer state and the function: R × H heads are 1 × R·H heads."""
    alone = SCENARIOS[name][0](None)
    for rank in range(RANKS):
        for part in ("state", "moments", "output"):
            torch.testing.assert_close(found[rank][name][part], alone[part], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", TRAINED)
def test_the_whole_model_is_bitwise_the_same_on_all_ranks(name: str, found: list[dict[str, Any]]) -> None:
    one, other = (found[rank][name] for rank in range(RANKS))
    assert_same([one["state"], one["output"]], [other["state"], other["output"]])


ROUNDED = [name for name in TRAINED if "bfloat16" in name or "int8" in name]
FED_BACK = ["lte-2bit", "lte-topk3-dense", "explorers-topk3"]  # what is left out stays on the rank
FRAGMENTS = ["lte-fragments-local", "lte-fragments-overlap"]
OVERLAPPED = ["lte-overlap", "lte-overlap-int8", "lte-overlap-nan", "lte-overlap-dense-outer"]
EXPLORERS = [
    name for name in TRAINED if name.startswith("explorers") and name not in [*ROUNDED, *FED_BACK, "explorers-nan"]
]


@pytest.mark.parametrize(
    "name",
    [
        "lte",
        "lte-reset",
        "lte-dense",
        "lte-uneven",
        "lte-train",
        "lte-outer",
        "lte-overlap",
        "lte-fragments",
        *EXPLORERS,
    ],
)
def test_weights_are_bitwise_the_same_at_every_step(name: str, found: list[dict[str, Any]]) -> None:
    one, other = (found[rank][name]["own"]["weights"] for rank in range(RANKS))
    assert_same(one, other)


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


@pytest.mark.parametrize(
    "name",
    [
        *("lte", "lte-dense", "lte-uneven", "lte-local", "lte-tokens-even", "galore", "full"),
        *(name for name in [*EXPLORERS, *ROUNDED, *FED_BACK] if "per-layer" not in name),
    ],
)
def test_what_is_counted_was_forecast(name: str, found: list[dict[str, Any]]) -> None:
    method = SCENARIOS[name][0].keywords["method"]
    plan = lowrank.apply_(mlp(torch.float64), method)
    ahead = forecast(plan, RANKS)
    said = [sent for _, sent in found[0][name]["own"]["said"]]
    present = ring_sum_bytes(4 * sum(row.rule is not None and row.across == "shared" for row in plan.rows), RANKS)
    averaged = ahead.average if ahead.rest_every == 6 else 0
    if ahead.merge_every:
        assert said[2] - said[1] == ahead.merge + merge_words(plan, RANKS, loop=False)
        assert said[5] - said[4] == ahead.merge + averaged + merge_words(plan, RANKS, loop=False)
    if ahead.gradients:
        assert max(said[:2]) == ahead.gradients + present + ahead.basis
        assert min(said) == ahead.gradients_between + present


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragments_are_sent_at_steps_of_their_own(name: str, found: list[dict[str, Any]]) -> None:
    """Merges every 3 steps, the first fragment a step after the last; averages every 6, in two halves. Each step sends
    what was forecast, the most of it less than all at once."""
    plan = lowrank.apply_(mlp(torch.float64), SCENARIOS[name][0].keywords["method"])
    ahead, said = forecast(plan, RANKS), [sent for _, sent in found[0][name]["own"]["said"]]
    expected = [ahead.synchronisation(step + 1) for step in range(len(said))]
    words = merge_words(plan, RANKS, loop=False)
    assert said == [sent + words if sent else 0 for sent in expected]
    assert [sent > 0 for sent in said[:6]] == [True, False, True, True, False, True]
    assert max(expected) == ahead.most < ahead.merge + ahead.average
    assert ahead.per_step == pytest.approx(ahead.merge / 3 + (ahead.average / 6 if name.endswith("local") else 0))


def test_explorers_send_their_changes_in_a_shared_basis(found: list[dict[str, Any]]) -> None:
    """At rank 2, of 14 × 10 and 14 × 14 numbers in float64: 2·(14 + 14) at a merge, and 2 iterations of 2·(10 + 14) in
    the first step of an interval; nothing in between where the rest is frozen."""
    said = [sent for _, sent in found[0]["explorers-frozen"]["own"]["said"]]
    merge, basis = ring_sum_bytes(8 * 2 * (14 + 14), RANKS), ring_sum_bytes(8 * 2 * 2 * (10 + 14), RANKS)
    assert said == [basis, 0, merge + ring_gather_bytes(4, RANKS), basis, 0, merge + ring_gather_bytes(4, RANKS), basis]
    drawn = [sent for _, sent in found[0]["explorers-gaussian"]["own"]["said"]]
    assert drawn[0] == drawn[1]  # a drawn basis is everyone's without a word


def test_a_rank_left_out_keeps_to_the_shared_basis(found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        assert found[rank]["explorers-nan"]["own"]["left_out"] == [1]
    last = [found[rank]["explorers-nan"]["own"]["weights"][5] for rank in range(RANKS)]  # right after the second merge
    before = found[0]["explorers-nan"]["own"]["weights"][4]
    assert_same(last[0], last[1])
    assert not torch.equal(last[0]["fc1.weight"], before["fc1.weight"])


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


def test_sums_under_way_during_backward_are_those_after_it(found: list[dict[str, Any]]) -> None:
    """Bitwise, with parameters that some ranks do not use; the bytes are the same; a backward pass too many is told."""
    for rank in range(RANKS):
        late, early = found[rank]["unused"]["weights"]
        assert_same(late, early)
        assert "call step() after 2 backward passes" in found[rank]["unused"]["messages"][0]
    for name in ("full", "galore", "apollo", "lte-train"):
        told, early_told = (found[0][each]["own"]["said"] for each in (name, f"{name}-early"))
        assert [sent for _, sent in told] == [sent for _, sent in early_told]


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
        assert talk["listens"] == {"0100007F"}  # 127.0.0.1, where they are told to meet; never all interfaces


# --- under way -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAPPED)
def test_what_was_sent_at_one_merge_arrives_at_the_next(name: str, found: list[dict[str, Any]]) -> None:
    """Merges at steps 3, 6 and 9 of 10: weights move at the second and third, on all ranks to the same bits."""
    one, other = (found[rank][name]["own"]["weights"] for rank in range(RANKS))
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine["fc1.weight"], theirs["fc1.weight"])
    moved = [not torch.equal(one[n]["fc1.weight"], one[n - 1]["fc1.weight"]) for n in range(1, 10)]
    assert moved == [False, False, False, False, True, False, False, True, False]
    assert one[9]["fc1.weight"].isfinite().all()
    if "outer" not in name:  # where nothing but merges is said
        said = [collectives > 0 for collectives, _ in found[0][name]["own"]["said"]]
        assert said == [n in (2, 5, 8) for n in range(10)]


def test_a_collective_under_way_is_not_waited_for(found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        later = found[rank]["talking later"]
        assert later["waited before"] < 0.5
        assert later["sum"].tolist() == [3.0, 3.0]
        assert later["gathered"].tolist() == [[0.0], [1.0]]
    assert found[0]["talking later"]["waited after"] > 0.5  # for rank 1, which came a second later


def test_overlap_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="keep=True, or overlap=False"):
        lte(overlap=True, keep=False)
    with pytest.raises(ValueError, match="weigh='equal', or overlap=False"):
        lte(overlap=True, weigh="tokens")
    method = lowrank.methods.relora("fc1", rank=2, merge_every=10)
    from dataclasses import replace

    from lowrank.adapters import Merge

    with pytest.raises(ValueError, match="is for LoRA heads that split the batch"):
        lowrank.apply_(mlp(), replace(method, merge=Merge(10, overlap=True)))
    with pytest.raises(ValueError, match="fragments=2 is for heads that split"):
        lowrank.apply_(mlp(), replace(method, merge=Merge(10, fragments=2)))
    model = mlp()
    with pytest.raises(ValueError, match="there are 2: use at most 2"):
        lowrank.apply_(model, lte(fragments=3))
    lowrank.apply_(model, lte(fragments=2))  # it was as before


# --- rounded, weighed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUNDED)
def test_after_a_rounded_meeting_all_ranks_hold_the_same_bits(name: str, found: list[dict[str, Any]]) -> None:
    """At step 6 merges and averages fall together."""
    one, other = (found[rank][name]["own"]["weights"][5] for rank in range(RANKS))
    assert_same(one, other)
    assert any(not torch.equal(tensor, found[1][name]["own"]["weights"][4][key]) for key, tensor in one.items())


@pytest.mark.parametrize("name", FED_BACK)
def test_with_error_feedback_adapted_weights_are_the_same(name: str, found: list[dict[str, Any]]) -> None:
    """Also at a merge; the rest differs by what each rank was left with, and the mean of all is in the checkpoint."""
    one, other = (found[rank][name]["own"]["weights"][5] for rank in range(RANKS))
    for layer in ("fc1", "fc2"):
        assert torch.equal(one[f"{layer}.weight"], other[f"{layer}.weight"])
        assert not torch.equal(one[f"{layer}.weight"], found[0][name]["own"]["weights"][1][f"{layer}.weight"])
    if name != "explorers-topk3":
        assert not torch.equal(one["head.weight"], other["head.weight"])


def mean_change(found: list[dict[str, Any]], name: str, merge: int, weights: list[float]) -> dict[str, torch.Tensor]:
    """Σ_r w_r Δ_r, Δ_r the mean change of the heads of rank r."""
    changes = [found[rank][name]["merges"][merge]["changes"] for rank in range(RANKS)]
    return {key: sum(w * change[key] for w, change in zip(weights, changes, strict=True)) for key in changes[0]}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("met", [1 / 2, 1 / 2]),
        ("met-tokens", [2 / 3, 1 / 3]),
        ("met-tokens-dense", [2 / 3, 1 / 3]),
        ("met-steps", [1 / 2, 1 / 2]),  # one head and two: by steps each rank weighs the same, not each head
    ],
)
def test_a_merge_is_the_weighted_mean_of_the_ranks_changes(
    name: str, weights: list[float], found: list[dict[str, Any]]
) -> None:
    for merge in range(2):
        made = found[0][name]["merges"][merge]
        for key, change in mean_change(found, name, merge, weights).items():
            W = f"{key}.weight"
            torch.testing.assert_close(made["after"][W], made["before"][W] + change, rtol=1e-12, atol=1e-12)
            assert change.abs().max() > 1e-4


def test_seconds_weigh_between_the_changes_of_the_ranks(found: list[dict[str, Any]]) -> None:
    made = [found[rank]["met-seconds"]["merges"][1] for rank in range(RANKS)]
    moved = made[0]["after"]["fc1.weight"] - made[0]["before"]["fc1.weight"]
    own, other = (each["changes"]["fc1"] for each in made)
    weight = ((moved - other) * (own - other)).sum() / (own - other).square().sum()
    assert 0 < weight < 1
    torch.testing.assert_close(moved, weight * own + (1 - weight) * other)


@pytest.mark.parametrize(
    ("name", "error"), [("met-bfloat16", 2**-7), ("met-int8", 2 / 127), ("met-int8-dense", 1 / 127)]
)
def test_a_rounded_merge_is_as_near_as_its_bits(name: str, error: float, found: list[dict[str, Any]]) -> None:
    """Of each merge: the second too is rounded relative to its own change, as only changes of factors travel."""
    for merge in range(2):
        made = found[0][name]["merges"][merge]
        for key, change in mean_change(found, name, merge, [1 / 2, 1 / 2]).items():
            moved = made["after"][f"{key}.weight"] - made["before"][f"{key}.weight"]
            assert 0 < (moved - change).abs().max() <= 3 * error * change.abs().max()


@pytest.mark.parametrize("name", ["met", "met-int8", "met-bfloat16", "met-2bit", "met-topk3", "met-tokens"])
def test_what_rounding_left_out_stays_in_the_heads(name: str, found: list[dict[str, Any]]) -> None:
    """The mean model is the same before and after a merge, whatever travelled; weights alone change it."""
    for made in found[0][name]["merges"]:
        same = torch.allclose(made["output after"], made["output before"], rtol=1e-10, atol=1e-12)
        assert same == (name != "met-tokens")


def test_rounded_bytes_are_fewer(found: list[dict[str, Any]]) -> None:
    names = ("met", "met-bfloat16", "met-int8", "met-2bit")
    exact, half, quarter, bits = (found[0][name]["merges"][0]["sent"] for name in names)
    assert half < exact / 3.5  # of float64
    assert bits < quarter / 2
    assert quarter < half / 1.5  # blocks of 20 to 28 numbers here, with a scale each


# --- what is refused, and who is left out ----------------------------------------------------------------------------


def test_ranks_that_differ_are_refused_by_name(found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        message = found[rank]["disagreeing"]["message"]
        assert "rank 1 has step 4, rank 0 has 3" in message
        assert "code" not in message


def test_ranks_with_other_data_under_one_path_are_refused_by_name(found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        between, same, own, swapped = found[rank]["disagreeing"]["data"]
        assert re.search(r"rank 1 has other content in --data \S*text.txt \(other\) than rank 0 \(one\)", between)
        assert "--own-data where each is to have its own; --allow-changed-data" in between
        assert same == own == ""
        assert "rank 0: --data" in swapped
        assert "is not what the run was trained on (content other, it was one)" in swapped
        assert len(found[rank]["disagreeing"]["allowed"]) == 2  # noted on every rank: it was meant


def test_a_rank_whose_numbers_are_not_finite_is_left_out_and_begins_anew(found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        assert found[rank]["lte-nan"]["own"]["left_out"] == [1]
        assert all(tensor.isfinite().all() for tensor in found[rank]["lte-nan"]["state"].values())
        assert found[rank]["lte-nan"]["output"].isfinite().all()
    after = [found[rank]["lte-nan"]["own"]["weights"][2] for rank in range(RANKS)]  # right after the merge
    assert_same(after[0], after[1])


def test_ranks_share_a_batch_of_images() -> None:
    pytest.importorskip("sklearn")
    from lowrank.data.images.source import images

    data = images("digits")
    whole = data.train(5, 1).batch(3)["labels"]
    shares = [data.train(5, 1, rank, 2).batch(3)["labels"] for rank in range(2)]
    assert [len(labels) for labels in shares] == [2, 3]
    assert torch.equal(torch.cat(shares), whole)
    with pytest.raises(ValueError, match="does not go round 2 ranks"):
        data.train(1, 1, 0, 2)


def test_heads_and_intervals_that_cannot_be_are_refused() -> None:
    from lowrank.adapters import LoRA, Site

    with pytest.raises(ValueError, match="heads=1 for 2 workers"):
        LoRA(rank=1, heads=1, split=True)(Site("fc1", torch.zeros(4, 4), rank=0, ranks=2))
    with pytest.raises(ValueError, match="rest='local'"):
        lte(rest="train", rest_every=5)


@pytest.mark.parametrize(
    ("words", "timeout", "exits", "message"),
    [
        ((), "20", [3, -9], "rank 1 (127.0.0.1) is gone"),
        (("late",), "2", [3, 0], "rank 1 lives but did not answer rank 0 in a sum within 2 s"),
    ],
)
def test_a_rank_that_dies_or_does_not_answer_is_named_within_the_timeout(
    words: tuple[str, ...], timeout: str, exits: list[int], message: str
) -> None:
    results = launch("tests.ranks.dying", *words, ranks=RANKS, LOWRANK_TIMEOUT=timeout)
    assert [code for code, _ in results] == exits
    assert message in results[0][1]


# --- the loop --------------------------------------------------------------------------------------------------------


def test_a_run_on_two_ranks_equals_one_process(found: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    alone = train(tiny_run(), tmp_path / "run", quiet=True)
    summary = found[0]["runs"]["run"]
    assert summary["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)
    assert summary["val_tokens"] == alone["val_tokens"]
    one, two = assert_close_logs(tmp_path / "run", folder / "run", rel=1e-4)
    saved = [checkpoint.load(checkpoint.latest(at / "run" / "checkpoints")) for at in (tmp_path, folder)]
    assert [each.step for each in saved] == [9, 9]
    torch.testing.assert_close(saved[1].tensors, saved[0].tensors, rtol=1e-4, atol=1e-5)
    training = [record for record in two if "loss" in record]
    assert all(record["bytes_sent"] == record["bytes_received"] > 0 for record in training)
    assert not any("bytes_sent" in record for record in one)
    assert summary["ranks"] == 2


def test_one_rank_asked_to_stop_stops_all(found: list[dict[str, Any]], folder: Path) -> None:
    """At the next merge, step 6; and they go on from there as if they had not stopped, bitwise."""
    assert [found[rank]["runs"]["stopped"]["steps"] for rank in range(RANKS)] == [6, 6]
    assert all(found[rank]["runs"]["stopped"]["interrupted"] for rank in range(RANKS))
    assert [found[rank]["runs"]["resumed"]["steps"] for rank in range(RANKS)] == [9, 9]
    assert_same_checkpoint(folder / "stopped", folder / "straight")


def test_ranks_with_data_of_their_own(found: list[dict[str, Any]], folder: Path) -> None:
    """Uneven shards of 5 sequences, each of the rank's own text; the evaluation is that of all of both texts; a run
    that stopped between merges, when there was work to be weighed, goes on bitwise."""
    from lowrank.evaluate.evaluator import tallied
    from lowrank.run.session import open_session, restore

    session, step = restore(folder / "own", "latest")
    texts = [
        open_session(resolve(override(session.run, {"data": str(folder / f"text-{rank}.txt")}))).data
        for rank in range(RANKS)
    ]
    tallies = [tallied(session.model, text.evaluation("val", 5, None), session.task) for text in texts]
    summary = found[0]["runs"]["own"]
    assert step == 9
    assert summary["val_tokens"] == sum(tally.tokens for tally in tallies)  # type: ignore[attr-defined]
    together = sum(tally.total for tally in tallies) / summary["val_tokens"]  # type: ignore[attr-defined]
    assert summary["val_loss"] == pytest.approx(together, rel=1e-5)
    assert found[0]["runs"]["own-ddp"]["val_tokens"] == summary["val_tokens"]  # in step, on data of their own
    assert_same_checkpoint(folder / "own", folder / "own-stopped")


def test_one_process_goes_on_from_the_checkpoint_of_two(
    found: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")  # which others compare with
    longer = Run.from_json({**Run.read(run / "run.json").to_json(), "steps": 12})
    summary = train(longer, run, resume=True, quiet=True)
    assert summary["steps"] == 12
    assert summary["parameters_trained"] > found[0]["runs"]["run"]["parameters_trained"]  # all heads are here now


# --- nodes with disks of their own -----------------------------------------------------------------------------------


def test_the_first_rank_of_each_disk_keeps_the_run(found: list[dict[str, Any]], folder: Path) -> None:
    kept = [found[rank]["nodes"]["kept"] for rank in range(RANKS)]
    assert [each["one node"] for each in kept] == [True, False]
    assert [each["one disk"] for each in kept] == [True, False]
    assert [each["two disks"] for each in kept] == [True, True]
    assert found[0]["nodes"]["folders"] == found[1]["nodes"]["folders"]
    assert not list((folder / "shared").iterdir())  # what they leave to find each other out is gone
    for rank in range(RANKS):
        assert {path.name for path in (folder / f"node-{rank}").iterdir()} >= {"run.json", "log.jsonl", "summary.json"}


def test_a_lost_and_a_damaged_disk_get_the_newest_checkpoint_of_the_others(found: list[dict[str, Any]]) -> None:
    one, other = (found[rank]["nodes"] for rank in range(RANKS))
    (lost, mended), (lost_there, mended_there) = one["files"], other["files"]
    assert lost == lost_there
    assert lost == mended == mended_there
    assert "rank 0 has given step-00000006 to rank 1" in one["told"][0]
    assert any("is damaged: optimizer.safetensors has 6 bytes" in note for note in one["told"][1])
    assert "rank 1 has given step-00000006 to rank 0" in one["told"][1]
    assert [each["steps"] for each in one["summaries"] + other["summaries"]] == [9, 9, 9, 9]
    assert one["summaries"][0]["val_loss"] == other["summaries"][1]["val_loss"]
    assert "is not there for ranks 1, which write none" in one["blind"]
