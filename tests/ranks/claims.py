"""What must be true of a row of ``table.TABLE`` in one of its worlds; and comparisons of what runs leave behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import mlp
from torch import Tensor

import lowrank
from lowrank.distributed.collectives import ring_gather_bytes, ring_sum_bytes
from lowrank.infra import checkpoint
from lowrank.infra.log import read_log
from lowrank.plan.communication import Forecast, forecast, merge_words

Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A row in one world: what each rank has found, what one process does, and what each rank of ``two`` has found."""

    name: str
    world: str
    method: lowrank.Method
    ranks: list[Result]
    alone: Callable[[], Result]
    two: list[Result]

    @property
    def own(self) -> list[Result]:
        return [each["own"] for each in self.ranks]

    @property
    def sent(self) -> list[int]:
        """Bytes of rank 0, step by step."""
        return [sent for _, sent in self.own[0]["said"]]


Claim = Callable[[Case], None]


def of(*worlds: str) -> Callable[[Claim], Claim]:
    """A claim that is about these worlds alone."""

    def marked(claim: Claim) -> Claim:
        claim.worlds = worlds  # type: ignore[attr-defined]
        return claim

    return marked


# --- which numbers ---------------------------------------------------------------------------------------------------


@of("two", "sharded")
def is_one_process(case: Case) -> None:
    """Law 3: weights, factors of all heads, optimizer state and the function are those of one process with all."""
    alone = case.alone()
    for found in case.ranks:
        for part in ("state", "moments", "output"):
            torch.testing.assert_close(found[part], alone[part], rtol=1e-7, atol=1e-9)


def is_one_process_within(case: Case, slack: float) -> None:
    """The same but for that share of what seven steps move."""
    torch.testing.assert_close(case.ranks[0]["state"], case.alone()["state"], rtol=1e-7, atol=slack * 7e-2)


