"""What ranks that hold a model in parts (FSDP2) do in the tests, each part also as one process:
``python -m tests.ranks.sharded FOLDER [start]``."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tests.models import gpt2, small_method, text_loss, tokens
from tests.ranks.launch import as_rank, assert_same, message_of
from tests.ranks.planned import counted
from torch import Tensor, nn

import lowrank
from lowrank.distributed.collectives import share
from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.sharded_checkpoint import save_sharded
from lowrank.distributed.shards import to_local
from lowrank.infra import checkpoint
from lowrank.infra.checkpoint import CheckpointError
from lowrank.methods import Use
from lowrank.plan.communication import forecast
from lowrank.plan.fsdp import shard_
from lowrank.train.checkpointing import (
    consolidated_model_state,
    consolidated_optimizer_state,
    load_model_,
    local_optimizer_state,
)
from lowrank.train.folder import SaveRole

BATCH, WIDTH, CLASSES = 8, 12, 5
Result = dict[str, Any]


class Block(nn.Module):
    """Wide, high and nearly square matrices; 9 columns do not go round 2 ranks, so fc3 is cut where it is projected."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 20), nn.Linear(20, 9, bias=False)
        self.fc3, self.fc4 = nn.Linear(9, 7), nn.Linear(7, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.fc4(F.gelu(self.fc3(self.fc2(F.gelu(self.fc1(x)))))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Reading(Block):
    """A block that also reads the weight of a layer that it calls."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.fc1.weight), self.fc4.weight[:, :1].repeat(1, 20))


def stack(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Stack().to(dtype)


def tall(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A matrix whose parts on two ranks are whole blocks of 256 numbers, and so is R at rank 4."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 128, bias=False), nn.GELU(), nn.Linear(128, CLASSES)).to(dtype)


def rows_of(ranks: ProcessGroup | None, heads: int) -> list[int]:
    """This rank's rows. Heads split the rows of each rank: one process sees them in the order that gives every head the
    same ones."""
    if ranks is not None:
        return list(share(BATCH, ranks.rank, ranks.count))
    size = BATCH // (2 * heads)
    return [rank * BATCH // 2 + head * size + i for head in range(heads) for rank in range(2) for i in range(size)]


def trained(
    ranks: ProcessGroup | None,
    method: lowrank.Method,
    *,
    heads: int = 1,
    sharded: bool = True,
    dtype: torch.dtype = torch.float64,
    make: Callable[[torch.dtype], nn.Module] = stack,
    reload_after: int | None = None,
    micro: int = 1,
    **options: Any,
) -> Result:
    """Seven steps on this rank's rows; weights and optimizer state, whole, and what was said at each step."""
    plan = lowrank.apply_(make(dtype), method, seed=3, ranks=ranks, workers=1)
    if ranks is not None and sharded:
        shard_(plan)
    opt = plan.optimizer(lr=1e-2, weight_decay=0.1, **options)
    said = []
    for step in range(7):
        before = ranks.traffic.sent if ranks else 0
        noise = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, WIDTH, generator=noise, dtype=torch.float64).to(dtype)
        y = torch.randint(0, CLASSES, (BATCH,), generator=noise)
        mine = rows_of(ranks, heads)
        for k in range(micro):
            part = mine[k::micro]
            (F.cross_entropy(plan.model(x[part]), y[part], reduction="sum") / BATCH).backward()
        opt.step()
        opt.zero_grad()
        said.append((ranks.traffic.sent if ranks else 0) - before)
        if step == reload_after:
            plan, opt = _reloaded(plan, opt, method, ranks, make(dtype), **options)
    state, moments = consolidated_model_state(plan), consolidated_optimizer_state(plan, opt)["state"]
    held = {"state_bytes": plan.state_bytes, "really": opt.state_bytes(), "notes": plan.notes, "table": str(plan)}
    held |= {"weights": plan.ledger.weights, "forecast": forecast(plan, ranks.count) if ranks else None}
    dims = {name: part.dim for name, part in plan.shards.items()}
    return {"state": state, "moments": moments, "said": said, "held": held, "dims": dims}


def _reloaded(
    plan: lowrank.Plan, opt: Any, method: lowrank.Method, ranks: ProcessGroup | None, model: nn.Module, **options: Any
) -> Any:
    """Saved in parts (one process: whole), made anew and loaded; then the same from the whole that rank 0 writes."""
    fresh = lowrank.apply_(model, method, seed=3, ranks=ranks, workers=1)
    if ranks is not None:
        shard_(fresh)
    other = fresh.optimizer(lr=1e-2, weight_decay=0.1, **options)
    with tempfile.TemporaryDirectory() as own:
        root = Path(own if ranks is None else ranks.gather_objects(own)[0])
        roles: tuple[SaveRole, ...] = ("sharded", "full") if ranks is not None else ("full",)
        found = []
        for step, role in enumerate(roles):
            what = (root, step, consolidated_model_state(plan, role), consolidated_optimizer_state(plan, opt, role), {})
            if role == "sharded" and ranks is not None:
                save_sharded(*what, ranks=ranks, writer=ranks.rank == 1)
            elif ranks is None or ranks.rank == 0:
                checkpoint.save(*what)
            if ranks is not None:
                ranks.total(0.0)
            saved = checkpoint.load(checkpoint.latest(root))
            load_model_(fresh, saved)
            other.load_state_dict(local_optimizer_state(fresh, other, saved))
            found.append(
                (
                    saved.tensors,
                    saved.optimizer["state"],
                    {n: to_local(p).clone() for n, p in fresh.model.named_parameters()},
                )
            )
        if ranks is not None:
            assert_same(found[0], found[1])
            ranks.total(0.0)
    return fresh, other


def tied(ranks: ProcessGroup | None, *, method: lowrank.Method, chunked: bool = False) -> Result:
    """GPT-2: weights stored transposed, fused projections, the output tied to the embedding; the loss in chunks."""
    from lowrank.models import text

    plan = lowrank.apply_(gpt2().double(), method, seed=3, ranks=ranks, workers=1)
    if ranks is not None:
        shard_(plan)
    opt = plan.optimizer(lr=1e-2)
    for step in range(4):
        ids = tokens(4, seed=step)
        if ranks is not None:
            ids = ids[list(share(4, ranks.rank, ranks.count))]
        if chunked:
            before, text.CHUNK_ABOVE = text.CHUNK_ABOVE, 64
            loss = text.next_token_loss(plan.model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}) / 20
            text.CHUNK_ABOVE = before
        else:
            loss = text_loss(plan.model, ids) * len(ids) / 4
        loss.backward()
        opt.step()
        opt.zero_grad()
    return {"state": consolidated_model_state(plan), "moments": consolidated_optimizer_state(plan, opt)["state"]}


