"""Tokens per second of LTE against DDP on a link of 100 Mbit/s, beside what ``lowrank plan --link`` predicts.

    python -m benchmarks.link

Two processes of this machine, a core each, in two network namespaces, joined by a virtual cable that ``tc`` throttles
in either direction (token bucket, a sixth of a kB of burst for each Mbit/s). The namespaces belong to the processes and
go with them; no right beyond ``unshare`` is needed. In one run, on the same rows of the same batches (4 × 128 bytes of
text a rank and step):

    ddp          full training with torch's DistributedDataParallel, which sends while it computes backwards
    full         the same by ``lowrank train``, which does so too, and with its sums after the backward pass
    attention    LTE on the attention layers, the rest averaged every 40 steps (the defaults)
    all-linear   LTE on every linear layer

for gpt-mini (0.8 M parameters) and the shape of babygpt (6 layers 384 wide, 10.7 M). What is predicted comes from the
bytes, from 100 Mbit/s, from the measured time of a message, and from each method's own step on this machine with
nothing to send, measured by both at once. Goal: 5 times DDP's tokens per second or more. The larger model's full
training is measured at 1 Gbit/s too, where sending and computing take about as long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import save
from lowrank.distributed.collectives import Traffic
from lowrank.distributed.process_group import ProcessGroup, joined
from lowrank.evaluate.text_task import TextTask
from lowrank.optim.optimizer import Optimizer
from lowrank.plan.network import Link
from lowrank.recipes.gpt import gpt_mini
from lowrank.run.overrides import override, resolve
from lowrank.run.run import Run
from lowrank.run.session import open_session
from lowrank.train.loop import _Loop
from lowrank.train.step_time import measured, outlook, rank_of

SLOW, FAST, RANKS = 100, 1000, 2  # Mbit/s
ADDRESSES = ("10.77.0.1", "10.77.0.2")
BEFORE, PERIOD = 10, 40  # steps not timed, and timed: four merges and one average of the rest
DDP_STEPS = 10
MODELS: dict[str, dict[str, object]] = {
    "gpt-mini": {},
    "6 layers 384 wide": {"model.n_layer": 6, "model.n_head": 6, "model.n_embd": 384},
}
METHODS: dict[str, dict[str, object]] = {
    name: {
        "method": "lte",
        "method.rank": 4,
        "method.heads": 4,
        "method.merge_every": 10,
        "method.target_modules": name,
    }
    for name in ("attention", "all-linear")
}


def main() -> None:
    if "LOWRANK_LINK" not in os.environ:
        command = ["unshare", "-Urn", sys.executable, "-m", "benchmarks.link"]
        raise SystemExit(subprocess.run(command, env={**os.environ, "LOWRANK_LINK": "1"}, check=False).returncode)
    found = on_a_link("from benchmarks.link import rank; rank()")
    found["at 1 Gbit/s"] = on_a_link("from benchmarks.link import rank; rank(faster=True)", speed=FAST)["models"]
    print(json.dumps(found, indent=2))
    print("written to", save("link", found).name)


def on_a_link(code: str, ranks_each: int = 1, speed: int = SLOW) -> dict[str, Any]:
    """What rank 0 has found, running ``code`` as every rank does: two nodes, namespaces of their own with a core each,
    of so many ranks, on a link of ``speed`` Mbit/s. Rank 0 writes it, as JSON, to the file LOWRANK_LINK."""
    with tempfile.TemporaryDirectory() as folder:
        return _on_a_link(code, ranks_each, speed, Path(folder) / "found.json")


def _on_a_link(code: str, ranks_each: int, speed: int, result: Path) -> dict[str, Any]:
    holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
    try:
        time.sleep(0.5)  # until it has left our namespace
        there = ["nsenter", "-t", str(holder.pid), "-n"]
        _call("ip link add lowrank0 type veth peer name lowrank1")
        _call(f"ip link set lowrank1 netns {holder.pid}")
        nodes: list[list[str]] = [[], there]
        for node, where in enumerate(nodes):
            _call("ip link set lo up", where)
            _call(f"ip addr add {ADDRESSES[node]}/24 dev lowrank{node}", where)
            _call(f"ip link set lowrank{node} up", where)
            _call(f"tc qdisc add dev lowrank{node} root tbf rate {speed}mbit burst {speed // 6}kb latency 100ms", where)
        group = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
        group |= {"WORLD_SIZE": str(2 * ranks_each), "LOCAL_WORLD_SIZE": str(ranks_each), "GROUP_WORLD_SIZE": "2"}
        started = [
            subprocess.Popen(
                [*where, "taskset", "-c", str(node), sys.executable, "-c", code],
                env={
                    **os.environ,
                    **group,
                    "RANK": str(node * ranks_each + local),
                    "LOCAL_RANK": str(local),
                    "GLOO_SOCKET_IFNAME": f"lowrank{node}",
                    "LOWRANK_LINK": str(result),
                },
            )
            for node, where in enumerate(nodes)
            for local in range(ranks_each)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise SystemExit("a rank has failed")
    finally:
        holder.kill()
        holder.wait()
    return json.loads(result.read_text())


def _call(words: str, where: list[str] | None = None) -> None:
    subprocess.run([*(where or []), *words.split()], check=True)


# --- one rank --------------------------------------------------------------------------------------------------------


def rank(*, faster: bool = False) -> None:
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as ranks:
        assert ranks is not None
        link = Link(bandwidth=(FAST if faster else SLOW) * 1e6 / 8, latency=_latency(ranks))
        models, methods = (dict(list(MODELS.items())[-1:]), {}) if faster else (MODELS, METHODS)
        found = {
            "link": {"nominal_bytes_per_second": link.bandwidth, **_speed(ranks), "message_seconds": link.latency},
            "models": {name: _model(settings, methods, ranks, link) for name, settings in models.items()},
        }
        if ranks.rank == 0:
            Path(os.environ["LOWRANK_LINK"]).write_text(json.dumps(found))


def _model(
    settings: dict[str, object], methods: dict[str, dict[str, object]], ranks: ProcessGroup, link: Link
) -> dict[str, Any]:
    """Step times and tokens per second of DDP and of each method, with what was predicted."""
    common = {"steps": 1000, "batch-size": 8, **settings}
    full = resolve(override(gpt_mini(), common))
    tokens = full.batch_size * int(str(full.data.args["context"]))
    found: dict[str, Any] = {
        "tokens_a_step": tokens,
        "ddp": _with_prediction(_ddp(full, ranks), full, ranks, link, ddp=True),
    }
    few = {"before": 2, "steps": DDP_STEPS}
    found["full"] = _with_prediction(ours(full, ranks, **few), full, ranks, link, ddp=True)
    with mock.patch.object(Optimizer, "sum_during_backward"):
        found["full, sums after"] = _with_prediction(ours(full, ranks, **few), full, ranks, link, ddp=True)
    for name, options in methods.items():
        run = resolve(override(gpt_mini(), {**common, **options}))
        found[name] = _with_prediction(ours(run, ranks), run, ranks, link)
    for each in [name for name in found if name != "tokens_a_step"]:
        seconds = found[each]["step_seconds"]
        found[each]["tokens_per_second"] = tokens / seconds
        found[each]["times_ddp"] = found["ddp"]["step_seconds"] / seconds
        found[each]["predicted_times_ddp"] = found["ddp"]["predicted_seconds"] / found[each]["predicted_seconds"]
        if ranks.rank == 0:
            print(each, found[each], flush=True)
    return found


def _with_prediction(
    seen: dict[str, float], run: Run, ranks: ProcessGroup, link: Link, *, ddp: bool = False
) -> dict[str, float]:
    """What was seen, beside what an outlook says. The longer of the two ranks' computing counts."""
    compute = max(ranks.gather_objects(measured(open_session(rank_of(run, RANKS)), steps=5)))
    ahead = outlook(open_session(run), RANKS, link, compute)
    predicted = {"compute_seconds": compute, "predicted_seconds": ahead.ddp_step if ddp else ahead.step}
    if ddp:
        predicted["predicted_nothing_hidden_seconds"] = compute + ahead.ddp_communication
    return {**seen, **predicted, "predicted_bytes_a_step": ahead.ddp_bytes if ddp else ahead.bytes_a_step}


