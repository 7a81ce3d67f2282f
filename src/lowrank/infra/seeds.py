"""Random streams that depend on what they are for, and not on the order in which they are asked for.

New factors are drawn from (seed, layer, head, merge count), rounding noise from (seed, parameter, step). So a run does
not change when layers are visited in another order, when heads live on other ranks, or when a step runs inside a hook.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4096, typed=True)  # rules ask for the seed of a parameter's stream at every step
def stable_seed(*keys: object) -> int:
    """A 63-bit seed from ``keys``: the same on every machine and in every process.

    >>> stable_seed(0, "h.0.attn", 3) == stable_seed(0, "h.0.attn", 3) != stable_seed(0, "h.0.attn", 4)
    True
    """
    text = "\x1f".join(map(str, keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(device: torch.device | str, *keys: object) -> torch.Generator:
    """A fresh generator on ``device``, seeded from ``keys``."""
    return torch.Generator(device=device).manual_seed(stable_seed(*keys))


def draw_normal(shape: tuple[int, ...], *keys: object) -> Tensor:
    """Standard normal float32 numbers, drawn on the CPU so that every device sees the same ones."""
    return torch.randn(shape, generator=generator("cpu", *keys))
