"""FSDP2 on one rank, with NCCL (on a CPU gloo): what is sharded must train as what is not."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tests.models import llama, text_loss, tokens

import lowrank
from benchmarks.gpu.bench import Bench, check
from benchmarks.gpu.correctness import EXACT, LR, method_of, relative
from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.shards import to_local
from lowrank.plan.fsdp import shard_

METHODS = ("full", "galore", "apollo", "lora", "lte")


def run(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    if bench.cuda:
        torch.cuda.set_device(bench.device)
    dist.init_process_group("nccl" if bench.cuda else "gloo", rank=0, world_size=1)
    try:
        with closing(ProcessGroup(bench.device, 60.0)) as ranks:
            for name in METHODS[1::2] if bench.tiny else METHODS:
                bench.item(f"{name}, one rank", partial(sharded_check, bench, name, ranks))
    finally:
        dist.destroy_process_group()


def sharded_check(bench: Bench, name: str, ranks: ProcessGroup) -> dict[str, Any]:
    """Weights' changes in four steps, sharded and not, both on the device."""
    changes = [trained(bench, name, each) for each in (ranks, None)]
    return check(relative(changes[0], changes[1]), EXACT)


def trained(bench: Bench, name: str, ranks: ProcessGroup | None) -> list[torch.Tensor]:
    model = llama().to(bench.device)
    if ranks is None:
        plan = lowrank.apply_(model, method_of(name))
    else:
        plan = lowrank.apply_(model, method_of(name), ranks=ranks, workers=1)
        shard_(plan)
    optimizer = plan.optimizer(lr=LR)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    start = {key: to_local(p).detach().clone() for key, p in trained.items()}
    model.train()
    for step in range(4):
        text_loss(model, tokens(batch=8, seed=step % 3).to(bench.device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [to_local(p).detach() - start[key] for key, p in sorted(trained.items())]
