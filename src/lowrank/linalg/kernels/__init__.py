"""Fused kernels for CUDA, in Triton: each computes what plain operations elsewhere do, in fewer passes over memory.

    projected       R = QᵀG, Adam on R, W ← W(1 − lr·decay) − lr·scale·Q S: two passes, bfloat16 weights included
    layer           y = x Wᵀ + bias + s·z Bᵀ: the low-rank product joins the output tile while it is in registers
    int8            AdamW with moments in 8 bits: read, decode, update, encode, write, in one pass
    newton_schulz   Muon's iteration over equal shapes at once, of each symmetric product only the lower half

The plain operations are the definition, and what runs wherever a kernel was not chosen. ``LOWRANK_KERNELS`` chooses:
``off``; ``on``, all of them, on every CUDA device; ``auto`` (the default), those that were measured to be faster on a
device of this kind (``FASTER``) by ``python -m benchmarks.gpu --sections kernels``. Nothing has been measured yet, so
that ``auto`` chooses none today. Under Triton's interpreter (``TRITON_INTERPRET=1``) they run on a CPU, for the tests.

Each kernel has one place that calls it: ``optim.projected``, ``adapters.lora``, ``optim.rules`` and ``optim.muon``.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Name = Literal["projected", "layer", "int8", "newton_schulz"]
Capability = tuple[int, int]
FASTER: dict[Name, frozenset[Capability]] = {name: frozenset() for name in get_args(Name)}
MODES = ("off", "on", "auto")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run in Triton's interpreter, on the CPU


def possible(like: Tensor) -> bool:
    """Whether any kernel may be chosen for tensors on this device."""
    if not (like.is_cuda or INTERPRETED):  # quickly, since layers ask at every call
        return False
    return mode() != "off" and not torch.compiler.is_compiling() and is_installed()


def chosen(name: Name, like: Tensor) -> bool:
    """Whether the kernel ``name`` is to be used for tensors on this device."""
    if not possible(like):
        return False
    return mode() == "on" or (like.is_cuda and torch.cuda.get_device_capability(like.device) in FASTER[name])


def takes(*tensors: Tensor) -> bool:
    """Whether the layout and the dtype of weights and gradients are what the kernels of a step expect."""
    return all(t.dtype in (torch.float32, torch.bfloat16) and t.is_contiguous() for t in tensors)


def mode() -> str:
    """``LOWRANK_KERNELS``.

    Raises:
        ValueError: it is none of the words above.
    """
    given = os.environ.get("LOWRANK_KERNELS", "auto")
    if given not in MODES:
        raise ValueError(f"LOWRANK_KERNELS={given!r} is unknown; it is one of {', '.join(MODES)}")
    return given


def rate(lr: float | Tensor, like: Tensor) -> Tensor:
    """A learning rate as kernels read it, one float32 on the device: so that what was captured sees it change."""
    return lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float32, device=like.device)


@cache
def is_installed() -> bool:
    return find_spec("triton") is not None
