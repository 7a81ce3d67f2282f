"""The dtype to compute in, and stochastic rounding back from float32 into bfloat16.

A bfloat16 number has 8 significant bits, so an update below 1/512 of a weight is lost when it is rounded to the
nearest. Rounded up with a probability equal to the discarded fraction, it survives in expectation (Gupta et al.,
arXiv 1502.02551). As bfloat16 is the upper half of a float32, this takes two operations: add a uniform 16-bit integer
to the bits, then clear the lower half.
"""

import torch
from torch import Tensor

from lowrank.linalg.chunks import parts


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for numbers of ``dtype``: float64 stays, everything narrower becomes float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@torch.no_grad()
def round_into_(target: Tensor, source: Tensor, noise: torch.Generator | None = None) -> Tensor:
    """Write float32 ``source`` into ``target`` of the same shape, in place, and return ``target``.

    bfloat16 targets are rounded stochastically with ``noise`` (the device's default generator where it is None);
    targets of any other dtype to the nearest. Values that are not finite are carried over as they are.
    """
    if target.dtype is not torch.bfloat16:
        return target.copy_(source)
    if target.is_contiguous() and source.is_contiguous():
        flat, exact = target.view(-1), source.view(-1)
        for part in parts(flat.numel(), 1, flat):
            flat[part] = _rounded(exact[part], noise)
        return target
    return target.copy_(_rounded(source, noise))


def _rounded(source: Tensor, noise: torch.Generator | None) -> Tensor:
    exact = source.to(torch.float32)
    bits = exact.view(torch.int32)
    uniform = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=noise)
    rounded = (uniform.add_(bits) & -65536).view(torch.float32)
    return torch.where(exact.isfinite(), rounded, exact)
