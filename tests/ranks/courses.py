"""Runs of several ranks, through the loop: stopped, resumed, with data and disks of their own."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tests.ranks.claims import message_of

from lowrank.distributed.process_group import ProcessGroup
from lowrank.infra import checkpoint
from lowrank.infra.checkpoint import CheckpointError
from lowrank.recipes.gpt import gpt_mini
from lowrank.recipes.llama import llama_mini
from lowrank.run.overrides import override, resolve
from lowrank.run.run import Run
from lowrank.train.coordinator import Coordinator
from lowrank.train.elastic import newest
from lowrank.train.folder import is_writer
from lowrank.train.loop import train as loop

train = partial(loop, quiet=True)
GPT = {"model.n_layer": 1, "model.n_head": 1, "model.n_embd": 8, "data.context": 16, "model.context": 16}
GPT |= {"batch-size": 4, "grad-accum": 2, "eval-every": 6, "eval-batches": 3, "checkpoint-every": 6, "device": "cpu"}
LTE = {"method": "lte", "method.merge_every": 3, "method.rank": 2, "steps": 9, "method.rest": "train"}
LLAMA = {"model.n_layer": 2, "model.n_head": 2, "model.hidden": 16, "model.feed_forward": 24, "data.context": 16}
LLAMA |= {"eval-every": 3, "eval-batches": 5, "checkpoint-every": 3, "batch-size": 8, "max-grad-norm": 0.5}
GALORE = {"method": "galore_8bit", "method.rank": 4, "method.refresh_every": 2, "steps": 9, "device": "cpu"}
MESH = {"engine": "fsdp", "workers": 2, "batch-size": 8, "method.heads": 2, "checkpoint-every": 3, "eval-every": 3}


def of_gpt(**options: Any) -> Run:
    """Nine steps of two micro-batches of LTE on a GPT-2 of one layer, the rest synchronised."""
    return resolve(override(gpt_mini(), {**GPT, **LTE, **options}))


def of_llama(**options: Any) -> Run:
    """Nine steps of 8-bit GaLore on a LLaMA of two layers, in parts."""
    return resolve(override(llama_mini(), {**LLAMA, **GALORE, "engine": "fsdp", **options}))


def of_mesh(**options: Any) -> Run:
    """Of GPT-2, two workers of two ranks that hold their model in parts: the rest averaged, as they send it apart."""
    return of_gpt(**{**MESH, "method.rest": "local", "method.rest_every": 3, **options})


# What resumes bitwise, and what one process does too; GPT-2 keeps its weights transposed, and so the outer momentum.
TOGETHER = {"method.rest": "train", "method.rest_every": None, "method.outer_momentum": 0.5}
FROZEN = {"method.rest": "freeze", "method.rest_every": None, "batch-size": 6}  # six rows: one and two a rank
SILENT = {"method.rest": "freeze", "method.outer_momentum": 0.9, "method.exchange": "2bit", "method.overlap": True}
KILLED = {"method.rest": "train", "method.rest_every": None, "checkpoint-every": 2, "eval-every": 6}
OWN = {"own-data": True, "method.weigh": "tokens", "eval-batches": None}


def text_of(folder: Path, number: int) -> str:
    """A text that only that rank or node has, of its own length."""
    path = folder / f"text-{number}.txt"
    path.write_text(f"Number {number} reads this. " * (200 + 100 * number))
    return str(path)


def two(ranks: ProcessGroup, folder: Path) -> None:
    """A run; one that rank 1 alone is asked to stop, at the next merge, and the same never stopped; data of their own,
    with a stop between merges, when there is work to be weighed."""
    after_step = Coordinator.after_step

    def stopped(self: Coordinator, record: Any, stop: bool, steps: int) -> Any:
        if self.ranks is not None and self.ranks.rank == 1 and steps == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return after_step(self, record, stop, steps)

    assert train(of_gpt(), folder / "run")["ranks"] == 2
    with mock.patch.object(Coordinator, "after_step", stopped):
        summary = train(of_gpt(**SILENT), folder / "stopped")
    assert summary["steps"] == 6
    assert summary["interrupted"]
    assert train(of_gpt(**SILENT), folder / "stopped", resume=True)["steps"] == 9
    train(of_gpt(**SILENT), folder / "straight")
    own = {**OWN, "data": text_of(folder, ranks.rank), "method.rest": "freeze", "batch-size": 5}
    apart = train(of_gpt(**own), folder / "own")
    train(of_gpt(**own, **{"stop-at": 5}), folder / "own-stopped")
    train(of_gpt(**own), folder / "own-stopped", resume=True)
    in_step = {"method.weigh": "equal", "engine": "ddp", "method.rest": "train", "method.heads": 1}
    assert train(of_gpt(**{**own, **in_step}), folder / "own-ddp")["val_tokens"] == apart["val_tokens"]


def mesh(ranks: ProcessGroup, folder: Path) -> None:
    """Straight; stopped and gone on with; a text for each node; what a worker cannot do is told to all ranks."""
    seldom = {"eval-every": 9, "checkpoint-every": 9}  # what they say is in the next record
    assert train(of_mesh(**seldom), folder / "local")["ranks"] == 4
    train(of_mesh(**TOGETHER), folder / "straight")
    train(of_mesh(**TOGETHER, **{"stop-at": 6}), folder / "stopped")
    train(of_mesh(**TOGETHER), folder / "stopped", resume=True)
    train(of_mesh(**FROZEN), folder / "frozen")
    train(of_mesh(**KILLED), folder / "unkilled")
    texts = [text_of(folder, node) for node in range(2)] if ranks.rank == 0 else []
    texts = ranks.gather_objects(texts)[0]
    own = {**OWN, "batch-size": 9}
    summary = train(of_mesh(**own, data=texts[ranks.rank // 2]), folder / "own")
    assert summary["steps"] == 9
    assert len({*ranks.gather_objects(summary["val_loss"])}) == 1
    refusals = {
        "under --own-data the ranks of one worker": {**own, "data": texts[ranks.rank % 2]},
        "between 3 heads, and some would never see anything": {"method.heads": 5},
    }
    for message, options in refusals.items():
        assert message in message_of(partial(train, of_mesh(**options), folder / "refused"))


def start(ranks: ProcessGroup, folder: Path) -> None:
    """In parts on four ranks, three steps."""
    train(of_llama(**{"stop-at": 3}), folder / "parts")


def in_parts(ranks: ProcessGroup, folder: Path) -> None:
    """Two go on with it to the sixth step. Then each rank as if it were a node with a disk of its own: each keeps the
    whole, and a lost one gets it back."""
    train(of_llama(**{"stop-at": 6}), folder / "parts", resume=True)
    own = folder / f"disk-{ranks.rank}"
    with mock.patch.dict(os.environ, LOCAL_RANK="0"):
        train(of_llama(**{"stop-at": 3}), own, elastic=True)
        names = sorted(path.name for path in checkpoint.latest(own / "checkpoints").iterdir())
        if ranks.rank == 1:
            shutil.rmtree(own)
        ranks.total(0.0)
        summary = train(of_llama(), own, elastic=True)
    assert names == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer"]
    assert summary["steps"] == 9


def files_of(folder: Path | None) -> dict[str, str]:
    inside = [] if folder is None else [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder or ".")): path.read_bytes().hex() for path in inside}


def nodes(ranks: ProcessGroup, folder: Path) -> None:
    """As if each rank were a node with a disk of its own: the first of each disk keeps the run, and a lost and a
    damaged disk get the newest checkpoint of the others."""
    shared, own = folder / "shared", folder / f"node-{ranks.rank}"
    run = of_gpt(**{"method.rest": "local", "checkpoint-every": 3})
    stopped = of_gpt(**{"method.rest": "local", "checkpoint-every": 3, "stop-at": 6})
    assert is_writer(shared, ranks) == (ranks.rank == 0)
    with mock.patch.dict(os.environ, LOCAL_RANK="0"):
        assert is_writer(shared, ranks) == (ranks.rank == 0)
        assert is_writer(own, ranks)
        train(stopped, own, elastic=True)
        saved = ranks.gather_objects(sorted(path.name for path in (own / "checkpoints").iterdir()))
        if ranks.rank == 1:
            shutil.rmtree(own)
        ranks.total(0.0)
        found, told = newest(own, ranks, writer=True)
        lost = files_of(found)
        if ranks.rank == 0 and found is not None:
            (found / "optimizer.safetensors").write_bytes(b"spoilt")
        ranks.total(0.0)
        again, told_again = newest(own, ranks, writer=True)
        files = ranks.gather_objects([lost, files_of(again)])
        if ranks.rank == 1:
            shutil.rmtree(own)
        summaries = [train(run, own, elastic=True) for _ in range(2)]
        with pytest.raises(CheckpointError, match="is not there for ranks 1, which write none"):
            newest(own if ranks.rank == 0 else folder / "nowhere", ranks, writer=ranks.rank == 0)
    assert saved[0] == saved[1]
    assert not list(shared.iterdir())  # what they leave to find each other out is gone
    assert {path.name for path in own.iterdir()} >= {"run.json", "log.jsonl", "summary.json"}
    assert lost
    assert files == [[lost, lost], [lost, lost]]
    notes = ranks.gather_objects([told, told_again])[0]
    assert "rank 0 has given step-00000006 to rank 1" in notes[0]
    assert any("is damaged: optimizer.safetensors has 6 bytes" in note for note in notes[1])
    assert "rank 1 has given step-00000006 to rank 0" in notes[1]
    assert [each["steps"] for each in summaries] == [9, 9]
    losses = ranks.gather_objects([each["val_loss"] for each in summaries])
    assert losses[0][0] == losses[1][1]