def refused(ranks: ProcessGroup | None) -> Result:
    """What cannot be, each with its message."""
    assert ranks is not None
    messages: dict[str, str] = {}

    def note(name: str, function: Callable[[], object]) -> None:
        messages[name] = message_of(function)

    full = lowrank.methods.full()
    together = partial(lowrank.apply_, ranks=ranks, workers=1)
    plan = together(stack(), full)
    shard_(plan)
    note("twice", lambda: shard_(plan))
    note("order", lambda: together(plan.model, full))
    note("unload", lambda: lowrank.merge_and_unload(plan.model))
    note("apart", lambda: shard_(lowrank.apply_(stack(), small_method("lte", target_modules="fc1"), ranks=ranks)))
    note("rule", lambda: shard_(together(stack(), small_method("galore_adafactor", target_modules="fc1"))))
    note("alone", lambda: shard_(lowrank.apply_(stack(), full)))
    mixed = stack()
    mixed.head.float()
    note("dtypes", lambda: shard_(together(mixed, full)))
    other = stack()
    with torch.no_grad():
        other.head.bias += ranks.rank
    note("weights", lambda: shard_(together(other, full)))
    note("read", lambda: _one_step(together(_reading(), small_method("lora", target_modules="fc1,fc3"))))
    note("read apart", lambda: _one_step(together(_reading(), small_method("lora", target_modules="fc2,fc3"))))
    opt = plan.optimizer()
    note("forget", lambda: opt.forget([opt.param_groups[0]["params"][0]], 0.5))
    return messages


