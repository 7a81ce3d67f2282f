"""``llama-60m``'s shape on bytes of a local text, the same tokens for each method: the order of the methods.

Weights in float32, autocast to bfloat16, linear warm-up of a tenth and cosine to a tenth, two rates a method, of which
the better counts. One seed, few tokens: the order says that nothing is broken on this device, and little more.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import CONTEXT, bytes_of, llama, mean_loss

STEPS, ROWS, EVALUATED = 300, 64, 8
WARMUP = 3  # steps that are not timed
RATES: dict[str, tuple[float, ...]] = {
    "full": (1e-3, 3e-3),
    "muon": (1e-2, 3e-3),
    "galore": (1e-2, 3e-2),
    "apollo": (1e-2, 3e-3),
    "fira": (1e-2, 3e-2),
}
RANK = 128


def run(bench: Bench) -> None:
    text = bytes_of(bench.text, 1 << 16 if bench.tiny else 32 << 20).to(bench.device)
    size, steps, rows = ("tiny", 2, 2) if bench.tiny else ("60m", STEPS, ROWS)
    took = 0.0
    if not bench.tiny:  # as many steps as there is time for, the same for every method
        probe = bench.item("how fast", lambda: train(bench, size, "full", 1e-3, text, 10, rows)) or {}
        runs = sum(map(len, RATES.values())) + 1
        steps = max(40, min(STEPS, int(bench.left / runs * probe.get("tokens_a_second", 1e6) / (rows * CONTEXT))))
    for which in range(1 if bench.tiny else 2):  # every method at one rate before any has its second
        for name, rates in RATES.items():
            begin = time.monotonic()
            run_one = partial(train, bench, size, name, rates[which], text, steps, rows)
            bench.item(f"{name}, rate {rates[which]:g}", run_one, needs=0.8 * took)
            took = max(took, time.monotonic() - begin)


def train(bench: Bench, size: str, name: str, rate: float, text: Tensor, steps: int, rows: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = llama(size, bench.device, vocabulary=256)
    optimizers = optimizers_of(model, name, rate)
    if optimizers is None:
        return {"skipped": "this torch has no Muon"}
    narrow = torch.bfloat16 if not bench.cuda or torch.cuda.is_bf16_supported() else torch.float32
    cut = len(text) * 9 // 10
    starts = torch.randint(cut - CONTEXT - 1, (steps, rows), generator=torch.Generator().manual_seed(1))
    bench.begin_peak()
    bench.synchronise()
    begin, losses = time.monotonic(), []
    model.train()
    for step in range(steps):
        if step == WARMUP:
            bench.synchronise()
            begin = time.monotonic()
        for optimizer, full_rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = full_rate * schedule(step, steps)
        with torch.autocast(bench.device.type, narrow, enabled=narrow is not torch.float32):
            loss = mean_loss(model, windows(text, starts[step]))
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    bench.synchronise()
    took = time.monotonic() - begin
    return {
        "val_loss": evaluate(bench, model, text[cut:], rows, narrow),
        "train_loss": float(torch.stack(losses[-max(1, steps // 20) :]).mean()),
        "tokens": steps * rows * CONTEXT,
        "tokens_a_second": (steps - (WARMUP if steps > WARMUP else 0)) * rows * CONTEXT / took,
        "peak_gib": None if bench.peak_bytes() is None else bench.peak_bytes() / 2**30,  # type: ignore[operator]
    }


def optimizers_of(model: nn.Module, name: str, rate: float) -> list[tuple[Any, float]] | None:
    """(optimizer, its rate): ours, or torch's Muon where the catalogue has none; None without either."""
    if name in lowrank.METHODS:
        options = {"rank": RANK if model.config.hidden_size > RANK else 4}  # type: ignore[union-attr, operator]
        method = lowrank.METHODS[name](**(options if name in ("galore", "apollo", "fira") else {}))
        return [(lowrank.apply_(model, method).optimizer(lr=rate), rate)]
    if not hasattr(torch.optim, "Muon"):
        return None
    inside = [p for key, p in model.named_parameters() if p.dim() == 2 and "layers" in key]
    taken = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in taken]
    muon = torch.optim.Muon(inside, lr=rate, weight_decay=0.0)
    return [(muon, rate), (torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.0), 1e-3)]


def schedule(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def windows(text: Tensor, starts: Tensor) -> dict[str, Tensor]:
    places = starts.to(text.device)[:, None] + torch.arange(CONTEXT + 1, device=text.device)
    ids = text[places]
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


@torch.no_grad()
def evaluate(bench: Bench, model: nn.Module, text: Tensor, rows: int, narrow: torch.dtype) -> float:
    """Nats a byte over the same windows for every method."""
    model.eval()
    count = 1 if bench.tiny else EVALUATED
    starts = torch.randint(len(text) - CONTEXT - 1, (count, rows), generator=torch.Generator().manual_seed(2))
    losses = []
    for each in starts:
        with torch.autocast(bench.device.type, narrow, enabled=narrow is not torch.float32):
            losses.append(mean_loss(model, windows(text, each)))
    return float(torch.stack(losses).mean())
