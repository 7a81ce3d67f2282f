"""Compression, or how numbers travel between ranks: as they are, or on request in fewer bits (``Merge(exchange=...)``).

    float32    as they are; float64 stays float64
    bfloat16   two bytes a number
    int8       one byte a number, and a scale of four bytes for each block of up to 256 (``linalg.quantise``)
    2bit       two bits a number, and four bytes for each such block (``linalg.few_bits``)
    topk3      of each block of up to 4096 the 3 % of numbers that are largest, in two bits each beside up to twelve for
               their place, packed; topk1: 1 %

Everyone merges the rounded numbers, the sender included, so that all ranks hold the same bits. bfloat16 and int8 are
dithered: their mean is exact, so that what they err by one time has no direction to add up in. The others leave so
much out that it must be sent later (error feedback, ``FEEDBACK``): it stays in the sender's head or local parameter,
and so is part of its next change. MuLoCo and SparseLoCo keep it in a buffer of its own, which decays; here it trains
on, needs no memory, and is what a checkpoint has anyway, for any number of ranks.

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
from lowrank.linalg.few_bits import FewBits
from lowrank.linalg.quantise import Code, round_bfloat16, split

Compression = Literal["float32", "bfloat16", "int8", "2bit", "topk3", "topk1"]
CODE = Code()  # int8, uniform
FEEDBACK = {
    "2bit": FewBits(),
    "topk3": FewBits(block=4096, share=0.03),
    "topk1": FewBits(block=4096, share=0.01),
}


def rounded_bytes(compression: Compression, shape: tuple[int, ...], width: int) -> int:
    """Bytes of a tensor of this shape, whose numbers have ``width`` bytes, in one message.

    >>> [rounded_bytes(c, (4, 300), 4) for c in ("float32", "bfloat16", "int8", "2bit", "topk3")]
    [4800, 2400, 1220, 320, 63]
    """
    if compression == "float32":
        return math.prod(shape) * width
    if compression == "bfloat16":
        return math.prod(shape) * 2
    if compression in FEEDBACK:
        return FEEDBACK[compression].bytes(shape)
    lead, blocks, size = split(shape)
    return math.prod(lead) * blocks * (size + 4)


def sum_bytes(compression: Compression, shape: tuple[int, ...], width: int, ranks: int) -> int:
    """Bytes that each rank sends for a sum of such tensors over the ranks, whichever way is fewer."""
    plain = ring_sum_bytes(math.prod(shape) * width, ranks)
    if compression == "float32":
        return plain
    return min(plain, ring_gather_bytes(rounded_bytes(compression, shape, width), ranks))


def encode(x: Tensor, compression: Compression, tick: int) -> list[Tensor]:
    """``x`` as it travels; what is dithered is by ``tick``, leading dimensions each by itself."""
    if compression == "float32":
        return [x]
    if compression == "bfloat16":
        return [round_bfloat16(x, tick)]
    if compression in FEEDBACK:
        return list(FEEDBACK[compression].encode(x))
    coded = CODE.allocate(x)
    CODE.encode_(coded, x, tick)
    return [coded["codes"], coded["scales"]]


def decode(sent: Sequence[Tensor], compression: Compression, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The numbers of ``encode`` again, in ``shape``."""
    if compression in FEEDBACK:
        words, means = sent
        return FEEDBACK[compression].decode(words, means, shape, dtype)
    if compression == "int8":
        codes, scales = sent
        return CODE.decode({"codes": codes, "scales": scales}, shape, dtype)
    return sent[0].to(dtype)


def start_add_up(
    tensors: Sequence[Tensor], group: Group, compression: Compression, tick: int
) -> Callable[[], list[Tensor | None]]:
    """Start to replace each tensor by its sum over the group, rounded where that is fewer bytes; the function returned
    waits and writes the sums. It gives of each tensor what was left out and is to be sent next; None for nothing.

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

    def finish() -> list[Tensor | None]:
        plain()
        sent, left = [arrive() for arrive in arriving], []
        for i, target in enumerate(small):
            shape, dtype = tuple(target.shape), target.dtype
            left.append(target - decode(coded[i], compression, shape, dtype) if compression in FEEDBACK else None)
            target.zero_()
            for r in range(group.count):
                target += decode([column[i][r] for column in sent], compression, shape, dtype)
        rest = iter(left)
        return [next(rest) if is_small else None for is_small in rounds]

    return finish


def add_up_(tensors: Sequence[Tensor], group: Group, compression: Compression, tick: int) -> list[Tensor | None]:
    """``start_add_up``, waited for."""
    return start_add_up(tensors, group, compression, tick)()