def _ddp(run: Run, ranks: ProcessGroup) -> dict[str, float]:
    """The fewest lines that train with torch's own DDP, on this rank's rows."""
    session = open_session(run)
    model: Any = DistributedDataParallel(session.model)
    model.config, model.base_model_prefix = session.model.config, ""  # what the task asks a model for
    source, task = session.data.train(run.batch_size, run.seed, ranks.rank, ranks.count), TextTask()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=run.weight_decay, fused=True)
    step = 0

    def one() -> None:
        nonlocal step
        batch = source.batch(step)
        (task.loss(model, batch) / batch["labels"].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

    return {"step_seconds": _mean_seconds(one, before=2, steps=DDP_STEPS, ranks=ranks)}


def ours(run: Run, ranks: ProcessGroup, *, before: int = BEFORE, steps: int = PERIOD) -> dict[str, float]:
    """The steps of ``lowrank train``, its log and its evaluations left out."""
    session = open_session(run, ranks=ranks)
    loop = _Loop(session, Path("nowhere"), quiet=True, writer=False, new=True)
    session.model.train()
    told = Traffic()

    def one() -> None:
        record = loop._one_step()
        loop.step += 1
        loop.coordinator.after_step(record, False, loop.step)
        if loop.step == before:
            vars(told).update(vars(ranks.traffic))

    try:
        seconds = _mean_seconds(one, before=before, steps=steps, ranks=ranks)
    finally:
        loop.batches.close()
    sent, between = ranks.traffic.sent - told.sent, ranks.traffic.between - told.between
    return {"step_seconds": seconds, "bytes_a_step": sent / steps, "bytes_between_a_step": between / steps}


def _mean_seconds(step: Callable[[], None], *, before: int, steps: int, ranks: ProcessGroup) -> float:
    """Of the slower rank."""
    for _ in range(before):
        step()
    ranks.total(0.0)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return max(ranks.gather_objects((time.perf_counter() - began) / steps))


def _latency(ranks: ProcessGroup) -> float:
    """Seconds of a message: half of a sum of one number, in which two go one after the other; the median."""
    seconds = []
    for _ in range(50):
        began = time.perf_counter()
        ranks.total(0.0)
        seconds.append((time.perf_counter() - began) / 2)
    return sorted(seconds)[25]


def _speed(ranks: ProcessGroup) -> dict[str, float]:
    """Bytes per second of a sum of 10 MB, as the ring counts them."""
    numbers = torch.zeros(2_500_000)
    ranks.total(0.0)
    began = time.perf_counter()
    ranks.sum_([numbers])
    return {"measured_bytes_per_second": numbers.nbytes / (time.perf_counter() - began)}


if __name__ == "__main__":
    main()