def _reading() -> nn.Module:
    model = stack()
    model.blocks[1] = Reading().double()
    return model


def _one_step(plan: lowrank.Plan) -> None:
    shard_(plan)
    opt = plan.optimizer(lr=1e-2)
    plan.model(torch.ones(2, WIDTH, dtype=torch.float64)).sum().backward()
    opt.step()


def unsaved(ranks: ProcessGroup, folder: Path) -> Result:
    """A checkpoint in parts that one rank cannot write, for want of room; and one of which a part has been spoilt."""
    assert ranks is not None
    plan = lowrank.apply_(stack(), lowrank.methods.full(), ranks=ranks, workers=1)
    shard_(plan)
    opt = plan.optimizer()
    root = folder / "unsaved"

    def save(step: int) -> None:
        what = (
            root,
            step,
            consolidated_model_state(plan, "sharded"),
            consolidated_optimizer_state(plan, opt, "sharded"),
            {"n": 1},
        )
        save_sharded(*what, ranks=ranks, writer=ranks.rank == 0)

    save(1)
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    messages = {}
    write = HuggingFaceStorageWriter.write_data
    HuggingFaceStorageWriter.write_data = full if ranks.rank == 1 else write  # type: ignore[method-assign]
    try:
        save(2)
    except CheckpointError as error:
        messages["full"] = str(error)
    HuggingFaceStorageWriter.write_data = write  # type: ignore[method-assign]
    ranks.total(0.0)
    messages["left"] = ", ".join(sorted(path.name for path in root.iterdir()))
    ranks.total(0.0)  # so that nobody sees the next one being written
    save(3)
    ranks.total(0.0)
    if ranks.rank == 0:
        (root / "step-00000003" / "model" / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"spoilt")
    ranks.total(0.0)
    try:
        checkpoint.load(root / "step-00000003")
    except CheckpointError as error:
        messages["spoilt"] = str(error)
    return messages


def galore(**options: Any) -> lowrank.Method:
    return small_method("galore", target_modules="all-linear", refresh_every=3, **options)


FC = "fc1,fc2,fc3"
EIGHT = (Use("0", lowrank.optim.AdamW(storage="int8")), Use("*", lowrank.optim.AdamW()))
# name -> (the function, how far one process may be: 0 for rounding, else the share of what seven steps move)
SCENARIOS: dict[str, tuple[Callable[..., Result], float]] = {
    "full": (partial(trained, method=lowrank.methods.full()), 0),
    "full-per-layer": (partial(trained, method=lowrank.methods.full(), per_layer=True, clip_per_layer=0.1), 0),
    "galore": (partial(trained, method=galore()), 0),
    "galore-rotate": (partial(trained, method=galore(transport="rotate")), 0),
    "galore-reset-long": (partial(trained, method=galore(transport="reset", side="long")), 0),
    "galore-both": (partial(trained, method=galore(side="both", basis="svd")), 0),
    "galore-lazy": (partial(trained, method=galore(lazy=True)), 0),
    "galore-per-layer": (partial(trained, method=galore(), per_layer=True, accumulate=2, micro=2), 0),
    "galore-reloaded": (partial(trained, method=galore(), reload_after=3), 0),
    "8bit-aligned": (
        partial(trained, method=small_method("galore_8bit", target_modules="0", rank=4), make=tall, reload_after=3),
        0,
    ),
    "8bit-full": (partial(trained, method=lowrank.Method(rules=EIGHT), make=tall), 0),
    "galore_8bit": (partial(trained, method=small_method("galore_8bit", target_modules="all-linear")), 0.05),
    "8bit-reloaded": (
        partial(trained, method=small_method("galore_8bit", target_modules="all-linear"), reload_after=3),
        0.05,
    ),
    "apollo": (partial(trained, method=small_method("apollo", target_modules="all-linear")), 0),
    "apollo_mini": (partial(trained, method=small_method("apollo_mini", target_modules="all-linear", rank=1)), 0),
    "muon": (partial(trained, method=small_method("muon", target_modules="all-linear"), reload_after=3), 0),
    "fira": (partial(trained, method=small_method("fira", target_modules="all-linear")), 0),
    "lora": (partial(trained, method=small_method("lora", target_modules=FC)), 0),
    "dora": (partial(trained, method=small_method("dora", target_modules=FC)), 0),
    "pissa": (partial(trained, method=small_method("pissa", target_modules=FC)), 0),
    "relora": (partial(trained, method=small_method("relora", target_modules=FC), reload_after=4), 0),
    "lte": (partial(trained, method=small_method("lte", target_modules=FC), heads=2), 0),
    "lte-ddp": (partial(trained, method=small_method("lte", target_modules=FC), heads=2, sharded=False), 0),
    "bf16-galore": (partial(trained, method=galore(), dtype=torch.bfloat16), 0.5),
    "bf16-lora": (partial(trained, method=small_method("relora", target_modules=FC), dtype=torch.bfloat16), 0.5),
    "lte_galore": (partial(trained, method=small_method("lte_galore", target_modules=FC), heads=2), 0),
    "tied-full": (partial(tied, method=lowrank.methods.full()), 0),
    "tied-lora": (
        partial(tied, method=small_method("lora", target_modules="attention,lm_head"), chunked=True),
        0,
    ),
    "tied-galore": (partial(tied, method=small_method("galore", embeddings="project", target_modules="all-linear")), 0),
    "tied-lte": (partial(tied, method=small_method("lte", target_modules="mlp,lm_head", heads=1)), 0),
}


