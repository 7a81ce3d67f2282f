"""What several ranks do in the tests, each part also as one process: ``python -m tests.ranks.worker FOLDER``.

A scenario is a function of the ranks (None for one process) whose tensors are compared. The worker runs all of them in
one group, as starting processes is what takes time, and saves what each rank has found.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from tests.models import mlp, small_method
from tests.ranks.launch import as_rank, message_of
from tests.runs.tiny import tiny

import lowrank
from lowrank.distributed.collectives import Traffic, share
from lowrank.distributed.process_group import ProcessGroup
from lowrank.plan.communication import forecast
from lowrank.plan.fsdp import shard_
from lowrank.plan.synchronisation import consolidated_model
from lowrank.train.changed_data import check_data
from lowrank.train.checkpointing import consolidated_model_state, consolidated_optimizer_state

BATCH, WIDTH, CLASSES = 12, 10, 4
Result = dict[str, Any]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, WIDTH, generator=noise, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=noise)


def trained(
    ranks: ProcessGroup | None,
    method: lowrank.Method,
    *,
    steps: int = 7,
    per_layer: bool = False,
    poison: int | None = None,
    workers: int | None = None,
    sharded: bool = False,
    early: bool = False,
) -> Result:
    """A few steps on this rank's rows of each batch; the whole model after them, and what was said at each step."""
    model = mlp(torch.float64)
    plan = lowrank.apply_(model, method, seed=3, ranks=ranks, workers=workers)
    if sharded:
        shard_(plan)
    opt = plan.optimizer(lr=1e-2, weight_decay=0.1, per_layer=per_layer)
    if early:
        opt.sum_during_backward()
    said, between, local = [], [], []
    for step in range(steps):
        before = Traffic(**vars(ranks.traffic)) if ranks else Traffic()
        x, y = batch(step)
        rows = share(BATCH, *(0, 1) if ranks is None else (ranks.rank, ranks.count))
        loss = F.cross_entropy(model(x[rows.start : rows.stop]), y[rows.start : rows.stop], reduction="sum") / BATCH
        opt.synchroniser.progress.add_tokens(len(rows))
        loss.backward()
        if ranks and ranks.rank == poison and step == 1:
            plan.own[0].grad.fill_(float("nan"))
        opt.step()
        opt.zero_grad()
        after = ranks.traffic if ranks else Traffic()
        said.append((after.collectives - before.collectives, after.sent - before.sent))
        between.append(after.between - before.between)
        local.append(plain_weights(plan))
    with consolidated_model(plan, opt):
        state = {name: t.clone() for name, t in consolidated_model_state(plan).items()}
        moments = consolidated_optimizer_state(plan, opt)
        x, _ = batch(99)
        output = model.eval()(x).detach()
    own = {"left_out": list(opt.synchroniser.left_out), "said": said, "weights": local, "notes": plan.notes}
    if ranks is not None and workers is not None:
        own |= {"forecast": forecast(plan, ranks.count), "between": between}
    return {"state": state, "moments": moments["state"], "output": output, "own": own}


def met(
    ranks: ProcessGroup | None, method: lowrank.Method, *, rows: tuple[int, int] = (6, 6), steps: int = 6
) -> Result:
    """Merges by hand, each with what it is made of: this rank's changes before, the weights after, the whole model's
    output on both sides, and the bytes. ``rows`` of each batch are each rank's."""
    assert ranks is not None
    model = mlp(torch.float64)
    plan = lowrank.apply_(model, method, seed=3, ranks=ranks)
    opt = plan.optimizer(lr=1e-2, merge="manual")
    first = sum(rows[: ranks.rank])
    found: list[Result] = []
    for step in range(steps):
        x, y = (t[first : first + rows[ranks.rank]] for t in batch(step))
        opt.synchroniser.progress.add_tokens(len(x))
        (F.cross_entropy(model(x), y, reduction="sum") / BATCH).backward()
        opt.step()
        opt.zero_grad()
        if step % 3 == 2:
            made = {"before": weights_of(model), "changes": {n: a.delta() for n, a in plan.adapters.items()}}
            made["output before"] = whole_output(plan, opt)
            sent = ranks.traffic.sent
            lowrank.merge_(plan, opt)
            found.append({**made, "sent": ranks.traffic.sent - sent, "after": weights_of(model)})
            found[-1]["output after"] = whole_output(plan, opt)
    return {"merges": found}


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." not in n}


