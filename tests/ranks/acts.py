"""What ranks do and assert by themselves: what they send each other, what they refuse, and what they plan."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tests.models import mlp, small_method
from tests.ranks.claims import assert_same, message_of
from tests.ranks.training import WIDTH, Block, batch, plain_weights, stack
from tests.runs.tiny import tiny
from torch import Tensor, nn

import lowrank
from lowrank.distributed.process_group import ProcessGroup, RankLost
from lowrank.distributed.sharded_checkpoint import save_sharded
from lowrank.distributed.workers import process_layout
from lowrank.infra import checkpoint
from lowrank.plan.fsdp import shard_
from lowrank.train.changed_data import check_data
from lowrank.train.checkpointing import consolidated_model_state, consolidated_optimizer_state

# --- two ranks -------------------------------------------------------------------------------------------------------


def talking(ranks: ProcessGroup, folder: Path) -> None:
    """Sums and gatherings of a few shapes and dtypes, counted; and nobody listens but where they are told to meet."""
    before = ranks.traffic.sent
    row, bits = torch.full((5,), 1.0 + ranks.rank), torch.full((2, 3), 2.0, dtype=torch.bfloat16)
    number = torch.ones((), dtype=torch.float64)
    gathered = ranks.gather([torch.full((2,), ranks.rank), torch.full((3,), 0.5)])
    ranks.sum_([row, bits, number])
    assert ranks.gather_objects({"text": "x" * ranks.rank}) == [{"text": ""}, {"text": "x"}]
    assert row.tolist() == [3.0] * 5
    assert bits.dtype == torch.bfloat16
    assert (bits == 4).all()
    assert float(number) == 2.0
    assert gathered[0].tolist() == [[0, 0], [1, 1]]
    assert ranks.traffic.sent > before
    assert listens() == {"0100007F"}  # 127.0.0.1; never all interfaces


def listens() -> set[str]:
    """The addresses, as the kernel writes them, at which this process listens."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links}


def talking_later(ranks: ProcessGroup, folder: Path) -> None:
    """A collective under way is not waited for: rank 1 comes to it a second later."""
    mine = torch.full((2,), 1.0 + ranks.rank)
    if ranks.rank == 1:
        time.sleep(1.0)
    began = time.perf_counter()
    summing, gathering = ranks.start_sum([mine]), ranks.start_gather([torch.full((1,), float(ranks.rank))])
    started = time.perf_counter()
    summing()
    gathered = gathering()[0]
    arrived = time.perf_counter()
    assert started - began < 0.5
    assert mine.tolist() == [3.0, 3.0]
    assert gathered.tolist() == [[0.0], [1.0]]
    assert ranks.rank == 1 or arrived - started > 0.5


