"""What the card can do at best: bytes copied a second, and products a second in each kind of arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench

# name: (dtype, torch's float32_matmul_precision)
PRODUCTS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "TF32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
}


def run(bench: Bench) -> None:
    for exponent in (20,) if bench.tiny else (30, 28, 26):
        found = bench.item(f"copy of {2**exponent >> 20} MiB", partial(copy, bench, 2**exponent))
        if found is not None:
            break  # smaller ones are for cards on which the first does not fit
    size = 64 if bench.tiny else 8192
    for name, (dtype, precision) in PRODUCTS.items():
        bench.item(f"product {size}³, {name}", partial(product, bench, size, dtype, precision))


def copy(bench: Bench, count: int) -> dict[str, Any]:
    source = torch.ones(count, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    took = bench.timed(lambda: target.copy_(source), rounds=30)
    return {"seconds": took["seconds"], "bytes_a_second": 2 * count / took["seconds"]}


def product(bench: Bench, size: int, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """Random numbers: zeros take less power, and are faster."""
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        took = bench.timed(lambda: torch.mm(a, b, out=out), rounds=10, seconds=3.0)
    finally:
        torch.set_float32_matmul_precision(before)
    return {"seconds": took["seconds"], "operations_a_second": 2 * size**3 / took["seconds"]}


def bytes_a_second(bench: Bench) -> float | None:
    """The copy bandwidth that was measured, if it was."""
    found = [v["bytes_a_second"] for v in bench.known.get("ceilings", {}).values() if "bytes_a_second" in v]
    return max(found) if found else None
