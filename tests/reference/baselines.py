"""The baselines' rules, written out from their papers in numpy and float64, one matrix and one step after another.

Nothing here is shared with the library. Each function takes a weight (out, in), gradients that do not depend on it, and
returns the weight after them all: W ← W(1 − lr·decay) − lr·U.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def descend(weight: Array, gradients: list[Array], lr: float, decay: float, step: Callable[[Array], Array]) -> Array:
    w = weight.copy()
    for g in gradients:
        w = w * (1 - lr * decay) - lr * step(g)
    return w


def newton_schulz(m: Array, iterations: int = 5) -> Array:
    """On the singular values, where the iteration x ← ax + bx³ + cx⁵ acts."""
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def muon(
    weight: Array,
    gradients: list[Array],
    lr: float,
    decay: float,
    *,
    momentum: float = 0.95,
    scale: Callable[[int, int], float] = lambda out, inn: 0.2 * max(out, inn) ** 0.5,
) -> Array:
    """Jordan et al. 2024 with Nesterov's momentum; the scale of arXiv 2502.16982, section 2.2."""
    kept = np.zeros_like(weight)

    def step(g: Array) -> Array:
        kept[:] = momentum * kept + (1 - momentum) * g
        return scale(*g.shape) * newton_schulz(momentum * kept + (1 - momentum) * g)

    return descend(weight, gradients, lr, decay, step)


def scale(weight: Array, gradients: list[Array], lr: float, decay: float, *, momentum: float = 0.0) -> Array:
    """SCALE, arXiv 2506.16659, algorithm 1."""
    kept = np.zeros_like(weight)

    def step(g: Array) -> Array:
        kept[:] = momentum * kept + (1 - momentum) * g
        return np.stack([column / np.sqrt((column**2).sum()) for column in kept.T], axis=1)

    return descend(weight, gradients, lr, decay, step)


def soap(weight: Array, gradients: list[Array], lr: float, decay: float, *, every: int = 3, sides: str = "lr") -> Array:
    """SOAP, arXiv 2409.11321, algorithms 3 and 4, betas 0.95, Adam's bias correction; the first gradient only makes the
    bases. ``sides``: which of them have one."""
    b1 = b2 = 0.95
    rows, cols = weight.shape
    left, right, m, v = np.zeros((rows, rows)), np.zeros((cols, cols)), 0 * weight, 0 * weight
    P, Q = np.eye(rows), np.eye(cols)
    w = weight.copy()
    for t, g in enumerate(gradients):
        w = w * (1 - lr * decay)
        if t:
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * (P.T @ g @ Q) ** 2
            w = w - lr * P @ ((P.T @ m @ Q / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)) @ Q.T
        left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        for side, gram in (("l", left), ("r", right)):
            if side not in sides or t % every:
                continue
            basis = P if side == "l" else Q
            if t == 0:
                basis = np.linalg.eigh(gram)[1][:, ::-1]
            else:
                order = np.argsort(-np.diag(basis.T @ gram @ basis))
                basis = np.linalg.qr(gram @ basis[:, order])[0]
                v = v[order] if side == "l" else v[:, order]
            P, Q = (basis, Q) if side == "l" else (P, basis)
    return w


def dion(weight: Array, gradients: list[Array], lr: float, decay: float, *, Q: Array, momentum: float = 0.95) -> Array:
    """Dion, arXiv 2504.05295, algorithm 1, from the right basis ``Q`` (in, rank)."""
    kept, q = np.zeros_like(weight), Q.copy()
    scale = (weight.shape[0] / weight.shape[1]) ** 0.5

    def step(g: Array) -> Array:
        buffer = kept + g
        p = np.linalg.qr(buffer @ q)[0]
        r = buffer.T @ p
        kept[:] = buffer - (1 - momentum) * p @ r.T
        q[:] = r / np.sqrt((r**2).sum(axis=0))
        return scale * p @ q.T

    return descend(weight, gradients, lr, decay, step)


def adafactor(weight: Array, gradients: list[Array], lr: float, decay: float) -> Array:
    """Adafactor, arXiv 1804.04235, algorithm 4, without first moment and relative step sizes."""
    row, col = np.zeros(weight.shape[0]), np.zeros(weight.shape[1])
    count = iter(range(1, len(gradients) + 1))

    def step(g: Array) -> Array:
        beta = 1 - next(count) ** -0.8
        row[:] = beta * row + (1 - beta) * (g**2 + 1e-30).sum(axis=1)
        col[:] = beta * col + (1 - beta) * (g**2 + 1e-30).sum(axis=0)
        u = g / np.sqrt(np.outer(row, col) / row.sum())
        return u / max(1.0, np.sqrt((u**2).mean()))

    return descend(weight, gradients, lr, decay, step)


