"""What this is: the card, its driver's CUDA, the versions of what is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from lowrank.infra.environment import environment

OPTIONAL = ("peft", "galore_torch", "bitsandbytes", "triton")


def run(bench: Bench) -> None:
    bench.item("device", lambda: device(bench))
    bench.item("software", software)


def device(bench: Bench) -> dict[str, Any]:
    if not bench.cuda:
        return {"name": environment()["processor"], "cores": environment()["cores"]}
    card = torch.cuda.get_device_properties(bench.device)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": card.name,
        "capability": f"{card.major}.{card.minor}",
        "memory_gib": total / 2**30,
        "free_gib": free / 2**30,
        "multiprocessors": card.multi_processor_count,
        "bfloat16": torch.cuda.is_bf16_supported(),
    }


def software() -> dict[str, Any]:
    told = environment()
    found = {name: importlib.util.find_spec(name) is not None for name in OPTIONAL}
    return {"python": told["python"], "cuda": told["cuda"], **told["packages"], **found, "commit": told["commit"]}
