"""A linear layer with its low-rank product: y = x Wᵀ + bias + s·z Bᵀ, where z = x Aᵀ is small and made before.

The product joins the output tile in registers, as one more step of the sum over the inputs, instead of reading y and
writing it again. With W and B transposed it is the input's gradient, dx = dy W + dz A.

Shape legend: x (tokens, in), W (out, in), z (tokens, rank), B (out, rank), y (tokens, out); any strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank.linalg.kernels.common import multiply

TILE = (128, 128, 64)  # tokens, outputs, inputs
GROUP = 8  # rows of tiles that go through the columns together, so that W is read from the cache


@triton.jit
def _linear(
    X, W, bias, Z, B, Y, tokens, outputs, inputs, rank, x_token, x_in, w_out, w_in, b_out, b_rank, scale,
    BIAS: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    TI: tl.constexpr, TJ: tl.constexpr, TK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), GROUP)
    i = (row * TI + tl.arange(0, TI)).to(tl.int64)[:, None]
    j = (column * TJ + tl.arange(0, TJ)).to(tl.int64)
    y = tl.zeros((TI, TJ), tl.float32)
    for start in range(0, inputs, TK):
        k = start + tl.arange(0, TK)
        x = tl.load(X + i * x_token + k * x_in, mask=(i < tokens) & (k < inputs), other=0.0)
        w = tl.load(W + k[:, None] * w_in + j * w_out, mask=(k[:, None] < inputs) & (j < outputs), other=0.0)
        y = multiply(x, w, y, NARROW, PRECISION)
    for start in range(0, rank, R):
        r = start + tl.arange(0, R)
        z = tl.load(Z + i * rank + r, mask=(i < tokens) & (r < rank), other=0.0)
        b = tl.load(B + r[:, None] * b_rank + j * b_out, mask=(r[:, None] < rank) & (j < outputs), other=0.0)
        y = multiply(z * scale, b.to(tl.float32), y, NARROW, PRECISION)
    if BIAS:
        y += tl.load(bias + j, mask=j < outputs, other=0.0).to(tl.float32)
    tl.store(Y + i * outputs + j, y.to(Y.dtype.element_ty), mask=(i < tokens) & (j < outputs))


def linear(
    x: Tensor, W: Tensor, bias: Tensor | None, z: Tensor, B: Tensor, scale: float, tile: tuple[int, int, int] = TILE
) -> Tensor:
    """x Wᵀ + bias + scale·z Bᵀ in x's dtype, for matrices; z contiguous, in float32."""
    (tokens, inputs), outputs, rank = x.shape, W.shape[0], z.shape[1]
    y = x.new_empty(tokens, outputs)
    narrow = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(x.dtype)
    i, j, k = tile
    _linear[triton.cdiv(tokens, i), triton.cdiv(outputs, j)](
        x, W, bias, z, B, y, tokens, outputs, inputs, rank, *x.stride(), *W.stride(), *B.stride(), scale,
        BIAS=bias is not None, NARROW=narrow,
        PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        TI=i, TJ=j, TK=k, R=max(16, min(64, triton.next_power_of_2(rank))), GROUP=GROUP,
    )  # fmt: skip
    return y
