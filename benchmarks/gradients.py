"""Gradients of a real run, for benchmarks of what depends on their spectrum: white noise would mislead.

A transformer of four GPT-2 layers (width 768, weights (in, out) as in GPT-2) is trained on words for some dozen steps;
the gradients of its sixteen matrices are kept at chosen steps.
"""

from __future__ import annotations

import collections
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, CONTEXT, BATCH, WORDS = 768, 12, 4, 128, 16, 4096
SHAPES = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.02) for shape in SHAPES])

    def forward(self, x: Tensor) -> Tensor:
        batch, context, _ = x.shape
        qkv = (self.before(x) @ self.weights[0]).view(batch, context, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + y @ self.weights[1]
        return x + F.gelu(self.between(x) @ self.weights[2]) @ self.weights[3]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.last = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.blocks(self.words(tokens) + self.places.weight[: tokens.shape[1]])
        return self.last(hidden) @ self.words.weight.T


def word_ids(text: str) -> Tensor:
    """The text as numbers of its most frequent words; 0 is every other."""
    words = re.findall(r"\w+|[^\w\s]", text)
    numbers = {word: i + 1 for i, (word, _) in enumerate(collections.Counter(words).most_common(WORDS - 1))}
    return torch.tensor([numbers.get(word, 0) for word in words])


def gradients(text: str, at: tuple[int, ...]) -> dict[int, list[Tensor]]:
    """The gradients of the sixteen matrices at the steps ``at`` of a run with AdamW at 6e-4, after 20 of warm-up."""
    torch.manual_seed(0)
    ids, model = word_ids(text), Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)
    matrices = [w for block in model.blocks for w in block.weights]  # type: ignore[union-attr]
    kept: dict[int, list[Tensor]] = {}
    for step in range(max(at) + 1):
        optimizer.param_groups[0]["lr"] = 6e-4 * min(1.0, (step + 1) / 20)
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,))
        rows = torch.stack([ids[i : i + CONTEXT + 1] for i in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if step in at:
            kept[step] = [w.grad.clone() for w in matrices if w.grad is not None]
        optimizer.step()
    return kept