def unused(ranks: ProcessGroup, folder: Path) -> None:
    """Each rank leaves another head unused, in one of two micro-batches or in both: sums under way during the backward
    pass are bitwise those after it; a backward pass too many is told."""
    weights = []
    for early in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(WIDTH, 2).double() for name in ("a", "b", "c")})
        plan = lowrank.apply_(model, lowrank.methods.full(), ranks=ranks)
        opt = plan.optimizer(lr=1e-2)
        if early:
            opt.sum_during_backward(2)
        for step in range(4):
            for micro in range(2):
                x = batch(2 * step + micro)[0]
                used = ("a" if ranks.rank else "b") if micro else "a"
                model[used](x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        weights.append(plain_weights(plan))
        model["a"](x).sum().backward()
        opt.zero_grad()
        if early:
            model["a"](x).sum().backward()
            model["a"](x).sum().backward()
            with pytest.raises(RuntimeError, match=re.escape("call step() after 2 backward passes")):
                model["a"](x).sum().backward()
            opt.zero_grad()
    assert_same(weights[0], weights[1])


def disagreeing(ranks: ProcessGroup, folder: Path) -> None:
    """Ranks that differ, and those with other data under one path, are refused by name."""
    ranks.agree({"step": 3, "code": "1"})
    message = message_of(lambda: ranks.agree({"step": 3 + ranks.rank, "code": "1"}))
    run, own = tiny(), tiny(own_data=True)
    saved: Any = SimpleNamespace(meta={"data_of_ranks": ["one", "other"]})
    mine, theirs = ("one", "other")[ranks.rank], ("other", "one")[ranks.rank]
    between = message_of(lambda: check_data(run, mine, None, ranks))
    same = message_of(lambda: check_data(run, theirs if ranks.rank else mine, saved, ranks))
    kept = message_of(lambda: check_data(own, mine, saved, ranks, worker=ranks.rank))
    swapped = message_of(lambda: check_data(own, theirs, saved, ranks, worker=ranks.rank))
    allowed = check_data(run, mine, saved, ranks, allowed=True)
    assert "rank 1 has step 4, rank 0 has 3" in message
    assert "code" not in message
    assert re.search(r"rank 1 has other content in --data \S*text.txt \(other\) than rank 0 \(one\)", between)
    assert "--own-data where each is to have its own; --allow-changed-data" in between
    assert same == kept == ""
    assert "rank 0: --data" in swapped
    assert "is not what the run was trained on (content other, it was one)" in swapped
    assert len(allowed) == 2  # noted on every rank: it was meant


def gone(ranks: ProcessGroup, folder: Path, *, how: str) -> None:
    """Rank 1 is gone before the second sum, or does not answer: rank 0 says who."""
    ranks.sum_([torch.ones(3)])
    if ranks.rank == 1 and how == "late":
        time.sleep(5)
        os._exit(1)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    late, killed = "rank 1 lives but did not answer rank 0 in a sum within 2 s", r"rank 1 \(127.0.0.1\) is gone"
    with pytest.raises(RankLost, match=late if how == "late" else killed):
        ranks.sum_([torch.ones(3)])


# --- a model in parts ------------------------------------------------------------------------------------------------


class Reading(Block):
    """A block that also reads the weight of a layer that it calls."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.fc1.weight), self.fc4.weight[:, :1].repeat(1, 20))


def refused_in_parts(ranks: ProcessGroup, folder: Path) -> None:
    """What cannot be, each with its remedy."""
    full, together = lowrank.methods.full(), partial(lowrank.apply_, ranks=ranks, workers=1)
    plan, mixed, other = together(stack(), full), stack(), stack()
    mixed.head.float()
    with torch.no_grad():
        other.head.bias += ranks.rank
    shard_(plan)
    opt = plan.optimizer()

    def apart() -> None:
        shard_(lowrank.apply_(stack(), small_method("lte", target_modules="fc1"), ranks=ranks))

    def one_step(adapted: str) -> None:
        model = stack()
        model.blocks[1] = Reading().double()
        plan = together(model, small_method("lora", target_modules=adapted))
        shard_(plan)
        opt = plan.optimizer(lr=1e-2)
        plan.model(torch.ones(2, WIDTH, dtype=torch.float64)).sum().backward()
        opt.step()

    adafactor = small_method("galore_adafactor", target_modules="fc1")
    refusals: dict[str, Callable[[], object]] = {
        "sharded already": lambda: shard_(plan),
        "first apply_(model, method, ranks=ranks, workers=1), then lowrank.plan.fsdp.shard_(plan)": lambda: together(
            plan.model, full
        ),
        "lowrank export": lambda: lowrank.merge_and_unload(plan.model),
        "workers=1": apart,
        "Adafactor on blocks.0.fc1.weight needs the whole gradient": lambda: shard_(together(stack(), adafactor)),
        "torchrun": lambda: shard_(lowrank.apply_(stack(), full)),
        "model.to(dtype)": lambda: shard_(together(mixed, full)),
        "rank 1 has weights": lambda: shard_(together(other, full)),
        "calls blocks.1.fc1, which is adapted, and also reads its weight": lambda: one_step("fc1,fc3"),
        "share=0 or share=1": lambda: opt.forget([opt.param_groups[0]["params"][0]], 0.5),
    }
    for remedy, refusal in refusals.items():
        assert remedy in message_of(refusal)
    one_step("fc2,fc3")  # layers that are not adapted may be read


def unsaved(ranks: ProcessGroup, folder: Path) -> None:
    """A checkpoint in parts is whole or not there: where one rank has no room all are told, and nothing is left of it;
    a spoilt part is found."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    plan = lowrank.apply_(stack(), lowrank.methods.full(), ranks=ranks, workers=1)
    shard_(plan)
    opt, root = plan.optimizer(), folder / "unsaved"

    def save(step: int) -> None:
        state = consolidated_model_state(plan, "sharded"), consolidated_optimizer_state(plan, opt, "sharded")
        save_sharded(root, step, *state, {"n": 1}, ranks=ranks, writer=ranks.rank == 0)

    save(1)

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    write = full if ranks.rank == 1 else HuggingFaceStorageWriter.write_data
    with mock.patch.object(HuggingFaceStorageWriter, "write_data", write):
        message = message_of(lambda: save(2))
    ranks.total(0.0)
    left = [path.name for path in root.iterdir()]
    ranks.total(0.0)  # so that nobody sees the next one being written
    save(3)
    ranks.total(0.0)
    if ranks.rank == 0:
        (root / "step-00000003" / "model" / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"spoilt")
    ranks.total(0.0)
    spoilt = message_of(lambda: checkpoint.load(root / "step-00000003"))
    assert "could not save the checkpoint of step 2" in message
    assert "the disk is full; the earlier checkpoint" in message
    assert left == ["step-00000001"]
    assert "model/shard-00002-model-00001-of-00001.safetensors has 6 bytes" in spoilt
    assert "the previous good one is" in spoilt


# --- two workers of two ranks ----------------------------------------------------------------------------------------


def talking_as_workers(ranks: ProcessGroup, folder: Path) -> None:
    """Workers speak as one: sums and gatherings of sizes that do and do not go round the ranks of one."""
    layout, (worker, place) = process_layout(ranks, 2), divmod(ranks.rank, 2)
    workers, intra_worker, cross_worker = layout.workers, layout.intra_worker, layout.cross_worker
    assert workers is not None
    assert intra_worker is not None
    assert cross_worker is not None
    before = (ranks.traffic.sent, ranks.traffic.between)
    tensors = [torch.arange(n, dtype=torch.float64) + 10 * workers.rank for n in (1, 3, 4)]
    gathered = workers.gather(tensors)
    later = workers.start_gather(tensors)
    workers.sum_(tensors)
    objects, told = workers.gather_objects({"worker": workers.rank}), torch.full((2,), float(ranks.rank))
    intra_worker.broadcast_([told], 1)
    sent, between = (ranks.traffic.sent - before[0], ranks.traffic.between - before[1])
    assert (workers.rank, intra_worker.rank) == (worker, place)
    assert [*intra_worker.numbers] == [2 * worker, 2 * worker + 1]
    assert [*cross_worker.numbers] == [place, 2 + place]
    for n, one, other, summed in zip((1, 3, 4), gathered, later(), tensors, strict=True):
        row = torch.arange(n, dtype=torch.float64)
        assert torch.equal(one, torch.stack([row, row + 10]))
        assert torch.equal(other, one)
        assert torch.equal(summed, 2 * row + 10)
    assert objects == [{"worker": 0}, {"worker": 1}]
    assert told.tolist() == [2 * worker + 1.0] * 2
    assert 0 < between < sent


def refused_on_the_mesh(ranks: ProcessGroup, folder: Path) -> None:
    method = small_method("lte", target_modules="fc1,fc2", rest="freeze")
    refusals: dict[str, Callable[[], object]] = {
        "4 ranks cannot be divided into 3 workers of equal size: use one of 1, 2, 4": lambda: process_layout(ranks, 3),
        "workers=0 must be at least 1": lambda: process_layout(ranks, 0),
        "heads=2 for 4 workers": lambda: lowrank.apply_(mlp(), method, ranks=ranks),
    }
    for message, refusal in refusals.items():
        assert message in message_of(refusal)
