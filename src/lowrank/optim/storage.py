"""How a tensor of state is kept: in float32, bfloat16, or block-wise int8 (a basis also in int4).

Storage is not another optimizer: a rule reads its moments as float32, computes, and writes them back. What is kept is
plain tensors (``codes`` and ``scales``), so that it loads with ``weights_only=True`` and fits in safetensors, which
torchao's quantised tensor does not. bfloat16 and int8 moments are written with dithered rounding (``linalg.quantise``),
since a second moment changes by 0.1 % a step and a code is coarser than that.

Bytes for n numbers in b = ceil(n/256) blocks, n rounded up to a multiple of b for int8 and of 2b for int4:

    float32   4n (8n for float64 parameters)
    bfloat16  2n
    int8      n + 4b
    int4      n/2 + 4b
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank.linalg.quantise import Code, round_bfloat16
from lowrank.linalg.rounding import wide

Storage = Literal["float32", "bfloat16", "int8"]
BasisStorage = Literal["float32", "bfloat16", "int8", "int4"]
Stored = Any  # Tensor | dict[str, Tensor]; a nested State does not say which to the type checker

FIRST = Code(power=2)  # a first moment: signed
SECOND = Code(signed=False, power=4)  # a second moment: not negative, and never rounded to 0 beside a large one


@cache
def basis_code(storage: str) -> Code:
    """How a basis is coded: uniformly."""
    return Code(bits=4 if storage == "int4" else 8)


def allocate(like: Tensor, storage: str, code: Code) -> Stored:
    """Zeros in the shape and on the device of ``like``, kept as ``storage`` ("float32": float64 where ``like`` is)."""
    if storage == "float32":
        return torch.zeros_like(like, dtype=wide(like.dtype))
    if storage == "bfloat16":
        return torch.zeros_like(like, dtype=torch.bfloat16)
    return code.allocate(like)


def read(stored: Stored, code: Code, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What is stored, in ``dtype``. A tensor kept in that dtype is returned itself: changes in place are kept."""
    if isinstance(stored, Tensor):
        return stored if stored.dtype is dtype else stored.to(dtype)
    return code.decode(stored, shape, dtype)


def write_(stored: Stored, value: Tensor, code: Code, tick: Tensor | int | None) -> None:
    """Store ``value``; narrower storage is dithered by ``tick``, or rounded to the nearest where that is None."""
    if not isinstance(stored, Tensor):
        code.encode_(stored, value, tick)
    elif stored.dtype is torch.bfloat16 and tick is not None:
        stored.copy_(round_bfloat16(value, tick))
    elif stored is not value:
        stored.copy_(value)
