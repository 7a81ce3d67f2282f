"""Symmetric products of a stack of matrices: β·D + α·X Xᵀ, of which only the lower half is computed, and mirrored.

Two of the three products in an iteration of Newton and Schulz are such (``optim.muon``), so that half of their
arithmetic goes.

Shape legend: X (N, rows, cols), D and the result (N, rows, rows), D symmetric.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank.linalg.kernels.common import multiply

TILE = (128, 32)  # rows, and summed over at a time


@triton.jit
def _symmetric(
    X, D, C, rows, cols, x_each, x_row, x_col, alpha, beta,
    ADD: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, TI: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    row, column, each = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if column > row:
        return
    i, j = row * TI + tl.arange(0, TI)[:, None], column * TI + tl.arange(0, TI)[None, :]
    X += each * x_each
    total = tl.zeros((TI, TI), tl.float32)
    for start in range(0, cols, TK):
        k = start + tl.arange(0, TK)
        a = tl.load(X + i * x_row + k[None, :] * x_col, mask=(i < rows) & (k[None, :] < cols), other=0.0)
        b = tl.load(X + j * x_row + k[:, None] * x_col, mask=(j < rows) & (k[:, None] < cols), other=0.0)
        total = multiply(a, b, total, NARROW, PRECISION)
    total *= alpha
    at, inside, start = i * rows + j, (i < rows) & (j < rows), each * rows * rows
    if ADD:
        total += beta * tl.load(D + start + at, mask=inside, other=0.0).to(tl.float32)
    total = total.to(C.dtype.element_ty)
    tl.store(C + start + at, total, mask=inside & (i >= j))
    tl.store(C + start + j * rows + i, total, mask=inside & (i > j))


def symmetric(
    x: Tensor, add: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0, tile: tuple[int, int] = TILE
) -> Tensor:
    """α·x xᵀ + β·add for a matrix, or for each of a stack."""
    if x.dim() == 2:
        return symmetric(x[None], None if add is None else add[None], alpha=alpha, beta=beta, tile=tile)[0]
    count, rows, cols = x.shape
    out, (i, k) = x.new_empty(count, rows, rows), tile
    tiles = triton.cdiv(rows, i)
    _symmetric[tiles, tiles, count](
        x, out if add is None else add, out, rows, cols, *x.stride(), alpha, beta,
        ADD=add is not None, NARROW=tl.bfloat16 if x.dtype is torch.bfloat16 else None,
        PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32", TI=i, TK=k,
    )  # fmt: skip
    return out
