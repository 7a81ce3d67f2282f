"""FSDP2: ranks that hold a model in parts against one process that holds it all; and checkpoints between the two."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.launch import assert_close_logs, assert_same, outcome, run_well
from tests.ranks.planned import check_planned
from tests.ranks.sharded import SCENARIOS, stack, tiny_run

import lowrank
from lowrank.distributed.workers import nodes
from lowrank.evaluate.generate import generate
from lowrank.infra import checkpoint
from lowrank.train.loop import train

RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    run_well("tests.ranks.sharded", folder, "start", ranks=4)
    return outcome("tests.ranks.sharded", folder, "sharded", ranks=RANKS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_sharded_equals_unsharded(name: str, found: list[dict[str, Any]]) -> None:
    """Weights and optimizer state; moments in 8 bits are cut into other blocks, and so differ by their codes."""
    function, slack = SCENARIOS[name]
    alone, theirs = function(None), found[0][name]
    for part in ("state", "moments")[: 1 if slack else 2]:
        torch.testing.assert_close(theirs[part], alone[part], rtol=1e-7, atol=max(1e-9, slack * 7e-2))


def test_projected_matrices_are_cut_along_the_side_that_is_not_projected(found: list[dict[str, Any]]) -> None:
    dims = found[0]["galore"]["dims"]
    assert [dims[f"blocks.0.{name}.weight"] for name in ("fc1", "fc2", "fc3", "fc4")] == [0, 1, 0, 0]
    assert found[0]["galore-reset-long"]["dims"]["blocks.0.fc1.weight"] == 1
    assert found[0]["full"]["dims"]["blocks.0.fc2.weight"] == 0


@pytest.mark.parametrize("name", ["full", "galore", "galore_8bit", "fira", "lora", "lte"])
def test_the_ledger_is_of_this_rank(name: str, found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        held = found[rank][name]["held"]
        assert held["state_bytes"] == held["really"]
        assert held["weights"] < 0.6 * 8 * sum(t.numel() for t in found[0]["full"]["state"].values())
        assert "memory of this rank" in held["table"]
        assert any(note.startswith("sharded over 2 ranks (FSDP2)") for note in held["notes"])


@pytest.mark.parametrize("name", ["full", "muon", "galore", "galore-both", "apollo", "lora", "relora", "lte"])
def test_what_is_counted_was_forecast(name: str, found: list[dict[str, Any]]) -> None:
    said, ahead = found[0][name]["said"], found[0][name]["held"]["forecast"]
    limited = {"apollo": 8 * 8}.get(name, 0)  # the limiter sums one number a matrix: eight, and 2(R−1)/R is 1
    adapters = sum("adapters" in key for key in found[0][name]["state"] if key.endswith((".A", ".B")))
    present = 4 * adapters  # the optimizer asks which of the whole parameters have gradients
    between = ahead.sharded + ahead.gradients_between + limited + present
    if ahead.merge_every:
        assert said[2] == between + ahead.merge
    if name.startswith("galore"):  # in three steps every matrix is refreshed once
        assert said[0] == ahead.sharded + ahead.gradients
        assert sum(said[1:4]) == 3 * between + ahead.gradients - ahead.gradients_between
    else:
        assert min(said) == between


def test_what_cannot_be_is_refused_with_the_remedy(found: list[dict[str, Any]]) -> None:
    wanted = {
        "twice": "sharded already",
        "order": r"first apply_(model, method, ranks=ranks, workers=1), then lowrank.plan.fsdp.shard_(plan)",
        "unload": "lowrank export",
        "apart": "workers=1",
        "rule": "Adafactor on blocks.0.fc1.weight needs the whole gradient",
        "alone": "torchrun",
        "dtypes": "model.to(dtype)",
        "weights": "rank 1 has weights",
        "read": "calls blocks.1.fc1, which is adapted, and also reads its weight",
        "read apart": "",  # of layers that are not adapted
        "forget": "share=0 or share=1",
    }
    for rank in range(RANKS):
        messages = found[rank]["refused"]
        assert messages.keys() == wanted.keys()
        for name, text in wanted.items():
            assert text in messages[name]


def test_a_rank_is_planned_without_the_others(found: list[dict[str, Any]]) -> None:
    check_planned(found[1]["planned"], RANKS, 1)


def test_a_checkpoint_in_parts_is_whole_or_not_there(found: list[dict[str, Any]]) -> None:
    """Where one rank has no room, all are told, and nothing is left of it; a spoilt part is found."""
    for rank in range(RANKS):
        told = found[rank]["unsaved"]
        assert "could not save the checkpoint of step 2" in told["full"]
        assert "the disk is full; the earlier checkpoint" in told["full"]
        assert told["left"] == "step-00000001"
        assert "model/shard-00002-model-00001-of-00001.safetensors has 6 bytes" in told["spoilt"]
        assert "the previous good one is" in told["spoilt"]


def test_saved_on_four_resumed_on_two_and_on_one(found: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    """A run of nine steps: four ranks made three of them, two made three, and one process makes the rest."""
    assert [each.name for each in checkpoint.saved(folder / "run" / "checkpoints")] == [
        "step-00000003",
        "step-00000006",
    ]
    parts = [len(list((each / "model").iterdir())) for each in checkpoint.saved(folder / "run" / "checkpoints")]
    assert parts == [4, 2]
    alone = train(tiny_run(), tmp_path / "alone", quiet=True)
    summary = train(tiny_run(), folder / "run", resume=True, quiet=True)
    assert summary["val_tokens"] == alone["val_tokens"]
    assert summary["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)
    assert_close_logs(tmp_path / "alone", folder / "run", rel=1e-3)
    assert len(generate(str(folder / "run"), "The", tokens=3, device="cpu")) > 3


def test_torch_itself_reads_what_is_saved_in_parts(found: list[dict[str, Any]], folder: Path) -> None:
    """As docs/distributed.md shows it, into the state of a model that knows nothing of this library."""
    from torch.distributed import checkpoint as dcp

    saved = checkpoint.saved(folder / "run" / "checkpoints")[0]
    wanted = checkpoint.load(saved).tensors
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in wanted.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(saved / "model")), no_dist=True)
    assert_same(state, wanted)


def test_ranks_with_disks_of_their_own_each_keep_the_whole(found: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = train(tiny_run(), tmp_path / "alone", quiet=True)
    for rank in range(RANKS):
        there = found[rank]["disks"]
        files = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
        assert there["names"] == [*files, "tokenizer"]
        assert there["summary"]["steps"] == 9
        assert there["summary"]["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)


def test_settings_that_contradict_the_engine_are_refused() -> None:
    from lowrank.run.overrides import override
    from lowrank.run.validation import validate

    lte = override(tiny_run(), {"method": "lte", "method.merge_every": 3, "batch-size": 16})
    for apart in ({"rest": "local"}, {"exchange": "int8"}, {"weigh": "tokens"}):
        alone = override(lte, {f"method.{name}": value for name, value in apart.items()})
        with pytest.raises(ValueError, match=r"--engine fsdp keeps all ranks in step: .* several --workers"):
            validate(alone)
        validate(override(alone, {"workers": "nodes"}))
    with pytest.raises(ValueError, match="--workers 2: with --engine auto every rank is a worker"):
        validate(override(lte, {"engine": "auto", "workers": 2}))
    with pytest.raises(ValueError, match="--workers 0 must be at least 1, or nodes"):
        validate(override(lte, {"workers": 0}))
    with pytest.raises(ValueError, match="expected a whole number or one of nodes or none"):
        override(lte, {"workers": "hosts"})
    with pytest.raises(ValueError, match="--compile with --engine fsdp"):
        validate(override(tiny_run(), {"compile": True}))
    plan = lowrank.apply_(stack(), lowrank.methods.full(rest="local"), workers=1)
    assert "in one process the rest is not averaged: rest='local' is 'train'" in plan.notes


def test_workers_are_the_nodes_that_torchrun_tells_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nodes() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="torchrun has not said how many nodes there are"):
        nodes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert nodes() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 of 6 ranks are on this node, so the 2 nodes do not all have as many"):
        nodes()
