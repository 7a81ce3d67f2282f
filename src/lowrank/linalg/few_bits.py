"""Numbers in two bits, all of a block or only its largest: what is left out belongs to whoever encodes.

Of a block of numbers the k of largest magnitude travel, each as its place (none where k is the whole block), its sign,
and one bit that says on which side of their root mean square it lies. That bit stands for the mean on its side:

    x̂_i = sign(x_i)·m_j      j = [|x_i| ≥ rms]      m_j the mean of |x| over the numbers of that bit, in bfloat16

So the 2 bits of MuLoCo (arXiv 2505.23725) and SparseLoCo (arXiv 2508.15706) are four values a block, each the mean of
what it stands for; the largest of each block are SparseLoCo's, who takes chunks of 4096. The threshold is close to the
best one for normal numbers, 0.98 of the deviation (Max, IRE Trans. Inf. Theory 6, 1960), where 12 % of ‖x‖² is left
out. Whatever x is, that is less than ‖x‖²: who sends what was left out again loses nothing in the end.

Blocks are those of ``quantise.split``. Shapes: x (..., rows, cols) or (n,); words (..., blocks, bytes) and means
(..., blocks, 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.linalg.chunks import parts
from lowrank.linalg.quantise import BLOCK, split

MEANS_BYTES = 4  # two bfloat16 a block


@dataclass(frozen=True, kw_only=True)
class FewBits:
    """One way to encode numbers.

    Args:
        block: the most numbers in a block.
        share: of a block's numbers that are sent, at least one.
    """

    block: int = BLOCK
    share: float = 1.0

    def sent(self, size: int) -> int:
        """How many numbers are sent of a block of ``size``."""
        return size if self.share == 1.0 else max(1, round(self.share * size))

    def word(self, size: int) -> int:
        """Bits of one number of a block of ``size``: its place, where not all are sent, its sign and its side."""
        return 2 + (0 if self.sent(size) == size else (size - 1).bit_length())

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape.

        >>> FewBits().bytes((4, 256)), FewBits(block=4096, share=0.03).bytes((64, 64))
        (272, 220)
        """
        lead, blocks, size = split(shape, self.block)
        return math.prod(lead) * blocks * (self._packed(size) + MEANS_BYTES)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Packed words (uint8) and means (bfloat16) of ``x``; always the same for the same numbers."""
        lead, blocks, size = split(tuple(x.shape), self.block)
        flat = x.detach().reshape(*lead, -1)
        flat = F.pad(flat, (0, blocks * size - flat.shape[-1])).view(-1, size)
        words = torch.empty(flat.shape[0], self._packed(size), dtype=torch.uint8, device=x.device)
        means = torch.empty(flat.shape[0], 2, dtype=torch.bfloat16, device=x.device)
        for part in parts(flat.shape[0], size, flat):  # many temporaries, but small ones
            words[part], means[part] = self._encode(flat[part].float())
        return words.view(*lead, blocks, -1), means.view(*lead, blocks, 2)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size, place = x.shape[-1], None
        if self.sent(size) < size:
            place = x.abs().topk(self.sent(size), dim=-1).indices.sort(dim=-1).values
            x = x.gather(-1, place)
        magnitude = x.abs()
        large = magnitude >= magnitude.square().mean(dim=-1, keepdim=True).sqrt()
        means = torch.stack([_mean(magnitude, ~large), _mean(magnitude, large)], dim=-1)
        words = large.int() + 2 * (x < 0).int()
        if place is not None:
            words += 4 * place.int()
        return _pack(words, self.word(size)), means

    def decode(self, words: Tensor, means: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The numbers that they stand for, in ``shape``; zero where nothing was sent."""
        lead, _, size = split(shape, self.block)
        words, means = words.reshape(-1, words.shape[-1]), means.reshape(-1, 2).to(dtype)
        flat = torch.zeros(len(words), size, dtype=dtype, device=words.device)
        for part in parts(len(words), size, flat):
            word = _unpack(words[part], self.sent(size), self.word(size))
            number = means[part].gather(-1, (word & 1).long())
            number = torch.where(word & 2 > 0, -number, number)
            if self.sent(size) < size:
                flat[part] = flat[part].scatter(-1, (word >> 2).long(), number)
            else:
                flat[part] = number
        return flat.view(*lead, -1)[..., : math.prod(shape[len(lead) :])].reshape(shape)

    def _packed(self, size: int) -> int:
        return math.ceil(self.sent(size) * self.word(size) / 8)


def _mean(x: Tensor, where: Tensor) -> Tensor:
    """Of each row over the numbers ``where``; 0 where there are none."""
    return (x * where).sum(dim=-1) / where.sum(dim=-1).clamp_min(1)


def _pack(words: Tensor, bits: int) -> Tensor:
    """Words (n, k) of so many bits as bytes (n, ⌈k·bits/8⌉), the lowest bit first."""
    row = _bits(words, bits).to(torch.uint8).flatten(-2)
    return _number(F.pad(row, (0, -row.shape[-1] % 8)).view(len(words), -1, 8))


def _unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The ``count`` words of ``_pack`` again, int32."""
    row = _bits(packed, 8).flatten(-2)[..., : count * bits]
    return _number(row.reshape(len(packed), count, bits).int())


def _bits(x: Tensor, count: int) -> Tensor:
    """The bits of whole numbers (...), (..., count)."""
    places = torch.arange(count, dtype=x.dtype, device=x.device)
    return torch.bitwise_right_shift(x[..., None], places).bitwise_and_(1)  # >> has a wrong shape without numbers


def _number(bits: Tensor) -> Tensor:
    """The whole numbers (...) of bits (..., count), in their dtype."""
    places = torch.arange(bits.shape[-1], dtype=bits.dtype, device=bits.device)
    return torch.bitwise_left_shift(bits, places).sum(dim=-1, dtype=bits.dtype)
