"""The projected step in two kernels: R = QᵀG with Adam on R's tile as it is finished, and W ← βW − α·Q S.

A step is to read the gradient once, read and write the weights once, and little else: R, and the direction of it, are
rank/side of that. Products are of bfloat16 numbers where the gradient is one, else at torch's own precision
(``torch.set_float32_matmul_precision``), and are summed in float32. bfloat16 weights are rounded stochastically.

Shape legend: W, G (rows, cols);  left: Q (rows, rank), R, M, V, S (rank, cols);  right: Q (cols, rank), R and its like
(rows, rank), which is the left one of everything transposed, and so differs in strides alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank.linalg.kernels.common import adam, multiply, store_rounded

TILE = (64, 128, 32)  # along rank (or rows), along columns, and summed over at a time


@triton.jit
def _project(
    G, Q, M, V, S, step, rank, cols, rows, g_row, g_col, r_rank, r_col,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    TI: tl.constexpr, TJ: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * TI + tl.arange(0, TI)
    j = (tl.program_id(1) * TJ + tl.arange(0, TJ)).to(tl.int64)
    r = tl.zeros((TI, TJ), tl.float32)
    for start in range(0, rows, TK):
        k = (start + tl.arange(0, TK)).to(tl.int64)
        q = tl.load(Q + k[None, :] * rank + i[:, None], mask=(k[None, :] < rows) & (i[:, None] < rank), other=0.0)
        g = tl.load(G + k[:, None] * g_row + j * g_col, mask=(k[:, None] < rows) & (j < cols), other=0.0)
        r = multiply(q, g, r, NARROW, PRECISION)
    at, inside = i[:, None] * r_rank + j * r_col, (i[:, None] < rank) & (j < cols)
    m, v = tl.load(M + at, mask=inside, other=0.0), tl.load(V + at, mask=inside, other=0.0)
    m, v, s = adam(r, m, v, tl.load(step), BETA1, BETA2, EPS)
    tl.store(M + at, m, mask=inside)
    tl.store(V + at, v, mask=inside)
    tl.store(S + at, s, mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _add_product(
    W, X, Y, lr, step, rows, cols, rank, x_row, x_rank, y_rank, y_col, scale, decay, seed,
    NARROW: tl.constexpr, PRECISION: tl.constexpr, STOCHASTIC: tl.constexpr,
    TI: tl.constexpr, TJ: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * TI + tl.arange(0, TI)).to(tl.int64)[:, None]
    j = (tl.program_id(1) * TJ + tl.arange(0, TJ)).to(tl.int64)
    u = tl.zeros((TI, TJ), tl.float32)
    for start in range(0, rank, TK):
        k = start + tl.arange(0, TK)
        x = tl.load(X + i * x_row + k * x_rank, mask=(i < rows) & (k < rank), other=0.0)
        y = tl.load(Y + k[:, None] * y_rank + j * y_col, mask=(k[:, None] < rank) & (j < cols), other=0.0)
        u = multiply(x, y, u, NARROW, PRECISION)
    at, inside = i * cols + j, (i < rows) & (j < cols)
    w = tl.load(W + at, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(lr)
    w = w * (1 - rate * decay) - (rate * scale) * u
    store_rounded(W + at, w, inside, seed + tl.load(step).to(tl.int32), at, STOCHASTIC)


def projected_adam_(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    moments: tuple[Tensor, Tensor],
    step: Tensor,
    *,
    left: bool,
    lr: Tensor,
    decay: float,
    scale: float,
    betas: tuple[float, float],
    eps: float,
    seed: int,
    tile: tuple[int, int, int] = TILE,
) -> None:
    """One step of a contiguous matrix; ``step`` (float32, on the device, as ``lr`` is) is counted on."""
    step += 1
    narrow = tl.bfloat16 if grad.dtype is torch.bfloat16 else None
    kind = {"NARROW": narrow, "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"}
    first, second = moments
    s = torch.empty_like(first)
    (g, r), rank = ((grad, first) if left else (grad.mT, first.mT)), basis.shape[-1]
    i, j, k = tile
    _project[triton.cdiv(rank, i), triton.cdiv(g.shape[1], j)](
        g, basis, first, second, s, step, rank, g.shape[1], g.shape[0], *g.stride(), *r.stride(),
        BETA1=betas[0], BETA2=betas[1], EPS=eps, **kind, TI=i, TJ=j, TK=k,
    )  # fmt: skip
    x, y = (basis, s) if left else (s, basis.mT)
    rows, cols = param.shape
    _add_product[triton.cdiv(rows, i), triton.cdiv(cols, j)](
        param, x, y, lr, step, rows, cols, rank, *x.stride(), *y.stride(), scale, decay, seed,
        **kind, STOCHASTIC=param.dtype is torch.bfloat16, TI=i, TJ=j, TK=k,
    )  # fmt: skip