def plain_weights(plan: lowrank.Plan) -> dict[str, torch.Tensor]:
    """This rank's weights without adapters; those in parts put together."""
    return {n: t.detach().clone() for n, t in consolidated_model_state(plan).items() if ".adapters." not in n}


def whole_output(plan: lowrank.Plan, opt: lowrank.Optimizer) -> torch.Tensor:
    with consolidated_model(plan, opt), torch.no_grad():
        output = plan.model.eval()(batch(99)[0])
    plan.model.train()
    return output


def unused(ranks: ProcessGroup | None) -> Result:
    """Each rank leaves another head unused, in one of two micro-batches or in both; sums early and late."""
    assert ranks is not None
    weights, messages = [], []
    for early in (False, True):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({name: torch.nn.Linear(WIDTH, 2).double() for name in ("a", "b", "c")})
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
        weights.append(weights_of(model))
        model["a"](x).sum().backward()
        opt.zero_grad()
        if early:
            try:
                for _ in range(3):
                    model["a"](x).sum().backward()
            except RuntimeError as error:
                messages.append(str(error))
            opt.zero_grad()
    return {"weights": weights, "messages": messages}


def disagreeing(ranks: ProcessGroup | None) -> Result:
    assert ranks is not None
    ranks.agree({"step": 3, "code": "1"})
    run, own = tiny(), tiny(own_data=True)
    saved: Any = SimpleNamespace(meta={"data_of_ranks": ["one", "other"]})
    mine, theirs = ("one", "other")[ranks.rank], ("other", "one")[ranks.rank]
    return {
        "message": message_of(lambda: ranks.agree({"step": 3 + ranks.rank, "code": "1"})),
        "data": [
            message_of(lambda: check_data(run, mine, None, ranks)),
            message_of(lambda: check_data(run, theirs if ranks.rank else mine, saved, ranks)),
            message_of(lambda: check_data(own, mine, saved, ranks, worker=ranks.rank)),
            message_of(lambda: check_data(own, theirs, saved, ranks, worker=ranks.rank)),
        ],
        "allowed": check_data(run, mine, saved, ranks, allowed=True),
    }


def talking(ranks: ProcessGroup | None) -> Result:
    """Sums and gatherings of a few shapes and dtypes, with the bytes counted."""
    assert ranks is not None
    before = ranks.traffic.sent
    mine = [
        torch.full((5,), 1.0 + ranks.rank),
        torch.full((2, 3), 2.0, dtype=torch.bfloat16),
        torch.ones((), dtype=torch.float64),
    ]
    gathered = ranks.gather([torch.full((2,), ranks.rank), torch.full((3,), 0.5)])
    ranks.sum_(mine)
    objects = ranks.gather_objects({"rank": ranks.rank, "text": "x" * ranks.rank})
    counted = ranks.traffic.sent - before
    return {"sums": mine, "gathered": gathered, "objects": objects, "counted": counted, "listens": listens()}


def files_of(folder: Path | None) -> dict[str, bytes]:
    inside = [] if folder is None else [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder or ".")): path.read_bytes() for path in inside}