def root(square: Array) -> Array:
    """square^(−½) of a symmetric matrix."""
    values, vectors = np.linalg.eigh(square)
    return vectors / np.sqrt(values) @ vectors.T


def lora_muon(A: Array, B: Array, gradients: list[Array], lr: float) -> tuple[Array, Array]:
    """LoRA-Muon, arXiv 2606.12921, without decay, at Muon's scale by shape; gradients are those of the product BA."""
    a, b = np.zeros_like(A), np.zeros_like(B)
    rate = lr / 2 * 0.2 * max(len(B), A.shape[1]) ** 0.5
    for g in gradients:
        a, b = 0.95 * a + 0.05 * B.T @ g, 0.95 * b + 0.05 * g @ A.T
        by_a, by_b = root(A @ A.T), root(B.T @ B)
        A, B = A - rate * by_b @ newton_schulz(by_b @ a), B - rate * newton_schulz(b @ by_a) @ by_a
    return A, B


def lora_rite(A: Array, B: Array, gradients: list[Array], lr: float) -> tuple[Array, Array]:
    """LoRA-RITE, arXiv 2410.20625, algorithm 1, betas (0.9, 0.999) corrected for the start; second moments are means
    over the rows, and what escapes decays with them."""
    kept: dict[str, tuple[Array, Array, Array, float]] = {}

    def step(name: str, g: Array, other: Array, t: int) -> Array:
        rank = g.shape[1]
        m, v, before, lost = kept.get(name, (0 * g, np.zeros((rank, rank)), 0 * other, 0.0))
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (0.9, 0.999))
        inverse = root(other.T @ other)
        basis, plain = other @ inverse, g @ inverse
        turn = basis.T @ before
        turned = turn @ v @ turn.T
        lost = b2 * (lost + max(0.0, (np.linalg.eigvalsh(v) - np.linalg.eigvalsh(turned)).max()))
        v = b2 * turned + (1 - b2) * plain.T @ plain / len(plain)
        m = b1 * m @ turn.T + (1 - b1) * plain @ root(v + lost * np.eye(rank))
        kept[name] = (m, v, basis, lost)
        return m @ inverse

    for t, g in enumerate(gradients, start=1):
        of_a, of_b = step("A", (B.T @ g).T, B, t), step("B", g @ A.T, A.T, t)
        A, B = A - lr * of_a.T, B - lr * of_b
    return A, B


def ldadam(
    weight: Array, gradients: list[Array], lr: float, decay: float, *, P: Array, rho: float = 0.908
) -> tuple[Array, Array]:
    """LDAdam, arXiv 2410.16103, algorithm 1, left projection, betas (0.908, 0.99), from the first basis ``P`` (out,
    rank). Returns the weight and the error."""
    b1, b2 = 0.908, 0.99
    m = v = np.zeros((P.shape[1], weight.shape[1]))
    error, w = np.zeros_like(weight), weight.copy()
    for t, g in enumerate(gradients):
        a = g + error
        new, before = P, P @ m
        if t:
            c1, c2 = 1 - b1**t, 1 - b2**t
            b = rho * P @ m / c1 + (1 - rho) * a
            new = np.linalg.qr(b @ b.T @ P)[0]
            turn = new.T @ P
            v = c2 * np.abs(turn**2 @ (v / c2 - (m / c1) ** 2) + (turn @ m / c1) ** 2)
            m = turn @ m
        error = a - new @ new.T @ a + b1 / (1 - b1) * (before - new @ m)
        m, v, P = b1 * m + (1 - b1) * new.T @ a, b2 * v + (1 - b2) * (new.T @ a) ** 2, new
        step = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + 1e-8)
        w = w * (1 - lr * decay) - lr * P @ step
    return w, error


def frugal(weight: Array, gradients: list[Array], lr: float, decay: float, *, every: int, rank: int) -> Array:
    """FRUGAL, arXiv 2411.07837, algorithm 1, by SVD on the left, betas (0.9, 0.999); state begins anew with a basis."""
    w = weight.copy()
    for t, g in enumerate(gradients):
        if t % every == 0:
            P, k, m, v = np.linalg.svd(g)[0][:, :rank], 0, 0.0, 0.0
        k, r = k + 1, P.T @ g
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r**2
        inside = P @ (m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8))
        w = w * (1 - lr * decay) - lr * (inside + np.sign(g - P @ r))
    return w
