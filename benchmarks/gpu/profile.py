"""Where a step's time goes: its five longest kernels, and how long the device waits for the host."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

import lowrank
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import batch, llama, mean_loss

METHODS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 256, "refresh_every": 10**6},
    "galore_8bit": {"rank": 256, "refresh_every": 10**6},
    "apollo": {"rank": 256, "refresh_every": 10**6},
    "lora": {"rank": 16, "target_modules": "all-linear"},
}
LONGEST = 5


def run(bench: Bench) -> None:
    size, rows = ("tiny", 2) if bench.tiny else ("350m", 16)
    for name, options in list(METHODS.items())[: 1 if bench.tiny else None]:
        small = {key: 4 if key == "rank" else value for key, value in options.items()}
        chosen = small if bench.tiny else options
        bench.item(f"{name}, {size}", partial(measure, bench, size, rows, name, chosen), needs=3.0)


def measure(bench: Bench, size: str, rows: int, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Of a whole step and of the optimizer's part: seconds, the device's share of them, and the longest kernels."""
    model = llama(size, bench.device, torch.bfloat16)
    optimizer = lowrank.apply_(model, lowrank.METHODS[name](**options)).optimizer(lr=1e-4)
    data = batch(model, rows)
    model.train()

    def passes() -> None:
        mean_loss(model, data).backward()

    def whole() -> None:
        passes()
        optimizer.step()
        optimizer.zero_grad()

    whole()
    whole()
    record: dict[str, Any] = {}
    record |= {f"step_{key}": value for key, value in profile(bench, whole).items()}
    passes()
    record |= {f"optimizer_{key}": value for key, value in profile(bench, optimizer.step).items()}
    return record


def profile(bench: Bench, run: Any) -> dict[str, Any]:
    """Without the profiler its seconds, with it its kernels: the profiler itself takes the host's time."""
    seconds, host = bench.once(run)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with profiled(activities=kinds) as prof:
        run()
        bench.synchronise()
    field = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    every = [e for e in prof.key_averages() if not getattr(e, "is_user_annotation", False) and "#" not in e.key]
    events = [e for e in every if not bench.cuda or str(e.device_type).endswith("CUDA")]
    busy = sum(getattr(e, field) for e in events) / 1e6
    longest = sorted(events, key=lambda e: getattr(e, field), reverse=True)[:LONGEST]
    kernels = [f"{e.key[:60]} × {e.count}: {getattr(e, field) / 1e3:.3g} ms" for e in longest]
    return {
        "seconds": seconds,
        "host_seconds": host,
        "device_busy": busy / seconds if bench.cuda else None,
        "kernels": sum(e.count for e in events),
        "longest": kernels,
    }
