"""Compression, or how numbers travel between ranks: as they are, or on request in fewer bits (``Merge(exchange=...)``).

    float32    as they are; float64 stays float64
    bfloat16   two bytes a number
    int8       one byte a number, and a scale of four bytes for each block of up to 256 (``linalg.quantise``)

Everyone goes on with the rounded numbers, the sender included, so that all ranks hold the same bits. Rounding is
dithered: its mean is exact, so that what it errs by one time has no direction to add up in.

Rounded numbers cannot be summed on their way (the sum of codes has no scale), so a sum of them is a gathering,
(R − 1)·bytes; with many ranks a sum of float32, 2(R − 1)/R·bytes, is fewer, and then is what travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lowrank.distributed.collectives import Group, ring_gather_bytes, ring_sum_bytes
from lowrank.linalg.quantise import Code, round_bfloat16, split

Compression = Literal["float32", "bfloat16", "int8"]
CODE = Code()  # int8, uniform


def rounded_bytes(compression: Compression, shape: tuple[int, ...], width: int) -> int:
    """Bytes of a tensor of this shape, whose numbers have ``width`` bytes, in one message.

    >>> [rounded_bytes(c, (4, 300), 4) for c in ("float32", "bfloat16", "int8")]
    [4800, 2400, 1220]
    """
    if compression == "float32":
        return math.prod(shape) * width
    if compression == "bfloat16":
        return math.prod(shape) * 2
    lead, blocks, size = split(shape)
    return math.prod(lead) * blocks * (size + 4)


def sum_bytes(compression: Compression, shape: tuple[int, ...], width: int, ranks: int) -> int:
    """Bytes that each rank sends for a sum of such tensors over the ranks, whichever way is fewer."""
    plain = ring_sum_bytes(math.prod(shape) * width, ranks)
    if compression == "float32":
        return plain
    return min(plain, ring_gather_bytes(rounded_bytes(compression, shape, width), ranks))


def encode(x: Tensor, compression: Compression, tick: int) -> list[Tensor]:
    """``x`` as it travels; what is rounded is dithered by ``tick``, leading dimensions each by itself."""
    if compression == "float32":
        return [x]
    if compression == "bfloat16":
        return [round_bfloat16(x, tick)]
    coded = CODE.allocate(x)
    CODE.encode_(coded, x, tick)
    return [coded["codes"], coded["scales"]]


def decode(sent: Sequence[Tensor], compression: Compression, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The numbers of ``encode`` again, in ``shape``."""
    if compression == "int8":
        codes, scales = sent
        return CODE.decode({"codes": codes, "scales": scales}, shape, dtype)
    return sent[0].to(dtype)


def start_add_up(tensors: Sequence[Tensor], group: Group, compression: Compression, tick: int) -> Callable[[], None]:
    """Start to replace each tensor by its sum over the group, rounded where that is fewer bytes; the function returned
    waits and writes the sums.

    All members give the same shapes and dtypes, in the same order, and hold the same bits afterwards.
    """
    rounds = [
        sum_bytes(compression, tuple(t.shape), t.element_size(), group.count)
        < ring_sum_bytes(t.numel() * t.element_size(), group.count)
        for t in tensors
    ]
    plain = group.start_sum([t for t, small in zip(tensors, rounds, strict=True) if not small])
    small = [t for t, is_small in zip(tensors, rounds, strict=True) if is_small]
    coded = [encode(t, compression, tick * group.count + group.rank) for t in small]
    arriving = [group.start_gather(column) for column in zip(*coded, strict=True)]  # first all codes, then all scales

    def finish() -> None:
        plain()
        sent = [arrive() for arrive in arriving]
        for i, target in enumerate(small):
            target.zero_()
            for r in range(group.count):
                target += decode([column[i][r] for column in sent], compression, tuple(target.shape), target.dtype)

    return finish


def add_up_(tensors: Sequence[Tensor], group: Group, compression: Compression, tick: int) -> None:
    """``start_add_up``, waited for."""
    start_add_up(tensors, group, compression, tick)()
