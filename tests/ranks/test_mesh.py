"""Two workers of two ranks, which hold their model in parts, against two ranks that are a worker each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.launch import assert_same, assert_same_checkpoint, outcome
from tests.ranks.mesh import EXTRA, FROZEN, NAMES, TOGETHER, mesh_run
from tests.ranks.planned import check_planned

from lowrank.distributed.collectives import ring_gather_bytes, ring_sum_bytes
from lowrank.infra.log import read_log
from lowrank.train.loop import train

RANKS = 4
WHOLE = [f"{name}-whole" for name in ("lte-local", "lte-train", "galore")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mesh")


@pytest.fixture(scope="module")
def mesh(place: Path) -> list[dict[str, Any]]:
    """What each of the four ranks has found."""
    return outcome("tests.ranks.mesh", place, "mesh", ranks=RANKS)


def test_a_rank_of_a_mesh_is_planned_without_the_others(mesh: list[dict[str, Any]]) -> None:
    check_planned(mesh[2]["planned"], RANKS, 2)


@pytest.mark.parametrize("name", [*(name for name in NAMES if name not in EXTRA), *WHOLE])
def test_two_workers_of_two_ranks_equal_two_ranks(
    name: str, mesh: list[dict[str, Any]], found: list[dict[str, Any]]
) -> None:
    """Weights after every step, the whole model, its optimizer state and its function. What travels rounded is rounded
    in parts, whose codes are others."""
    plain = name.removesuffix("-whole")
    slack = {"rtol": 1e-7, "atol": 2e-3 if "int8" in plain or "bfloat16" in plain else 1e-9}
    for rank in range(RANKS):
        theirs, ours = found[rank // 2][plain], mesh[rank][name]
        torch.testing.assert_close(ours["own"]["weights"], theirs["own"]["weights"], **slack)
        for part in ("state", "output", "moments")[: 2 if name.endswith(("nan", "local")) else 3]:
            torch.testing.assert_close(ours[part], theirs[part], **slack)


@pytest.mark.parametrize("name", [*NAMES, *WHOLE])
def test_all_ranks_make_bitwise_the_same_whole_model(name: str, mesh: list[dict[str, Any]]) -> None:
    for rank in range(1, RANKS):
        assert_same(mesh[0][name]["state"], mesh[rank][name]["state"])


@pytest.mark.parametrize("name", ["lte", "lte-local", "lte-overlap", "explorers-nan", "full-local"])
def test_nothing_goes_to_another_worker_between_meetings(name: str, mesh: list[dict[str, Any]]) -> None:
    between = mesh[0][name]["own"]["between"]
    meets = {"full-local": []}.get(name, [2, 5, 8])
    basis = [0, 3, 6] if name.startswith("explorers") else []
    assert [sent > 0 for sent in between] == [step in (*meets, *basis) for step in range(len(between))]
    assert all(sent > 0 for _, sent in mesh[0][name]["own"]["said"])  # within the worker, in every step


@pytest.mark.parametrize("name", ["lte", "lte-reset", "lte-local", "lte-train", "lte-outer", "full", "galore", *WHOLE])
def test_what_is_counted_was_forecast(name: str, mesh: list[dict[str, Any]]) -> None:
    own = mesh[0][name]["own"]
    said, between, ahead = [sent for _, sent in own["said"]], own["between"], own["forecast"]
    flags = 16  # at most four bytes a parameter: which of them have gradients
    assert min(said) - (ahead.sharded + ahead.gradients_between) in range(flags * 4)
    if ahead.merge_every:
        words = ring_gather_bytes(4, 2) + ring_sum_bytes(4, 2) + ring_gather_bytes(8, 2)  # is all of it finite?
        assert said[2] - said[1] == ahead.merge + words
        assert between[5] - between[4] <= ahead.merge + ahead.average
        assert ahead.between_workers < ahead.per_step
    if name == "lte-train-whole":  # sums over all ranks go by two levels, and cross in shares
        assert 0 < min(between) < ahead.gradients_between / 2


def test_workers_speak_as_one(mesh: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        talk = mesh[rank]["talking"]
        worker, place = divmod(rank, 2)
        assert talk["place"] == (worker, place, [2 * worker, 2 * worker + 1], [place, 2 + place])
        for n, gathered, later, summed in zip((1, 3, 4), talk["gathered"], talk["later"], talk["sums"], strict=True):
            row = torch.arange(n, dtype=torch.float64)
            assert torch.equal(gathered, torch.stack([row, row + 10]))
            assert torch.equal(later, gathered)
            assert torch.equal(summed, 2 * row + 10)
        assert talk["objects"] == [{"worker": 0}, {"worker": 1}]
        assert talk["told"].tolist() == [2 * worker + 1.0] * 2
        assert 0 < talk["sent"][1] < talk["sent"][0]


def test_what_cannot_be_is_refused_with_the_remedy(mesh: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        messages = mesh[rank]["refused"]
        assert "4 ranks cannot be divided into 3 workers of equal size: use one of 1, 2, 4" in messages["three"]
        assert "workers=0 must be at least 1" in messages["none"]
        assert "heads=2 for 4 workers" in messages["heads"]


def test_a_worker_whose_numbers_are_not_finite_is_left_out(mesh: list[dict[str, Any]]) -> None:
    """Rank 3's were not: its worker, number 1, begins anew, both of its ranks."""
    for name in ("lte-nan", "lte-overlap-nan", "explorers-nan"):
        for rank in range(RANKS):
            assert mesh[rank][name]["own"]["left_out"] == [1]
            assert all(tensor.isfinite().all() for tensor in mesh[rank][name]["state"].values())


def test_a_run_on_the_mesh(mesh: list[dict[str, Any]], place: Path) -> None:
    """Between workers bytes travel at meetings alone; each node may have a text of its own."""
    assert mesh[0]["runs"]["local"]["ranks"] == RANKS
    log = [record for record in read_log(place / "local" / "log.jsonl") if "loss" in record]
    assert [record["bytes_sent_between"] > 0 for record in log] == [record["step"] % 3 == 0 for record in log]
    assert all(record["bytes_sent"] > record["bytes_sent_between"] for record in log)
    own = [each["runs"]["own"] for each in mesh]
    assert [run["steps"] for run in own] == [9] * RANKS
    assert len({run["val_loss"] for run in own}) == 1


def test_mates_with_unequal_rows_divide_alike(mesh: list[dict[str, Any]], tmp_path: Path) -> None:
    """The rest frozen, so that nobody asks the other workers what they have; one process does the same."""
    alone = train(mesh_run(**FROZEN), tmp_path / "alone", quiet=True)
    assert mesh[0]["runs"]["frozen"]["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-6)


def test_what_a_worker_cannot_do_all_ranks_are_told(mesh: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        assert "between 3 heads, and some would never see anything" in mesh[rank]["runs"]["heads"]["message"]
        assert "under --own-data the ranks of one worker" in mesh[rank]["runs"]["own-refused"]["message"]


def test_a_run_on_the_mesh_goes_on(mesh: list[dict[str, Any]], place: Path, tmp_path: Path) -> None:
    """Stopped after six of nine steps, and gone on with: bitwise by the same ranks; and by one process."""
    assert_same_checkpoint(place / "straight", place / "stopped")
    alone = train(mesh_run(**TOGETHER), tmp_path / "alone", quiet=True)
    assert mesh[0]["runs"]["straight"]["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)
    longer = train(mesh_run(**TOGETHER, steps=10), place / "stopped", resume=True, quiet=True)
    assert longer["steps"] == 10