def tiny_run() -> Any:
    """Nine steps of 8-bit GaLore on a LLaMA of two layers, sharded."""
    from lowrank.recipes.llama import llama_mini
    from lowrank.run.overrides import override, resolve

    size = {"model.n_layer": 2, "model.n_head": 2, "model.hidden": 16, "model.feed_forward": 24, "data.context": 16}
    run = {"method": "galore_8bit", "method.rank": 4, "steps": 9, "engine": "fsdp", "batch-size": 8, "device": "cpu"}
    often = {"eval-every": 3, "eval-batches": 5, "checkpoint-every": 3, "method.refresh_every": 2, "max-grad-norm": 0.5}
    return resolve(override(llama_mini(), {**run, **size, **often}))


def disks(ranks: ProcessGroup, folder: Path) -> Result:
    """As if each rank were a node with a disk of its own: each keeps the whole, and a lost one gets it back."""
    from lowrank.train.loop import train

    local_rank, os.environ["LOCAL_RANK"] = os.environ["LOCAL_RANK"], "0"
    own = folder / f"disk-{ranks.rank}"
    train(replace(tiny_run(), stop_at=3), own, elastic=True, quiet=True)
    names = sorted(path.name for path in checkpoint.latest(own / "checkpoints").iterdir())
    if ranks.rank == 1:
        shutil.rmtree(own)
    ranks.total(0.0)
    summary = train(tiny_run(), own, elastic=True, quiet=True)
    os.environ["LOCAL_RANK"] = local_rank
    return {"names": names, "summary": summary}


def found(ranks: ProcessGroup, folder: Path, *, start: bool) -> Result | None:
    """Four ranks start a run and stop after three steps; two go on with it to the sixth, after the rest."""
    from lowrank.train.loop import train

    if start:
        train(replace(tiny_run(), stop_at=3), folder / "run", quiet=True)
        return None
    found: Result = {name: function(ranks) for name, (function, _) in SCENARIOS.items()}
    found["planned"] = counted(ranks, ("full-ddp", "galore-fsdp"))
    found["refused"], found["unsaved"] = refused(ranks), unsaved(ranks, folder)
    train(replace(tiny_run(), stop_at=6), folder / "run", resume=True, quiet=True)
    return {**found, "disks": disks(ranks, folder)}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    as_rank(place, "sharded", partial(found, folder=place, start="start" in sys.argv[2:]))
