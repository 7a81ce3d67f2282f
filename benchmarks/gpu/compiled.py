"""``torch.compile`` of the model, on and off: seconds a step, and the same losses."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

import lowrank
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import CONTEXT, batch, llama, mean_loss

STEPS = 4
METHODS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 128},
    "lora": {"rank": 16, "target_modules": "all-linear"},
    "full": {},
    "lte": {"rank": 8, "heads": 4, "merge_every": 1000},
    "dora": {"rank": 16},
}


def run(bench: Bench) -> None:
    size, rows = ("tiny", 4) if bench.tiny else ("130m", 32)
    for name in list(METHODS)[: 1 if bench.tiny else None]:
        plain = bench.item(f"{name}, plain", partial(measure, bench, size, rows, name, None), needs=5.0)
        if plain is None:
            continue
        limit = max(20.0, bench.left / 2)  # a compilation that takes longer than that is not worth waiting for
        bench.item(
            f"{name}, compiled",
            partial(measure, bench, size, rows, name, plain),
            needs=10.0,
            limit=limit,
        )


def measure(bench: Bench, size: str, rows: int, name: str, plain: dict[str, Any] | None) -> dict[str, Any]:
    """Losses of four steps on the same batches, then seconds; compiled, also how long that took."""
    torch.manual_seed(0)
    model = llama(size, bench.device)
    options = {key: 4 if key == "rank" and bench.tiny else value for key, value in METHODS[name].items()}
    plan = lowrank.apply_(model, lowrank.METHODS[name](**options))
    optimizer = plan.optimizer(lr=1e-4)
    data = [batch(model, rows) for _ in range(2)]
    model.train()
    began = time.monotonic()
    run: Any = model
    if plain is not None:
        torch.compiler.reset()
        run = torch.compile(model, backend="inductor" if bench.cuda else "eager")
    narrow = torch.bfloat16 if not bench.cuda or torch.cuda.is_bf16_supported() else torch.float16

    def step(number: int = 0) -> torch.Tensor:
        with torch.autocast(bench.device.type, narrow):
            loss = mean_loss(run, data[number % 2])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    losses = [float(step(0))]
    first = time.monotonic() - began
    losses += [float(step(number)) for number in range(1, 2 if bench.tiny else STEPS)]
    took = bench.timed(step, rounds=10, seconds=3.0)
    record = {**took, "tokens_a_second": rows * CONTEXT / took["seconds"], "first_step_seconds": first}
    if plain is None:
        return {**record, "losses": losses}
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses, plain["losses"], strict=True))
    return {
        **record,
        "losses": losses,
        "times_plain": took["seconds"] / plain["seconds"],
        "relative_error": apart,
        "allowed": 0.02,
        "ok": apart <= 0.02,
    }
