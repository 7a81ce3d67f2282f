"""A new adapter in one file: VeRA (Kopiczko et al., arXiv 2310.11454).

One pair of random matrices, drawn once and never trained, serves all layers of a shape; a layer learns two vectors.

    W' = W + diag(b) B diag(d) A      A (rank, in), B (out, rank) frozen; d (rank,) and b (out,) trained

A and B are Kaiming-uniform, d starts at ``d_initial`` and b at zero, so that a fresh one changes nothing.

    lowrank train gpt-mini --method examples/new_adapter.py:method --method.rank 64

``tests/contract/test_adapters.py`` holds it to what every adapter promises, by one line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from lowrank.adapters import Additive, Site


@dataclass(frozen=True)
class VeRA:
    """Makes a :class:`VeRAAdapter`; ``rank`` may be above the matrix, as the paper's 256 to 1024 often are."""

    rank: int = 256
    d_initial: float = 0.1

    def __call__(self, linear: Site | nn.Module) -> VeRAAdapter:
        return VeRAAdapter(self, Site.of(linear))


class VeRAAdapter(Additive):
    """Parameters: ``d`` (rank,) and ``b`` (out,)."""

    A: Tensor
    B: Tensor

    def __init__(self, config: VeRA, site: Site):
        super().__init__(site)
        self.config = config
        (out, inside), like = self.shape, site.weight.new_empty(0)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.d = nn.Parameter(torch.full((config.rank,), config.d_initial, dtype=dtype, device=like.device))
        self.b = nn.Parameter(torch.zeros(out, dtype=dtype, device=like.device))
        noise = torch.Generator().manual_seed(site.seed)  # the same for all layers, and again after a resume
        for name, rows, columns in (("A", config.rank, inside), ("B", out, config.rank)):
            drawn = torch.empty(rows, columns).uniform_(-1, 1, generator=noise) * (3 / columns) ** 0.5
            self.register_buffer(name, drawn.to(like.device, dtype), persistent=False)

    def add_(self, y: Tensor, x: Tensor, start: int = 0) -> Tensor:
        A, B, d, b = (t.to(y.dtype) for t in (self.A, self.B, self.d, self.b))
        y[..., start : start + len(b)] += F.linear(F.linear(x.to(y.dtype), A) * d, B) * b
        return y

    def merged(self, W: Tensor) -> Tensor:
        return (W.to(self.b.dtype) + self.b[:, None] * (self.B * self.d) @ self.A).to(W.dtype)

    @torch.no_grad()
    def settle_(self) -> None:
        self.merges += 1
        self.b.zero_()


def method(
    target_modules: str | tuple[str, ...] = "attention", *, rank: int = 256, rest: lowrank.methods.method.Rest = "auto"
) -> lowrank.Method:
    """VeRA (Kopiczko et al., arXiv 2310.11454) on the targets; what ``rest`` says becomes of everything else."""
    return lowrank.Method(name="vera", adapt=(lowrank.Adapt(target_modules, VeRA(rank=rank)),), rest=rest)
