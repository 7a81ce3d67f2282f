"""What an adapter adds to one linear layer, forward and backward: over the same layer frozen, and beside PEFT.

4096 → 4096, 8192 tokens, rank 16, weights and activations in bfloat16 (float16 where the card has none), factors in
float32. At rank 16 the adapter's own arithmetic is 1.2 % of the layer's: what is more is traffic and launches.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, medians, ratio
from benchmarks.layer import adapted, frozen, round_trip, with_peft


def run(bench: Bench) -> None:
    width, rows, length, rank = (64, 4, 8, 4) if bench.tiny else (4096, 32, 256, 16)
    narrow = torch.bfloat16 if not bench.cuda or torch.cuda.is_bf16_supported() else torch.float16
    kind: dict[str, Any] = {"device": bench.device, "dtype": narrow}
    x, dy = torch.randn(rows, length, width, **kind, requires_grad=True), torch.randn(rows, length, width, **kind)
    layers = alternatives(width, rank, kind)
    if bench.tiny:
        layers = {name: layers[name] for name in ("frozen", "lora", "dora")}
    base = round_trip(layers["frozen"](), x, dy)
    for name, make in layers.items():
        bench.item(
            f"{name}, {width} × {width}, {rows * length} tokens, rank {rank}",
            partial(measure, bench, base, make, x, dy),
        )


def alternatives(width: int, rank: int, kind: dict[str, Any]) -> dict[str, Callable[[], nn.Module]]:
    def layer() -> nn.Linear:
        return frozen(width, width, **kind)

    found: dict[str, Callable[[], nn.Module]] = {
        "frozen": layer,
        "trained whole": lambda: nn.Linear(width, width, **kind),
        "lora": lambda: adapted(layer(), rank=rank),
        "multi-head, 4 heads": lambda: adapted(layer(), rank=rank, heads=4),
        "lte, 4 heads": lambda: adapted(layer(), rank=rank, heads=4, split=True, keep=True),
        "dora": lambda: adapted(layer(), rank=rank, direction=True),
    }
    if importlib.util.find_spec("peft"):
        found["peft lora"] = lambda: with_peft(layer(), rank)
        found["peft dora"] = lambda: with_peft(layer(), rank, dora=True)
    found["lora, compiled"] = lambda: compiled(adapted(layer(), rank=rank))
    return found


def compiled(layer: nn.Module) -> nn.Module:
    layer.compile(backend="inductor" if next(layer.parameters()).is_cuda else "eager")
    return layer


def measure(
    bench: Bench, base: Callable[[], None], make: Callable[[], nn.Module], x: Tensor, dy: Tensor
) -> dict[str, Any]:
    layer = make().to(bench.device)
    layer.train()
    trip = round_trip(layer, x, dy)
    trip()
    bench.begin_peak()
    before = bench.held_bytes()
    trip()
    peak = bench.peak_bytes()
    found = bench.in_turns({"frozen": base, "this": trip}, rounds=40, seconds=3.0)
    return {
        **medians(found["this"]),
        "times_frozen": ratio(found, "this", "frozen"),
        "peak_over_held_mib": None if peak is None or before is None else (peak - before) / 2**20,
    }
