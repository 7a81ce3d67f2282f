"""What the runs of ``courses`` leave behind, beside the same by one process; and what needs no ranks."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import mlp, small_method
from tests.ranks.claims import assert_close_logs, assert_same, assert_same_checkpoint
from tests.ranks.courses import FROZEN, TOGETHER, of_gpt, of_llama, of_mesh, train
from tests.ranks.table import lte

import lowrank
from lowrank.adapters import LoRA, Merge, Site
from lowrank.distributed.workers import nodes
from lowrank.evaluate.evaluator import tallied
from lowrank.evaluate.generate import generate
from lowrank.infra import checkpoint
from lowrank.infra.files import read_json
from lowrank.infra.log import read_log
from lowrank.run.overrides import override, resolve
from lowrank.run.run import Run
from lowrank.run.session import open_session, restore
from lowrank.run.validation import validate


def summary_of(run: Path) -> dict[str, Any]:
    return read_json(run / "summary.json")


# --- two ranks -------------------------------------------------------------------------------------------------------


def test_a_run_on_two_ranks_equals_one_process(two: Path, tmp_path: Path) -> None:
    """And one process goes on from their checkpoint, with all heads."""
    alone, summary = train(of_gpt(), tmp_path / "run"), summary_of(two / "run")
    assert summary["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)
    assert summary["val_tokens"] == alone["val_tokens"]
    one, other = assert_close_logs(tmp_path / "run", two / "run", rel=1e-4)
    saved = [checkpoint.load(checkpoint.latest(at / "run" / "checkpoints")) for at in (tmp_path, two)]
    assert [each.step for each in saved] == [9, 9]
    torch.testing.assert_close(saved[1].tensors, saved[0].tensors, rtol=1e-4, atol=1e-5)
    training = [record for record in other if "loss" in record]
    assert all(record["bytes_sent"] == record["bytes_received"] > 0 for record in training)
    assert not any("bytes_sent" in record for record in one)
    run = shutil.copytree(two / "run", tmp_path / "copy")  # which others compare with
    longer = train(Run.from_json({**Run.read(run / "run.json").to_json(), "steps": 12}), run, resume=True)
    assert longer["steps"] == 12
    assert longer["parameters_trained"] > summary["parameters_trained"]


def test_what_stopped_goes_on_as_if_it_had_not(two: Path) -> None:
    """Bitwise, with a merge under way and what was left out of it; and with tokens to be weighed."""
    assert_same_checkpoint(two / "stopped", two / "straight")
    assert_same_checkpoint(two / "own", two / "own-stopped")


def test_ranks_with_data_of_their_own(two: Path) -> None:
    """Uneven shards of 5 sequences, each of the rank's own text; the evaluation is that of all of both texts."""
    session, step = restore(two / "own", "latest")
    runs = [resolve(override(session.run, {"data": str(two / f"text-{rank}.txt")})) for rank in range(2)]
    texts = [open_session(run).data.evaluation("val", 5, None) for run in runs]
    tallies: list[Any] = [tallied(session.model, text, session.task) for text in texts]
    summary = summary_of(two / "own")
    assert step == 9
    assert summary["val_tokens"] == sum(tally.tokens for tally in tallies)
    assert summary["val_loss"] == pytest.approx(sum(t.total for t in tallies) / summary["val_tokens"], rel=1e-5)


# --- a model in parts ------------------------------------------------------------------------------------------------


def test_saved_on_four_resumed_on_two_and_on_one(sharded: Path, tmp_path: Path) -> None:
    """A run of nine steps: four ranks made three of them, two made three, and one process makes the rest. A rank that
    lost its disk ends where they do."""
    run = shutil.copytree(sharded / "parts", tmp_path / "parts")
    saved = checkpoint.saved(run / "checkpoints")
    assert [each.name for each in saved] == ["step-00000003", "step-00000006"]
    assert [len(list((each / "model").iterdir())) for each in saved] == [4, 2]
    alone, summary = train(of_llama(), tmp_path / "alone"), train(of_llama(), run, resume=True)
    assert summary["val_tokens"] == alone["val_tokens"]
    for each in (summary, summary_of(sharded / "disk-0"), summary_of(sharded / "disk-1")):
        assert each["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)
    assert_close_logs(tmp_path / "alone", run, rel=1e-3)
    assert len(generate(str(run), "The", tokens=3, device="cpu")) > 3


def test_torch_itself_reads_what_is_saved_in_parts(sharded: Path) -> None:
    """As docs/distributed.md shows it, into the state of a model that knows nothing of this library."""
    from torch.distributed import checkpoint as dcp

    saved = checkpoint.saved(sharded / "parts" / "checkpoints")[0]
    wanted = checkpoint.load(saved).tensors
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in wanted.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(saved / "model")), no_dist=True)
    assert_same(state, wanted)


