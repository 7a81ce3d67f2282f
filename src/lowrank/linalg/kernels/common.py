"""What the kernels share: a product, Adam's step, and rounding to the dtype of a weight."""

from __future__ import annotations

import triton
import triton.language as tl

from lowrank.linalg import kernels

INTERPRETED = tl.constexpr(kernels.INTERPRETED)


@triton.jit
def multiply(a, b, total, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b in float32, of numbers rounded to ``NARROW``; where that is None, as they are, at ``PRECISION``."""
    if NARROW is not None:
        a, b = a.to(NARROW), b.to(NARROW)
        if INTERPRETED:  # which multiplies bfloat16 as if it were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def adam(g, m, v, step, beta1: tl.constexpr, beta2: tl.constexpr, eps: tl.constexpr):
    """(m, v, step): Adam's moments after gradient ``g``, and m̂ / (√v̂ + ε), in float32. ``step`` counts this one."""
    m += (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    count = step.to(tl.float64)
    first = 1 - tl.exp2(count * tl.log2(tl.full((), beta1, tl.float64)))
    second = tl.sqrt(1 - tl.exp2(count * tl.log2(tl.full((), beta2, tl.float64))))
    return m, v, m * (second / first).to(tl.float32) / (tl.sqrt_rn(v) + (eps * second).to(tl.float32))


@triton.jit
def mixed(x):
    """32 bits, each of which depends on every one of ``x`` (Wellons 2018, "Prospecting for hash functions"); a tenth of
    the arithmetic of a cryptographic generator, which would take as long as the step."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def store_rounded(pointers, x, inside, seed, place, STOCHASTIC: tl.constexpr):
    """Write float32 ``x``; into bfloat16 rounded up with the probability of what is cut off (``linalg.rounding``)."""
    if STOCHASTIC:
        noise = (mixed(mixed(seed.to(tl.uint32)) ^ place.to(tl.uint32)) & 0xFFFF).to(tl.int32)
        bits = (x.to(tl.int32, bitcast=True) + noise) & -65536
        finite = tl.abs(x) < float("inf")
        x = tl.where(finite, bits.to(tl.float32, bitcast=True), x)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=inside)
