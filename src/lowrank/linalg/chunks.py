"""Work done a part at a time, so that what it needs beside its tensors is bounded, whatever their size.

On a CPU a part is what stays in the cache; elsewhere what keeps the device busy, 64 MiB of float32.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

CPU, DEVICE = 1 << 16, 1 << 24  # numbers


def at_once(like: Tensor) -> int:
    """How many numbers a part has on the device of ``like``."""
    return CPU if like.is_cpu else DEVICE


def parts(rows: int, size: int, like: Tensor) -> Iterator[slice]:
    """``rows`` of ``size`` numbers each, in parts; of fake tensors two, since every part takes the same memory."""
    most = max(1, at_once(like) // max(1, size))
    yield from (slice(i, i + most) for i in range(0, min(rows, 2 * most) if is_fake(like) else rows, most))
