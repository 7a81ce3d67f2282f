"""Numbers in 8 or 4 bits: block-wise codes, each block with a scale of its own (Dettmers et al., arXiv 2110.02861).

A block of up to 256 numbers is kept as its largest magnitude s (float32) and one small integer c a number, which
stands for

    x = s · sign(c) · (|c| / L)^k          L = 127 or 255 (8 bits), 7 (4 bits)

The power k spends the codes where they are needed: k = 1 is uniform (a basis); k = 2 reaches 6e-5 of s (a first
moment); k = 4 reaches 2e-10 of s (a second moment, where a number that became 0 would blow up the step that is
divided by its root).

A moving average changes by less than one code a step, so rounding to the nearest would freeze it. With a ``tick``
the rounding is dithered instead: up where u < p, with p such that the mean is exact and u = frac(i·φ + tick·√2) the
additive recurrence, whose average over ticks converges faster than that of random numbers and which needs no
generator: the same tick gives the same codes. Deviation from bitsandbytes, which rounds to the nearest entry of a
table.

Blocks never cross matrices: the last two dimensions are cut into ceil(n/256) blocks of equal size, leading
dimensions stay. Shape legend: x (..., rows, cols) or (n,);  codes (..., blocks, size);  scales (..., blocks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.linalg.chunks import parts

BLOCK = 256
GOLDEN, SILVER = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1


@dataclass(frozen=True, kw_only=True)
class Code:
    """One way to encode numbers.

    Args:
        bits: 8, or 4 (two to a byte, signed only).
        signed: whether the numbers have signs.
        power: k in the module's formula: 1, 2 or 4.
    """

    bits: int = 8
    signed: bool = True
    power: int = 1

    @property
    def levels(self) -> int:
        """L, the largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.signed and self.bits == 8 else torch.uint8

    def allocate(self, like: Tensor) -> dict[str, Tensor]:
        """Codes and scales of zeros for a tensor of this shape and device."""
        lead, blocks, size = split(like.shape)
        packed = size if self.bits == 8 else (size + 1) // 2
        zero = 0 if self.bits == 8 else 0x88  # a half byte holds code + 8
        return {
            "codes": torch.full((*lead, blocks, packed), zero, dtype=self.dtype, device=like.device),
            "scales": torch.zeros((*lead, blocks), dtype=torch.float32, device=like.device),
        }

    def encode_(self, stored: dict[str, Tensor], x: Tensor, tick: Tensor | int | None = None) -> None:
        """Write ``x`` into ``stored``, dithered by ``tick`` or, without one, rounded to the nearest code.

        ``tick`` may be one for each matrix of a stack: as many dimensions as ``x``, the last two (or one) of size 1.
        """
        lead, blocks, size = split(x.shape)
        flat = x.detach().reshape(*lead, -1)
        padding = blocks * size - flat.shape[-1]
        flat = (F.pad(flat, (0, padding)) if padding else flat).view(-1, size)
        each = None  # one tick for each block
        if isinstance(tick, Tensor) and tick.numel() > 1:
            each = tick[..., 0].expand(*lead, blocks).reshape(-1, 1)
        elif isinstance(tick, Tensor):
            tick = tick.view(())
        codes, scales = stored["codes"].view(flat.shape[0], -1), stored["scales"].view(-1)
        for part in parts(flat.shape[0], size, flat):  # many temporaries, but small ones
            code, scale = self._encode(flat[part].float(), tick if each is None else each[part])
            codes[part] = code if self.bits == 8 else _pack(code)
            scales[part] = scale

    def _encode(self, x: Tensor, tick: Tensor | int | None) -> tuple[Tensor, Tensor]:
        """Codes, as float32, and scales of blocks (n, size)."""
        size_of = x.abs()
        scale = size_of.amax(dim=-1)
        share = size_of.div_(torch.where(scale > 0, scale, 1).unsqueeze(-1))
        level = _root(share, self.power).mul_(self.levels)
        if tick is None:
            code = level.round_()
        else:
            code = level.floor_().clamp_(max=self.levels - 1)
            low, high = _raise(code / self.levels, self.power), _raise((code + 1).div_(self.levels), self.power)
            code += share.sub_(low).div_(high.sub_(low)) > dither(x.shape[-1], tick, x.device)
        return code.copysign_(x) if self.signed else code, scale

    def decode(self, stored: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that ``stored`` stands for, as a tensor of ``shape`` and ``dtype``."""
        lead, _, size = split(shape)
        code = stored["codes"].to(dtype) if self.bits == 8 else _unpack(stored["codes"], size).to(dtype)
        x = code.div_(self.levels)
        for _ in range(int(math.log2(self.power))):
            x.mul_(x.abs() if self.signed else x)
        x = x.mul_(stored["scales"].unsqueeze(-1)).flatten(-2)
        return x[..., : math.prod(shape[len(lead) :])].reshape(shape)


def split(shape: tuple[int, ...], block: int = BLOCK) -> tuple[tuple[int, ...], int, int]:
    """(leading dimensions, blocks, numbers in a block of at most ``block``) for a ``shape``; a matrix has at most
    blocks − 1 of padding."""
    lead, numbers = tuple(shape[:-2]), math.prod(shape[-2:])
    blocks = max(1, math.ceil(numbers / block))
    return lead, blocks, math.ceil(numbers / blocks)


def dither(size: int, tick: Tensor | int, device: torch.device) -> Tensor:
    """u_i = frac(i·φ + tick·√2) in [0, 1), i < size; (..., size) for ``tick`` (..., 1). A tensor is not read back."""
    place = torch.arange(size, dtype=torch.float64, device=device).mul_(GOLDEN)
    tick = tick.double() if isinstance(tick, Tensor) else tick
    return (place + tick * SILVER).frac_().float()


def round_bfloat16(x: Tensor, tick: Tensor | int) -> Tensor:
    """float32 ``x`` as bfloat16, dithered along its last dimension by ``tick``; the mean over ticks is exact."""
    x = x.detach().float()
    noise = (dither(x.shape[-1] if x.dim() else 1, tick, x.device) * 65536).to(torch.int32)
    bits = (x.view(torch.int32) + (noise if x.dim() else noise.view(()))) & -65536
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


def _root(x: Tensor, power: int) -> Tensor:
    """The ``power``-th root (1, 2 or 4) of ``x``, in a new tensor."""
    return x.clone() if power == 1 else _root(x.sqrt(), power // 2)


def _raise(x: Tensor, power: int) -> Tensor:
    """``x`` to the ``power`` (1, 2 or 4), by squaring, since ``pow`` takes ten times as long."""
    return x if power == 1 else _raise(x.square(), power // 2)


def _pack(code: Tensor) -> Tensor:
    half = F.pad(code, (0, code.shape[-1] % 2)).add_(8).to(torch.uint8)
    return half[..., ::2] | (half[..., 1::2] << 4)


def _unpack(packed: Tensor, size: int) -> Tensor:
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :size]
    return halves.to(torch.int8) - 8
