"""AdamW with moments in 8 bits, in one pass: decode, update, step, encode, a block of up to 256 numbers at a time.

The blocks, the codes and the dithering are those of ``linalg.quantise``, whose formulas these are: share = |x|/s,
level = L·share^(1/k), rounded up where what is left of the share exceeds the dither u.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank.linalg.kernels.common import adam, store_rounded
from lowrank.linalg.quantise import BLOCK, dither, split

BLOCKS = 8  # in a program


@triton.jit
def _decoded(code, scale, LEVELS: tl.constexpr, SIGNED: tl.constexpr):
    x = tl.div_rn(code.to(tl.float32), tl.full(code.shape, LEVELS, tl.float32))
    if SIGNED:  # power 2
        return x * tl.abs(x) * scale
    x = x * x  # power 4
    return x * x * scale


@triton.jit
def _raised(code, LEVELS: tl.constexpr, SIGNED: tl.constexpr):
    x = tl.div_rn(code, tl.full(code.shape, LEVELS, tl.float32))
    x = x * x
    return x if SIGNED else x * x


@triton.jit
def _encoded(x, u, LEVELS: tl.constexpr, SIGNED: tl.constexpr):
    """(codes as float32, scales) of blocks (N, 256)."""
    scale = tl.max(tl.abs(x), axis=1)
    share = tl.div_rn(tl.abs(x), tl.broadcast_to(tl.where(scale > 0, scale, 1.0)[:, None], x.shape))
    root = tl.sqrt_rn(share) if SIGNED else tl.sqrt_rn(tl.sqrt_rn(share))
    code = tl.minimum(tl.floor(root * LEVELS), LEVELS - 1)
    low, high = _raised(code, LEVELS, SIGNED), _raised(code + 1, LEVELS, SIGNED)
    code += tl.where(tl.div_rn(share - low, high - low) > u, 1.0, 0.0)
    return tl.where(x < 0, -code, code), scale


@triton.jit(do_not_specialize=["seed"])
def _step(
    P, G, M, m_scale, V, v_scale, step, U, lr, decay, seed, numbers, blocks, each, size,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, STOCHASTIC: tl.constexpr,
    N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    column, there = tl.arange(0, WIDTH), block < blocks
    within = (block % each)[:, None] * size + column  # the number's place in its matrix
    held = there[:, None] & (column < size)
    inside, at = held & (within < numbers), (block // each)[:, None] * numbers + within
    code_at = block[:, None] * size + column
    m = _decoded(
        tl.load(M + code_at, mask=held, other=0), tl.load(m_scale + block, mask=there, other=0.0)[:, None], 127, True
    )
    v = _decoded(
        tl.load(V + code_at, mask=held, other=0), tl.load(v_scale + block, mask=there, other=0.0)[:, None], 255, False
    )
    g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.load(step)
    m, v, s = adam(g, m, v, count, BETA1, BETA2, EPS)
    rate = tl.load(lr)
    p = tl.load(P + at, mask=inside, other=0.0).to(tl.float32)
    p = p * (1 - rate * decay) - rate * s
    store_rounded(P + at, p, inside, seed + count.to(tl.int32), at, STOCHASTIC)
    u = tl.load(U + column, mask=column < size, other=1.0)
    code, scale = _encoded(m, u, 127, True)
    tl.store(M + code_at, code.to(tl.int8), mask=held)
    tl.store(m_scale + block, scale, mask=there)
    code, scale = _encoded(v, u, 255, False)
    tl.store(V + code_at, code.to(tl.uint8), mask=held)
    tl.store(v_scale + block, scale, mask=there)


def adamw_int8_(
    param: Tensor,
    grad: Tensor,
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    step: Tensor,
    *,
    lr: Tensor,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    seed: int,
) -> None:
    """One step of a contiguous parameter; ``step`` (float32, on the device, as ``lr`` is) is counted on."""
    step += 1
    blocks, (lead, each, size) = first["scales"].numel(), split(param.shape)
    numbers = param.numel() // max(1, torch.Size(lead).numel())
    _step[(triton.cdiv(blocks, BLOCKS),)](
        param, grad, first["codes"], first["scales"], second["codes"], second["scales"], step,
        dither(size, step.view(()), param.device), lr, decay, seed, numbers, blocks, each, size,
        BETA1=betas[0], BETA2=betas[1], EPS=eps, STOCHASTIC=param.dtype is torch.bfloat16, N=BLOCKS, WIDTH=BLOCK,
    )  # fmt: skip