# --- two workers of two ranks ----------------------------------------------------------------------------------------


def test_runs_on_the_mesh(mesh: Path, tmp_path: Path) -> None:
    """Between workers bytes travel at merges alone. Ranks with unequal rows divide alike, the rest frozen, so that
    nobody asks the other workers what they have. What stopped goes on bitwise by the same ranks; and by one process."""
    log = [record for record in read_log(mesh / "local" / "log.jsonl") if "loss" in record]
    assert [record["bytes_sent_between"] > 0 for record in log] == [record["step"] % 3 == 0 for record in log]
    assert all(record["bytes_sent"] > record["bytes_sent_between"] for record in log)
    frozen = train(of_mesh(**FROZEN), tmp_path / "frozen")
    assert summary_of(mesh / "frozen")["val_loss"] == pytest.approx(frozen["val_loss"], rel=1e-6)
    assert_same_checkpoint(mesh / "straight", mesh / "stopped")
    alone = train(of_mesh(**TOGETHER), tmp_path / "alone")
    assert summary_of(mesh / "straight")["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)
    stopped = shutil.copytree(mesh / "stopped", tmp_path / "stopped")
    assert train(of_mesh(**TOGETHER, steps=10), stopped, resume=True)["steps"] == 10


# --- without ranks ---------------------------------------------------------------------------------------------------


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


RELORA = small_method("relora", target_modules="fc1", merge_every=10)
IN_PARTS = {"method": "lte", "method.merge_every": 3, "batch-size": 16}
TOGETHER_ONLY = r"--engine fsdp keeps all ranks in step: .* several --workers"


def settings(**options: Any) -> None:
    validate(override(of_llama(), options))


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (lambda: lte(overlap=True, keep=False), "keep=True, or overlap=False"),
        (lambda: lte(overlap=True, weigh="tokens"), "weigh='equal', or overlap=False"),
        (lambda: lte(rest="train", rest_every=5), "rest='local'"),
        (
            lambda: lowrank.apply_(mlp(), replace(RELORA, merge=Merge(10, overlap=True))),
            "is for LoRA heads that split the batch",
        ),
        (
            lambda: lowrank.apply_(mlp(), replace(RELORA, merge=Merge(10, fragments=2))),
            "fragments=2 is for heads that split",
        ),
        (
            lambda: LoRA(rank=1, heads=1, split=True)(Site("fc1", torch.zeros(4, 4), rank=0, ranks=2)),
            "heads=1 for 2 workers",
        ),
        (lambda: settings(**IN_PARTS, **{"method.rest": "local"}), TOGETHER_ONLY),
        (lambda: settings(**IN_PARTS, **{"method.exchange": "int8"}), TOGETHER_ONLY),
        (lambda: settings(**IN_PARTS, **{"method.weigh": "tokens"}), TOGETHER_ONLY),
        (
            lambda: settings(**IN_PARTS, engine="auto", workers=2),
            "--workers 2: with --engine auto every rank is a worker",
        ),
        (lambda: settings(**IN_PARTS, workers=0), "--workers 0 must be at least 1, or nodes"),
        (lambda: settings(workers="hosts"), "expected a whole number or one of nodes or none"),
        (lambda: settings(compile=True), "--compile with --engine fsdp"),
    ],
)
def test_what_cannot_be_is_refused(refusal: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refusal()


def test_what_is_refused_leaves_things_as_they_were() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="there are 2: use at most 2"):
        lowrank.apply_(model, lte(fragments=3))
    lowrank.apply_(model, lte(fragments=2))
    for apart in ({"rest": "local"}, {"exchange": "int8"}, {"weigh": "tokens"}):
        settings(**IN_PARTS, **{f"method.{name}": value for name, value in apart.items()}, workers="nodes")
    plan = lowrank.apply_(mlp(), lowrank.methods.full(rest="local"), workers=1)
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