def is_two_workers_of_one_rank(case: Case) -> None:
    """Weights after every step too. What travels rounded is rounded in parts, whose codes are others."""
    slack = {"rtol": 1e-7, "atol": 2e-3 if "int8" in case.name or "bfloat16" in case.name else 1e-9}
    for rank, ours in enumerate(case.ranks):
        theirs = case.two[rank // 2][case.name.removesuffix("-whole")]
        torch.testing.assert_close(ours["own"]["weights"], theirs["own"]["weights"], **slack)
        for part in ("state", "output", "moments")[: 2 if case.name.endswith(("nan", "local")) else 3]:
            torch.testing.assert_close(ours[part], theirs[part], **slack)


def is_one_model_on_all_ranks(case: Case) -> None:
    for found in case.ranks[1:]:
        assert_same([found["state"], found["output"]], [case.ranks[0]["state"], case.ranks[0]["output"]])


def same_at_every_step(case: Case) -> None:
    for own in case.own[1:]:
        assert_same(own["weights"], case.own[0]["weights"])


def meets_in_the_same_bits(case: Case) -> None:
    """At step 6 merges and averages fall together: all hold the same, and it is not what one had before."""
    for own in case.own[1:]:
        assert_same(own["weights"][5], case.own[0]["weights"][5])
        assert any(not torch.equal(tensor, own["weights"][4][n]) for n, tensor in own["weights"][5].items())


def same_where_adapted(case: Case) -> None:
    """With error feedback also at a merge; the rest differs by what each rank was left with, and the mean of all is in
    the checkpoint."""
    one, other = (own["weights"][5] for own in case.own)
    for weight in ("fc1.weight", "fc2.weight"):
        assert torch.equal(one[weight], other[weight])
        assert not torch.equal(one[weight], case.own[0]["weights"][1][weight])
    if "explorers" not in case.name:
        assert not torch.equal(one["head.weight"], other["head.weight"])


def averages_the_rest(case: Case) -> None:
    one, other = (case.own[0], case.own[-1])
    same = [torch.equal(one["weights"][n]["head.weight"], other["weights"][n]["head.weight"]) for n in range(7)]
    assert same == [False, False, False, False, False, True, False]
    said = "" if case.name.startswith("diloco") else "the default here, "
    assert any(f"averaged every 6 steps ({said}rest='local')" in note for note in one["notes"])
    if case.world == "two":
        assert case.sent[5] > case.sent[2] > 0


def arrives_a_merge_later(case: Case) -> None:
    """Merges at steps 3, 6 and 9 of 10: weights move at the second and third, on all ranks to the same bits."""
    first, *others = ([each["fc1.weight"] for each in own["weights"]] for own in case.own)
    for other in others:
        assert_same(other, first)
    moved = [not torch.equal(before, after) for before, after in pairwise(first)]
    assert moved == [False, False, False, False, True, False, False, True, False]
    assert first[9].isfinite().all()


def begins_anew(case: Case) -> None:
    """The last worker, one of whose numbers was not finite, is left out of a merge, and has the others' weights then
    (those of an overlapped merge are known to all later)."""
    for found in case.ranks:
        assert found["own"]["left_out"] == [1]
        assert all(tensor.isfinite().all() for tensor in found["state"].values())
        assert found["output"].isfinite().all()
    first, *others = (own["weights"] for own in case.own)
    for other in others:
        assert_same(other[2], first[2])
        assert_same(other[5], first[5])
    assert not torch.equal(first[5]["fc1.weight"], first[4]["fc1.weight"])


# --- what is sent, and when ------------------------------------------------------------------------------------------


def is_silent(case: Case) -> None:
    """Nothing goes to another worker; its interval is longer than these steps."""
    assert not any(case.own[0]["between"])
    assert all((collectives > 0) == (case.world == "mesh") for collectives, _ in case.own[0]["said"])


def is_silent_between_merges(case: Case) -> None:
    """Nothing goes to another worker but at a merge, and where a basis is shared in the step after it; within a worker
    of several ranks something is said in every step."""
    steps = range(len(case.sent))
    spoken = [n for n in steps if n % 3 == 2 or (n % 3 == 0 and case.name.startswith("explorers"))]
    assert [n for n in steps if case.own[0]["between"][n] > 0] == spoken
    assert [n for n, (collectives, _) in enumerate(case.own[0]["said"]) if collectives > 0] == (
        [*steps] if case.world == "mesh" else spoken
    )


def as_forecast(case: Case) -> None:
    """What was counted is what was forecast before a step, to the byte."""
    {"two": as_forecast_of_two, "mesh": _as_forecast_of_mesh, "sharded": _as_forecast_in_parts}[case.world](case)


def _forecast(case: Case) -> tuple[lowrank.Plan, Forecast]:
    """By one process that has seen no rank."""
    plan = lowrank.apply_(mlp(torch.float64, width=12), case.method)
    return plan, forecast(plan, 2)


@of("two")
def as_forecast_of_two(case: Case) -> None:
    plan, ahead = _forecast(case)
    present = ring_sum_bytes(4 * sum(row.rule is not None and row.across == "shared" for row in plan.rows), 2)
    if ahead.merge_every:
        merged = ahead.merge + merge_words(plan, 2, loop=False)
        assert case.sent[2] - case.sent[1] == merged
        assert case.sent[5] - case.sent[4] == merged + (ahead.average if ahead.rest_every == 6 else 0)
    if ahead.gradients:
        assert max(case.sent[:2]) == ahead.gradients + present + ahead.basis
        assert min(case.sent) == ahead.gradients_between + present


def _as_forecast_of_mesh(case: Case) -> None:
    between, ahead = case.own[0]["between"], case.own[0]["forecast"]
    flags = 16  # at most four bytes a parameter: which of them have gradients
    assert min(case.sent) - (ahead.sharded + ahead.gradients_between) in range(flags * 4)
    if ahead.merge_every:
        words = ring_gather_bytes(4, 2) + ring_sum_bytes(4, 2) + ring_gather_bytes(8, 2)  # is all of it finite?
        assert case.sent[2] - case.sent[1] == ahead.merge + words
        assert between[5] - between[4] <= ahead.merge + ahead.average
        assert ahead.between_workers < ahead.per_step
    if case.name == "lte-train-whole":  # sums over all ranks go by two levels, and cross in shares
        assert 0 < min(between) < ahead.gradients_between / 2


def _as_forecast_in_parts(case: Case) -> None:
    ahead, sent = case.own[0]["forecast"], case.sent
    limited = 8 * 8 if "apollo" in case.name else 0  # the limiter sums one number a matrix: eight, and 2(R−1)/R is 1
    # the optimizer asks which of the whole parameters have gradients
    present = 4 * sum("adapters" in key for key in case.ranks[0]["state"] if key.endswith((".A", ".B")))
    between = ahead.sharded + ahead.gradients_between + limited + present
    if ahead.merge_every:
        assert sent[2] == between + ahead.merge
    if "galore" in case.name:  # in three steps every matrix is refreshed once
        assert sent[0] == ahead.sharded + ahead.gradients
        assert sum(sent[1:4]) == 3 * between + ahead.gradients - ahead.gradients_between
    else:
        assert min(sent) == between


def fragments_as_forecast(case: Case) -> None:
    """Merges every 3 steps, the first fragment a step after the last; averages every 6, in two halves. Each step sends
    what was forecast, the most of it less than all at once."""
    plan, ahead = _forecast(case)
    expected = [ahead.synchronisation(step + 1) for step in range(len(case.sent))]
    words = merge_words(plan, 2, loop=False)
    assert case.sent == [sent + words if sent else 0 for sent in expected]
    assert [sent > 0 for sent in case.sent[:6]] == [True, False, True, True, False, True]
    assert max(expected) == ahead.most < ahead.merge + ahead.average
    assert ahead.per_step == pytest.approx(ahead.merge / 3 + (ahead.average / 6 if case.name.endswith("local") else 0))


FINITE = ring_gather_bytes(4, 2)  # each rank says whether its numbers are


@of("two")
def sends_factors(case: Case) -> None:
    """Of one head, of rank 2, on fc1 and fc2, in float64."""
    assert case.sent[2] == ring_gather_bytes(8 * 2 * (12 + 14 + 14 + 14), 2) + FINITE


@of("two")
def sends_sums(case: Case) -> None:
    assert case.sent[2] == ring_sum_bytes(8 * (12 * 14 + 14 * 14), 2) + FINITE


@of("two")
def sends_in_a_shared_basis(case: Case) -> None:
    """At rank 2, of 14 × 12 and 14 × 14 numbers: 2·(14 + 14) at a merge, and 2 iterations of 2·(12 + 14) in the first
    step of an interval; nothing in between where the rest is frozen."""
    merge, basis = ring_sum_bytes(8 * 2 * (14 + 14), 2) + FINITE, ring_sum_bytes(8 * 2 * 2 * (12 + 14), 2)
    assert case.sent == [basis, 0, merge, basis, 0, merge, basis]


@of("two")
def sends_no_basis(case: Case) -> None:
    """One that is drawn is everyone's without a word."""
    assert case.sent[0] == case.sent[1]


@of("two")
def sends_small_gradients_between_refreshes(case: Case) -> None:
    whole = case.two[0]["full"]["own"]["said"][1][1]
    assert case.sent[0] > 0.9 * whole  # all matrices refresh at the first step
    assert min(case.sent) < 0.5 * whole


@of("two")
def sends_whole_gradients(case: Case) -> None:
    """Its lift needs G."""
    assert case.sent[1] > 0.9 * case.two[0]["full"]["own"]["said"][1][1]


def sends_as_much_as_late(case: Case) -> None:
    late = case.two[0][case.name.removesuffix("-early")]["own"]["said"]
    assert case.sent == [sent for _, sent in late]


def is_cut_along(case: Case, **dims: int) -> None:
    """Each matrix of the first block along the side that is not projected."""
    assert {name: case.own[0]["dims"][f"blocks.0.{name}.weight"] for name in dims} == dims


def knows_its_own_bytes(case: Case) -> None:
    """The ledger is of this rank: what it holds of the state, and of weights about half of all."""
    for found in case.ranks:
        own, numbers = found["own"], sum(t.numel() for n, t in found["state"].items() if ".adapters." not in n)
        assert own["held"]["planned"] == own["held"]["really"]
        assert own["held"]["weights"] < 0.6 * 8 * numbers
        assert "memory of this rank" in own["table"]
        assert any(note.startswith("sharded over 2 ranks (FSDP2)") for note in own["notes"])


# --- of what a merge is made -----------------------------------------------------------------------------------------


def _mean_change(case: Case, merge: int, weights: list[float]) -> dict[str, Tensor]:
    """Σ_r w_r Δ_r, Δ_r the mean change of the heads of rank r."""
    changes = [found["merges"][merge]["changes"] for found in case.ranks]
    return {key: sum(w * change[key] for w, change in zip(weights, changes, strict=True)) for key in changes[0]}


def is_the_weighted_mean(case: Case, weights: list[float]) -> None:
    """Of the ranks' changes."""
    for merge, made in enumerate(case.ranks[0]["merges"]):
        for key, change in _mean_change(case, merge, weights).items():
            W = f"{key}.weight"
            torch.testing.assert_close(made["after"][W], made["before"][W] + change, rtol=1e-12, atol=1e-12)
            assert change.abs().max() > 1e-4


def is_as_near_as_its_bits(case: Case, error: float) -> None:
    """At each merge: the second too is rounded relative to its own change, as only changes of factors travel."""
    for merge, made in enumerate(case.ranks[0]["merges"]):
        for key, change in _mean_change(case, merge, [1 / 2, 1 / 2]).items():
            moved = made["after"][f"{key}.weight"] - made["before"][f"{key}.weight"]
            assert 0 < (moved - change).abs().max() <= 3 * error * change.abs().max()


def weighs_between_the_ranks(case: Case) -> None:
    """By their seconds."""
    made = [found["merges"][1] for found in case.ranks]
    moved = made[0]["after"]["fc1.weight"] - made[0]["before"]["fc1.weight"]
    own, other = (each["changes"]["fc1"] for each in made)
    weight = ((moved - other) * (own - other)).sum() / (own - other).square().sum()
    assert 0 < weight < 1
    torch.testing.assert_close(moved, weight * own + (1 - weight) * other)


def keeps_the_mean_model(case: Case, *, kept: bool = True) -> None:
    """What rounding left out stays in the heads: the same before and after a merge, whatever travelled."""
    for made in case.ranks[0]["merges"]:
        assert torch.allclose(made["output after"], made["output before"], rtol=1e-10, atol=1e-12) == kept


def moves_the_mean_model(case: Case) -> None:
    """Weights alone do."""
    keeps_the_mean_model(case, kept=False)


def sends_fewer_bytes(case: Case, than: str, by: float) -> None:
    assert case.ranks[0]["merges"][0]["sent"] < case.two[0][than]["merges"][0]["sent"] / by


# --- the same --------------------------------------------------------------------------------------------------------


def message_of(function: Callable[[], object]) -> str:
    """What it is refused with; empty where it is not."""
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def assert_same(one: Any, other: Any) -> None:
    """Two nests of tensors, bitwise and in their dtypes."""
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Of two runs the last."""
    mine, theirs = (checkpoint.load(checkpoint.latest(run / "checkpoints")) for run in (one, other))
    assert mine.step == theirs.step
    assert_same(mine.tensors, theirs.tensors)
    assert_same(mine.optimizer["state"], theirs.optimizer["state"])


def assert_close_logs(one: Path, other: Path, rel: float) -> list[list[Result]]:
    """The same steps, with losses and norms as near as that; returns both runs' records."""
    logs = [read_log(run / "log.jsonl") for run in (one, other)]
    for mine, theirs in zip(*logs, strict=True):
        assert theirs["step"] == mine["step"]
        for name in {"loss", "val_loss", "grad_norm"} & mine.keys():
            assert abs(theirs[name] - mine[name]) <= rel * abs(mine[name])
    return logs
