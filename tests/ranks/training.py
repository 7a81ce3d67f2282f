"""What ranks train in the tests, each also as one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tests.models import gpt2, mlp, text_loss, tokens
from tests.ranks.claims import assert_same
from torch import Tensor, nn

import lowrank
from lowrank.distributed.collectives import Traffic, share
from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.sharded_checkpoint import save_sharded
from lowrank.distributed.shards import to_local
from lowrank.infra import checkpoint
from lowrank.plan.communication import forecast
from lowrank.plan.fsdp import shard_
from lowrank.plan.synchronisation import consolidated_model
from lowrank.train.checkpointing import (
    consolidated_model_state,
    consolidated_optimizer_state,
    load_model_,
    local_optimizer_state,
)
from lowrank.train.folder import SaveRole

BATCH, WIDTH, CLASSES = 12, 12, 4
Result = dict[str, Any]


def plain(dtype: torch.dtype = torch.float64) -> nn.Module:
    return mlp(dtype, width=WIDTH)


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


def stack(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Stack().to(dtype)


def tall(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A matrix whose parts on two ranks are whole blocks of 256 numbers, and so is R at rank 4."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 128, bias=False), nn.GELU(), nn.Linear(128, CLASSES)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, WIDTH, generator=noise, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, CLASSES, (BATCH,), generator=noise)


def rows_of(ranks: ProcessGroup | None, heads: int) -> list[int]:
    """This rank's rows. Where heads split the rows of each rank, one process sees them in the order that gives every
    head the same ones."""
    if ranks is not None:
        return list(share(BATCH, ranks.rank, ranks.count))
    size = BATCH // (2 * heads)
    return [rank * BATCH // 2 + head * size + i for head in range(heads) for rank in range(2) for i in range(size)]


def trained(
    ranks: ProcessGroup | None,
    method: lowrank.Method,
    *,
    make: Callable[[torch.dtype], nn.Module] = plain,
    dtype: torch.dtype = torch.float64,
    steps: int = 7,
    workers: int | None = None,
    sharded: bool = False,
    heads: int = 1,
    poison: bool = False,
    early: bool = False,
    micro: int = 1,
    reload_after: int | None = None,
    **options: Any,
) -> Result:
    """A few steps on this rank's rows of each batch: the whole model and its state after them, and what was sent and
    held at each step. ``poison``: in the second step a gradient of the last rank is not finite."""
    plan = lowrank.apply_(make(dtype), method, seed=3, ranks=ranks, workers=workers)
    if sharded and ranks is not None:
        shard_(plan)
    opt = plan.optimizer(lr=1e-2, weight_decay=0.1, **options)
    if early:
        opt.sum_during_backward()
    said, between, local, rows = [], [], [], rows_of(ranks, heads)
    for step in range(steps):
        before = Traffic(**vars(ranks.traffic)) if ranks else Traffic()
        x, y = batch(step, dtype)
        opt.synchroniser.progress.add_tokens(len(rows))
        for k in range(micro):
            part = rows[k::micro]
            (F.cross_entropy(plan.model(x[part]), y[part], reduction="sum") / BATCH).backward()
        if poison and ranks and ranks.rank == ranks.count - 1 and step == 1:
            plan.own[0].grad.fill_(float("nan"))
        opt.step()
        opt.zero_grad()
        after = ranks.traffic if ranks else Traffic()
        said.append((after.collectives - before.collectives, after.sent - before.sent))
        between.append(after.between - before.between)
        local.append(plain_weights(plan))
        if step == reload_after:
            plan, opt = reloaded(plan, opt, method, ranks, make(dtype), **options)
    held = {"planned": plan.state_bytes, "really": opt.state_bytes(), "weights": plan.ledger.weights}
    own = {"said": said, "between": between, "weights": local, "held": held, "table": str(plan), "notes": plan.notes}
    own |= {"left_out": list(opt.synchroniser.left_out), "dims": {name: each.dim for name, each in plan.shards.items()}}
    if ranks is not None and workers is not None:
        own["forecast"] = forecast(plan, ranks.count)
    output = whole_output(plan, opt, dtype)
    with consolidated_model(plan, opt):
        state = {name: t.clone() for name, t in consolidated_model_state(plan).items()}
        moments = consolidated_optimizer_state(plan, opt)["state"]
    return {"state": state, "moments": moments, "output": output, "own": own}


def plain_weights(plan: lowrank.Plan) -> dict[str, Tensor]:
    """This rank's weights without adapters; those in parts put together."""
    return {n: t.detach().clone() for n, t in consolidated_model_state(plan).items() if ".adapters." not in n}


def whole_output(plan: lowrank.Plan, opt: lowrank.Optimizer, dtype: torch.dtype = torch.float64) -> Tensor:
    with consolidated_model(plan, opt), torch.no_grad():
        output = plan.model.eval()(batch(99, dtype)[0])
    plan.model.train()
    return output


def reloaded(
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
            local = {n: to_local(p).clone() for n, p in fresh.model.named_parameters()}
            found.append((saved.tensors, saved.optimizer["state"], local))
        if ranks is not None:
            assert_same(found[0], found[1])
            ranks.total(0.0)
    return fresh, other


def tied(
    ranks: ProcessGroup | None, method: lowrank.Method, *, workers: int, sharded: bool, chunked: bool = False
) -> Result:
    """GPT-2: weights stored transposed, fused projections, the output tied to the embedding; the loss in chunks."""
    from lowrank.models import text

    plan = lowrank.apply_(gpt2().double(), method, seed=3, ranks=ranks, workers=workers)
    if ranks is not None and sharded:
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
    moments = consolidated_optimizer_state(plan, opt)["state"]
    state = {name: t.clone() for name, t in consolidated_model_state(plan).items()}
    return {"state": state, "moments": moments, "output": torch.zeros(())}


def met(
    ranks: ProcessGroup | None, method: lowrank.Method, *, rows: tuple[int, int] = (6, 6), steps: int = 6
) -> Result:
    """Merges by hand, each with what it is made of: this rank's changes before, the weights after, the whole model's
    output on both sides, and the bytes. ``rows`` of each batch are each rank's."""
    assert ranks is not None
    model = plain()
    plan = lowrank.apply_(model, method, seed=3, ranks=ranks)
    opt = plan.optimizer(lr=1e-2, merge="manual")
    first = sum(rows[: ranks.rank])
    merges: list[Result] = []
    for step in range(steps):
        x, y = (t[first : first + rows[ranks.rank]] for t in batch(step))
        opt.synchroniser.progress.add_tokens(len(x))
        (F.cross_entropy(model(x), y, reduction="sum") / BATCH).backward()
        opt.step()
        opt.zero_grad()
        if step % 3 == 2:
            made = {"before": plain_weights(plan), "changes": {n: a.delta() for n, a in plan.adapters.items()}}
            made["output before"] = whole_output(plan, opt)
            sent = ranks.traffic.sent
            lowrank.merge_(plan, opt)
            merges.append({**made, "sent": ranks.traffic.sent - sent, "after": plain_weights(plan)})
            merges[-1]["output after"] = whole_output(plan, opt)
    return {"merges": merges}
