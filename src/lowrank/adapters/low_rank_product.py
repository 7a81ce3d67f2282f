"""The low-rank product y += s · B A x, in place and with no more kept for backward than it needs.

One autograd function for every case: G shards of the batch, each with its own factors. Heads that share the batch are
one shard of G·rank stacked rows. Written by hand because autograd would keep or copy tensors of y's size: it keeps x
once (the layer's frozen W keeps nothing), z = A x (rank-sized) and the factors. Where y is so small that the call of
such a function costs more than its arithmetic, the same is done in ordinary operations (``benchmarks/overhead.py``).

    z = A x        y += s·B z        dz = s·Bᵀ dy        dB = s·dy zᵀ        dA = dz xᵀ        dx += Aᵀ dz

On a GPU all of y may be made with the change in it (``linear_low_rank``).

Shapes: y (rows, width), x (rows, in), A (G, R, in), B (G, out, R), z (rows, R);  the change is added to columns
start : start + out of y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 16  # numbers in y


def add_low_rank_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, sizes: list[int], start: int = 0) -> Tensor:
    """``y[..., start : start + out] += scale · x_g A_gᵀ B_gᵀ`` for each shard g of the first dimension, in place.

    y (batch, ..., width), x (batch, ..., in), A (G, R, in), B (G, out, R); ``sizes`` are the G shard sizes, summing to
    batch, or of a batch that all G share its own size. A small y may be left as it is, and the sum be returned.
    """
    if not (A.dtype is y.dtype and x.dtype is y.dtype):
        A, B, x = (t.to(y.dtype) for t in (A, B, x))
    small = 0 < y.numel() <= SMALL and B.shape[1] == y.shape[-1] and len(set(sizes)) == 1
    if small and len(sizes) > 1:
        return _add_small_shards(y, x, A, B, scale)
    if len(sizes) == 1:
        Bt = B.transpose(1, 2).reshape(-1, B.shape[1]) if len(B) > 1 else _rows(B, B.shape[2]).t()
        A = _rows(A, A.shape[2])
        if small:
            return _add_small(y, x, A, Bt, scale)
        A, B = A[None], Bt.mT[None]
    if torch.compiler.is_compiling():
        return _add_plainly(y, x, A, B, scale, sizes, start)
    return _AddLowRank.apply(y, x, A, B, scale, sizes, start)


def _add_small(y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, scale: float) -> Tensor:
    """All of y changed by one pair of factors, A (R, in) and Bt (R, out)."""
    if y.dim() == 2:
        return y.addmm_(torch.mm(x, A.t()), Bt, alpha=scale)
    z = torch.mm(_rows(x, x.shape[-1]), A.t())
    return torch.addmm(_rows(y, y.shape[-1]), z, Bt, alpha=scale).view(y.shape)


def _add_small_shards(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """All of y changed, by shards of one size."""
    shards, x = A.shape[0], x.contiguous()
    z = torch.bmm(x.view(shards, -1, x.shape[-1]), A.transpose(1, 2))
    return torch.baddbmm(y.view(shards, -1, y.shape[-1]), z, B.transpose(1, 2), alpha=scale).view(y.shape)


def _rows(t: Tensor, width: int) -> Tensor:
    """``t`` as a matrix; to the host a view costs half of what reshaping does, as ``t`` and ``transpose`` do of mT."""
    return t.view(-1, width) if t.is_contiguous() else t.reshape(-1, width)


def _add_plainly(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, sizes: list[int], start: int) -> Tensor:
    """The same in ordinary operations, which the compiler fuses by itself."""
    parts = [part @ A[g].mT @ B[g].mT for g, part in enumerate(x.split(sizes))]
    change = scale * torch.cat(parts)
    if change.shape == y.shape:
        return y + change
    left, right = y[..., :start], y[..., start + B.shape[1] :]
    return torch.cat([left, y[..., start : start + B.shape[1]] + change, right], dim=-1)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, sizes: list[int], start: int
    ) -> Tensor:
        rows, target = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])[:, start : start + B.shape[1]]
        spans = _spans(sizes, rows.shape[0])
        z = rows.new_empty(rows.shape[0], A.shape[1])
        for g, (i, j) in enumerate(spans):
            torch.mm(rows[i:j], A[g].mT, out=z[i:j])
            target[i:j].addmm_(z[i:j], B[g].mT, alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, z, A, B)
        ctx.scale, ctx.spans, ctx.start = scale, spans, start
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, A, B = ctx.saved_tensors
        _, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        rows = x.reshape(-1, x.shape[-1])
        d = dy.reshape(-1, dy.shape[-1])[:, ctx.start : ctx.start + B.shape[1]]
        dx = torch.empty_like(rows) if need_x else None
        dA = torch.empty_like(A) if need_A else None
        dB = torch.empty_like(B) if need_B else None
        Bt = B.mT.contiguous()  # (G, R, out): a thin product is fastest where its long rows are contiguous
        for g, (i, j) in enumerate(ctx.spans):
            if dB is not None:
                dB[g] = (z[i:j].mT @ d[i:j]).mT
            dz = (d[i:j] @ Bt[g].mT).mul_(ctx.scale)
            if dA is not None:
                torch.mm(dz.mT, rows[i:j], out=dA[g])
            if dx is not None:
                torch.mm(dz, A[g], out=dx[i:j])
        if dB is not None:
            dB.mul_(ctx.scale)
        return dy, None if dx is None else dx.view_as(x), dA, dB, None, None, None


def _spans(sizes: list[int], rows: int) -> list[tuple[int, int]]:
    """(first row, end) of each shard, for shards of ``sizes`` examples of equally many rows each."""
    each, spans, at = rows // max(sum(sizes), 1), [], 0
    for size in sizes:
        spans.append((at, at + size * each))
        at += size * each
    return spans


# --- with the layer's own product, by a kernel --------------------------------------------------------------------


def takes_kernel(x: Tensor, W: Tensor) -> bool:
    """Whether ``linear_low_rank`` computes what ``F.linear`` and ``add_low_rank_`` do: W frozen, and no autocast."""
    return x.dtype is W.dtype and not W.requires_grad and not torch.is_autocast_enabled(x.device.type)


def linear_low_rank(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x Wᵀ + bias + scale·x Aᵀ Bᵀ for W (out, in), A (R, in), B (out, R), the change within the product's own tiles."""
    return _Linear.apply(x, W, bias, A, B, scale)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        from lowrank.linalg.kernels.layer import linear

        rows = x.reshape(-1, x.shape[-1])
        z = (rows @ A.mT.to(x.dtype)).to(A.dtype)
        ctx.save_for_backward(rows, W, z, A, B)
        ctx.scale, ctx.shape = scale, x.shape
        return linear(rows, W, bias, z, B, scale).view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from lowrank.linalg.kernels.layer import linear

        rows, W, z, A, B = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        d = dy.reshape(-1, dy.shape[-1])
        dz = (d @ B.to(d.dtype)).to(A.dtype).mul_(ctx.scale)
        dx = linear(d, W.mT, None, dz, A.mT, 1.0).view(ctx.shape) if need_x else None
        dA = (dz.to(rows.dtype).mT @ rows).to(A.dtype) if need_A else None
        dB = (d.mT @ z.to(d.dtype)).to(B.dtype).mul_(ctx.scale) if need_B else None
        return dx, None, d.sum(0) if need_bias else None, dA, dB, None
