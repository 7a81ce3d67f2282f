"""Vision transformers that say of every pixel what it shows: an encoder of timm's, and a small decoder on its tokens.

    images (batch, 3, s, s) → tokens of the chosen blocks (batch, (s/p)², width each)
        → 3 × 3 tokens → hidden → 3 × 3 tokens → classes · p² → pixels: logits (batch, classes, s, s)

The last step is a sub-pixel convolution (Shi et al., arXiv 1609.05158): each token answers for its own p × p pixels.
Both convolutions are written as a linear layer on unfolded neighbourhoods, which they are, so that every method, plan
and ledger sees the matrices; the decoder is the model's ``head`` and always trained anew.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.data.images.source import ImageData
from lowrank.infra.registry import register
from lowrank.models.vision import vit, vit_mini


class Decoder(nn.Module):
    """Tokens on a grid (batch, channels, g, g) → logits (batch, classes, g·patch, g·patch)."""

    def __init__(self, channels: int, hidden: int, classes: int, patch: int):
        super().__init__()
        self.patch = patch
        self.neighbours = nn.Linear(9 * channels, hidden)
        self.pixels = nn.Linear(9 * hidden, classes * patch * patch)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[-2:]
        x = F.gelu(self.neighbours(_around(x)))
        x = self.pixels(_around(x.transpose(1, 2).unflatten(2, grid)))
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, grid), self.patch)


def _around(x: Tensor) -> Tensor:
    """(batch, channels, g, g) → (batch, g², 9·channels): each place with its eight neighbours, zeros outside."""
    return F.unfold(x, 3, padding=1).transpose(1, 2)


class Segmenter(nn.Module):
    """A ViT of timm's with a decoder on the tokens of some of its blocks, side by side."""

    def __init__(self, encoder: Any, classes: int, depths: int, hidden: int):
        super().__init__()
        blocks = len(encoder.blocks)
        if not 1 <= depths <= blocks:
            raise ValueError(f"model.depths={depths}: the encoder has {blocks} blocks, any of which can be read")
        if hidden < 1:
            raise ValueError(f"model.hidden={hidden} must be at least 1")
        encoder.reset_classifier(0)
        self.encoder = encoder
        self.depths = depths
        self.head = Decoder(encoder.embed_dim * depths, hidden, classes, encoder.patch_embed.patch_size[0])
        self.image_spec = encoder.image_spec

    def get_classifier(self) -> nn.Module:
        """The decoder is what is made anew for each task."""
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, s, s) → logits (batch, classes, s, s)."""
        blocks = len(self.encoder.blocks)  # a plan takes some away
        wanted = [max(0, (i + 1) * blocks // self.depths - 1) for i in range(self.depths)]
        read = sorted(set(wanted))
        tokens = self.encoder.forward_intermediates(
            images, indices=read, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        found = dict(zip(read, tokens, strict=True))
        logits: Tensor = self.head(torch.cat([found[i] for i in wanted], dim=1))
        return logits


@register("model", "vit-mini-segment", task="segmentation")
def vit_mini_segment(
    data: ImageData,
    *,
    image_size: int = 96,
    patch_size: int = 6,
    width: int = 96,
    depth: int = 4,
    heads: int = 4,
    dropout: float = 0.0,
    depths: int = 2,
    hidden: int = 96,
    weights: str | None = None,
) -> nn.Module:
    """The small ViT of ``vit-mini`` with a decoder.

    Args:
        image_size: images of any size are resized to it.
        patch_size: pixels of a patch's side.
        width, depth, heads: of the transformer.
        dropout: in attention, MLPs and on the positions.
        depths: the decoder reads the tokens of so many blocks, evenly spaced up to the last.
        hidden: channels of the decoder.
        weights: a file or folder to start the encoder from; of ``lowrank export``, whatever the task was.
    """
    shape = {"image_size": image_size, "patch_size": patch_size, "width": width, "depth": depth, "heads": heads}
    encoder = vit_mini(data, **shape, dropout=dropout, weights=weights)
    return Segmenter(encoder, len(data.classes), depths, hidden)


@register("model", "vit-segment", task="segmentation")
def vit_segment(
    data: ImageData,
    *,
    name: str = "vit_base_patch16_224",
    weights: str | None = None,
    image_size: int | None = None,
    drop_path: float = 0.0,
    depths: int = 4,
    hidden: int = 256,
) -> nn.Module:
    """Any plain ViT of timm by its name, with a decoder.

    Args:
        name: timm's.
        weights: ``hub`` downloads the pre-trained ones; otherwise a file or a folder with one; none: at random.
        image_size: by default the model's own; another one resizes the position embeddings.
        drop_path: the probability of skipping a block's branch (stochastic depth).
        depths: the decoder reads the tokens of so many blocks, evenly spaced up to the last.
        hidden: channels of the decoder.
    """
    encoder: Any = vit(data, name=name, weights=weights, image_size=image_size, drop_path=drop_path)
    if not hasattr(encoder, "forward_intermediates") or not hasattr(encoder, "blocks"):
        raise ValueError(
            f"{name} has no blocks whose tokens could be read: take a plain ViT, vit_small_patch16_224 say"
        )
    return Segmenter(encoder, len(data.classes), depths, hidden)
