"""LoRA-the-Explorer and ReLoRA in float64, written as plain loops from the papers: what the adapters are compared with.

LTE (arXiv 2402.16828, algorithm 1). N workers, each with factors (B_n, A_n) of its own and the same W; T steps of local
training, then W ← W + (s/N) Σ_n (B_n A_n − B_n⁰ A_n⁰), where (B_n⁰, A_n⁰) is what worker n had at the last merge
(reset-less), or W ← W + (s/N) Σ_n B_n A_n and new factors (reset). Between merges worker n computes with
W + s (B_n A_n − B_n⁰ A_n⁰).

ReLoRA (arXiv 2307.05695, algorithm 1). One worker; at a merge W ← W + s B A, A is drawn anew, B is zero, and of the
moments the smallest 90 % are dropped.

The task is a regression, y = x Wᵀ + b under the mean squared error over the whole batch; b is trained by everyone.
The optimizer is Adam from its paper (arXiv 1412.6980), or plain gradient descent.

Shapes: W (out, in), A (rank, in), B (out, rank), b (out,), x (batch, in), y (batch, out).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Adam:
    """One parameter's moments."""

    lr: float
    m: Tensor | float = 0.0
    v: Tensor | float = 0.0
    t: int = 0

    def step(self, p: Tensor, g: Tensor, lr_factor: float = 1.0) -> Tensor:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g * g
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return p - self.lr * lr_factor * m / (v.sqrt() + 1e-8)

    def prune(self, share: float) -> None:
        kept = kept_by_magnitude(self.m, share)
        self.m, self.v = self.m * kept, self.v * kept


@dataclass
class Descent:
    """Plain gradient descent, which has no moments."""

    lr: float

    def step(self, p: Tensor, g: Tensor, lr_factor: float = 1.0) -> Tensor:
        return p - self.lr * lr_factor * g

    def prune(self, share: float) -> None:
        pass


def kept_by_magnitude(t: Tensor, share: float) -> Tensor:
    """0 at the ``share`` smallest numbers of ``t`` (by magnitude), 1 elsewhere."""
    flat = t.flatten()
    kept = torch.ones_like(flat)
    for i in sorted(range(len(flat)), key=lambda i: abs(float(flat[i])))[: int(len(flat) * share)]:
        kept[i] = 0.0
    return kept.reshape(t.shape)


@dataclass
class Worker:
    A: Tensor
    B: Tensor
    A0: Tensor
    B0: Tensor
    adam_A: Adam | Descent
    adam_B: Adam | Descent

    def weight(self, W: Tensor, s: float) -> Tensor:
        return W + s * (self.B @ self.A - self.B0 @ self.A0)


@dataclass
class Reference:
    """Train step by step; ``new_A(head, merges)`` gives the factors that a worker starts from."""

    W: Tensor
    b: Tensor
    heads: int
    s: float
    new_A: Callable[[int, int], Tensor]
    rule: Callable[[], Adam | Descent]
    merge_every: int
    keep: bool
    forget: float = 0.0
    lr_factor: Callable[[int], float] = lambda step: 1.0
    steps: int = 0
    merges: int = 0
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rule_b = self.rule()
        for n in range(self.heads):
            A = self.new_A(n, 0)
            B = torch.zeros(self.W.shape[0], A.shape[0], dtype=torch.float64)
            self.workers.append(Worker(A, B, torch.zeros_like(A), torch.zeros_like(B), self.rule(), self.rule()))

    def step(self, shards: list[tuple[Tensor, Tensor]]) -> float:
        """One step, worker n on shard n; the loss is the mean over the examples and outputs of all shards."""
        numbers, loss, grad_b = sum(y.numel() for _, y in shards), 0.0, torch.zeros_like(self.b)
        factor = self.lr_factor(self.steps)
        for worker, (x, y) in zip(self.workers, shards, strict=True):
            error = x @ worker.weight(self.W, self.s).T + self.b - y
            loss += float((error**2).sum()) / numbers
            grad_y = 2 * error / numbers
            grad_W = grad_y.T @ x  # of the local matrix; the chain rule for s·B A follows
            grad_A, grad_B = self.s * worker.B.T @ grad_W, self.s * grad_W @ worker.A.T
            grad_b += grad_y.sum(dim=0)
            worker.A = worker.adam_A.step(worker.A, grad_A, factor)
            worker.B = worker.adam_B.step(worker.B, grad_B, factor)
        self.b = self.rule_b.step(self.b, grad_b, factor)
        self.steps += 1
        if self.steps % self.merge_every == 0:
            self.merge()
        return loss

    def merged(self) -> Tensor:
        """The mean of the workers' local matrices."""
        total = torch.zeros_like(self.W)
        for worker in self.workers:
            total += worker.weight(self.W, self.s) / self.heads
        return total

    def merge(self) -> None:
        self.W = self.merged()
        self.merges += 1
        for n, worker in enumerate(self.workers):
            if not self.keep:
                worker.A, worker.B = self.new_A(n, self.merges), torch.zeros_like(worker.B)
            worker.A0 = worker.A.clone() if self.keep else torch.zeros_like(worker.A)
            worker.B0 = worker.B.clone()
            worker.adam_A.prune(self.forget)
            worker.adam_B.prune(self.forget)