def listens() -> set[str]:
    """The addresses, as the kernel writes them, at which this process listens."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links}


def talking_later(ranks: ProcessGroup | None) -> Result:
    """What is under way while rank 1 sleeps."""
    assert ranks is not None
    began, mine = time.perf_counter(), torch.full((2,), 1.0 + ranks.rank)
    if ranks.rank == 1:
        time.sleep(1.0)
        began = time.perf_counter()
    summing, gathering = ranks.start_sum([mine]), ranks.start_gather([torch.full((1,), float(ranks.rank))])
    started = time.perf_counter()
    summing()
    gathered = gathering()[0]
    arrived = time.perf_counter()
    return {"waited before": started - began, "waited after": arrived - started, "sum": mine, "gathered": gathered}


def lte(**options: Any) -> lowrank.Method:
    return small_method("lte", target_modules="fc1,fc2", **options)


def explorers(**options: Any) -> lowrank.Method:
    return small_method("lte_galore", kind="explorers", alpha=None, target_modules="fc1,fc2", **options)


# name -> (the function, whether one process gives the same numbers)
SCENARIOS: dict[str, tuple[Callable[[ProcessGroup | None], Result], bool]] = {
    "lte": (partial(trained, method=lte(rest="freeze")), True),
    "lte-train": (partial(trained, method=lte(rest="train")), True),
    "lte-reset": (partial(trained, method=lte(rest="freeze", keep=False)), True),
    "lte-reset-train": (partial(trained, method=lte(rest="train", keep=False)), True),
    "lte-four-heads": (partial(trained, method=lte(rest="train", heads=4)), True),
    "lte-per-layer": (partial(trained, method=lte(rest="train"), per_layer=True), True),
    "lte-dense": (partial(trained, method=lte(rest="freeze", rank=6, heads=4)), True),
    "lte-uneven": (partial(trained, method=lte(rest="freeze", heads=3)), False),
    "lte-local": (partial(trained, method=lte(rest="auto", rest_every=6)), False),
    "lte-outer": (partial(trained, method=lte(rest="freeze", outer_lr=0.7, outer_momentum=0.9)), True),
    "lte-outer-reset-dense": (
        partial(trained, method=lte(rest="freeze", rank=6, heads=4, keep=False, outer_lr=0.7, outer_momentum=0.9)),
        True,
    ),
    "lte-tokens-even": (partial(trained, method=lte(rest="freeze", weigh="tokens")), True),
    **{
        f"lte-{exchange}{kind}": (
            partial(trained, method=lte(rest_every=6, rest="local", exchange=exchange, **o)),
            False,
        )
        for exchange in ("bfloat16", "int8")
        for kind, o in {"": {}, "-dense": {"rank": 8, "heads": 4}, "-reset": {"keep": False}}.items()
    },
    "lte-2bit": (partial(trained, method=lte(rest_every=6, rest="local", exchange="2bit")), False),
    "lte-topk3-dense": (
        partial(trained, method=lte(rest_every=6, rest="local", exchange="topk3", rank=8, heads=4)),
        False,
    ),
    "lte-fragments": (partial(trained, method=lte(rest="train", fragments=2, outer_momentum=0.5)), True),
    "lte-fragments-local": (
        partial(trained, method=lte(rest="local", rest_every=6, fragments=2, exchange="2bit")),
        False,
    ),
    "lte-fragments-overlap": (
        partial(trained, method=lte(rest="freeze", fragments=2, overlap=True, exchange="topk3"), steps=10),
        False,
    ),
    "lte-overlap": (partial(trained, method=lte(rest="freeze", overlap=True), steps=10), True),
    "lte-overlap-dense-outer": (
        partial(trained, method=lte(rest="train", rank=6, heads=4, overlap=True, outer_momentum=0.9), steps=10),
        True,
    ),
    "lte-overlap-int8": (partial(trained, method=lte(rest="freeze", overlap=True, exchange="int8"), steps=10), False),
    "lte-overlap-nan": (partial(trained, method=lte(rest="freeze", overlap=True), steps=10, poison=1), False),
    "met": (partial(met, method=lte(rest="freeze")), False),
    "met-tokens": (partial(met, method=lte(rest="freeze", weigh="tokens"), rows=(8, 4)), False),
    "met-tokens-dense": (
        partial(met, method=lte(rest="freeze", weigh="tokens", rank=6, heads=4), rows=(8, 4)),
        False,
    ),
    "met-steps": (partial(met, method=lte(rest="freeze", heads=3, weigh="steps")), False),
    "met-seconds": (partial(met, method=lte(rest="freeze", weigh="seconds")), False),
    "met-int8": (partial(met, method=lte(rest="freeze", exchange="int8")), False),
    "met-2bit": (partial(met, method=lte(rest="freeze", exchange="2bit")), False),
    "met-topk3": (partial(met, method=lte(rest="freeze", exchange="topk3", weigh="tokens")), False),
    "met-bfloat16": (partial(met, method=lte(rest="freeze", exchange="bfloat16")), False),
    "met-int8-dense": (partial(met, method=lte(rest="freeze", exchange="int8", rank=8, heads=4)), False),
    "lte-nan": (partial(trained, method=lte(rest="local", rest_every=6), poison=1), False),
    "full-local": (partial(trained, method=lowrank.methods.full(rest="local")), False),
    "explorers": (partial(trained, method=explorers()), True),
    "explorers-svd": (partial(trained, method=explorers(basis="svd", heads=4)), True),
    "explorers-gaussian": (partial(trained, method=explorers(basis="gaussian")), True),
    "explorers-per-layer": (partial(trained, method=explorers(), per_layer=True), True),
    "explorers-frozen": (partial(trained, method=explorers(freeze="*")), True),
    "explorers-outer": (partial(trained, method=explorers(outer_lr=0.7, outer_momentum=0.9)), True),
    "explorers-int8": (partial(trained, method=explorers(exchange="int8")), False),
    "explorers-topk3": (partial(trained, method=explorers(exchange="topk3")), False),
    "explorers-nan": (partial(trained, method=explorers(freeze="*"), poison=1), False),
    **{
        name: (partial(trained, method=small_method(name, **extra)), True)
        for name, extra in {
            "full": {},
            "lora": {"target_modules": "fc1,fc2"},
            "dora": {"target_modules": "fc1,fc2"},
            "multihead_lora": {"target_modules": "fc1,fc2"},
            "relora": {"target_modules": "fc1,fc2"},
            "galore": {"target_modules": "all-linear", "refresh_every": 3},
            "apollo": {"target_modules": "all-linear"},
        }.items()
    },
    "full-early": (partial(trained, method=lowrank.methods.full(), early=True), True),
    "lte-train-early": (partial(trained, method=lte(rest="train"), early=True), True),
    "apollo-early": (partial(trained, method=small_method("apollo", target_modules="all-linear"), early=True), True),
    "galore-early": (
        partial(trained, method=small_method("galore", target_modules="all-linear", refresh_every=3), early=True),
        True,
    ),
    "galore-per-layer": (
        partial(trained, method=small_method("galore", target_modules="all-linear", refresh_every=3), per_layer=True),
        True,
    ),
    "unused": (unused, False),
    "disagreeing": (disagreeing, False),
    "talking": (talking, False),
    "talking later": (talking_later, False),
}


def tiny_run() -> Any:
    """Nine steps of two micro-batches of LTE on a GPT-2 of one layer, the rest synchronised."""
    from lowrank.recipes.gpt import gpt_mini
    from lowrank.run.overrides import override, resolve

    size = {"model.n_layer": 1, "model.n_head": 1, "model.n_embd": 8, "data.context": 16, "model.context": 16}
    small = {**size, "batch-size": 4, "grad-accum": 2, "eval-every": 6, "eval-batches": 3, "checkpoint-every": 6}
    lte_run = {"method": "lte", "method.merge_every": 3, "method.rank": 2, "steps": 9, "method.rest": "train", **small}
    return resolve(override(gpt_mini(), lte_run))


def runs(folder: Path) -> dict[str, Result]:
    """The loop itself: a run; one that a single rank is asked to stop, and that goes on; the same never stopped."""
    from lowrank.run.overrides import override, resolve
    from lowrank.train.coordinator import Coordinator
    from lowrank.train.loop import train

    base = tiny_run()
    found = {"run": train(base, folder / "run", quiet=True)}

    after_step = Coordinator.after_step

    def stopped(self: Coordinator, record: Any, stop: bool, steps: int) -> Any:
        if self.ranks is not None and self.ranks.rank == 1 and steps == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return after_step(self, record, stop, steps)

    Coordinator.after_step = stopped  # type: ignore[method-assign]
    options = {"rest": "freeze", "outer_momentum": 0.9, "exchange": "2bit", "overlap": True}
    silent = resolve(override(base, {f"method.{name}": value for name, value in options.items()}))
    found["stopped"] = train(silent, folder / "stopped", quiet=True)
    Coordinator.after_step = after_step  # type: ignore[method-assign]
    found["resumed"] = train(silent, folder / "stopped", resume=True, quiet=True)
    found["straight"] = train(silent, folder / "straight", quiet=True)
    mine = folder / f"text-{os.environ['RANK']}.txt"
    mine.write_text(f"Rank {os.environ['RANK']} reads this. " * (200 + 100 * int(os.environ["RANK"])))
    own = {"own-data": True, "data": mine, "method.weigh": "tokens", "method.rest": "freeze", "batch-size": 5}
    weighed = resolve(override(base, {**{name: str(value) for name, value in own.items()}, "eval-batches": None}))
    found["own"] = train(weighed, folder / "own", quiet=True)
    train(override(weighed, {"stop-at": 5}), folder / "own-stopped", quiet=True)
    found["own-resumed"] = train(weighed, folder / "own-stopped", resume=True, quiet=True)
    together = {"method.weigh": "equal", "engine": "ddp", "method.rest": "train", "method.heads": 1}
    found["own-ddp"] = train(resolve(override(weighed, together)), folder / "own-ddp", quiet=True)
    return found


def nodes(ranks: ProcessGroup, folder: Path) -> Result:
    """As if each rank were a node with a disk of its own: who keeps the run, and what a lost or spoilt disk gets."""
    from lowrank.infra.checkpoint import CheckpointError
    from lowrank.run.overrides import override, resolve
    from lowrank.train.elastic import newest
    from lowrank.train.folder import is_writer
    from lowrank.train.loop import train

    kept = {"one node": is_writer(folder / "shared", ranks)}
    local, os.environ["LOCAL_RANK"] = os.environ["LOCAL_RANK"], "0"
    own = folder / f"node-{ranks.rank}"
    kept |= {"one disk": is_writer(folder / "shared", ranks), "two disks": is_writer(own, ranks)}
    base = resolve(override(tiny_run(), {"method.rest": "local", "checkpoint-every": 3}))
    train(resolve(override(base, {"stop-at": 6})), own, elastic=True, quiet=True)
    folders = sorted(path.name for path in (own / "checkpoints").iterdir())
    if ranks.rank == 1:
        shutil.rmtree(own)
    ranks.total(0.0)
    found, told = newest(own, ranks, writer=True)
    files = files_of(found)
    if ranks.rank == 0 and found is not None:
        (found / "optimizer.safetensors").write_bytes(b"spoilt")
    ranks.total(0.0)
    again, mended = newest(own, ranks, writer=True)
    mended_files = files_of(again)
    if ranks.rank == 1:
        shutil.rmtree(own)
    summary = train(base, own, elastic=True, quiet=True)
    ended = train(base, own, elastic=True, quiet=True)
    blind = ""
    try:
        newest(own if ranks.rank == 0 else folder / "nowhere", ranks, writer=ranks.rank == 0)
    except CheckpointError as error:
        blind = str(error)
    os.environ["LOCAL_RANK"] = local
    return {
        "kept": kept,
        "folders": folders,
        "told": [told, mended],
        "files": [files, mended_files],
        "summaries": [summary, ended],
        "blind": blind,
    }


def found(ranks: ProcessGroup, folder: Path) -> Result:
    everything = {name: function(ranks) for name, (function, _) in SCENARIOS.items()}
    return {**everything, "runs": runs(folder), "nodes": nodes(ranks, folder)}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    as_rank(place, "rank", partial(found, folder=place))
