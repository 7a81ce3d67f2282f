"""``vit-3d``: a ViT of images on volumes, from any 2-D weights, in two ways.

    cubes    patches are cubes of p³ voxels: the 2-D patch embedding w is repeated along the slices and divided by p, so
             that a volume whose slices are all alike gives what its slice gave (I3D's inflation, arXiv 1705.07750);
             positions are interpolated over three axes, and an embedding of the depth, which starts at 0, tells apart
             what lies one above the other
    slices   each slice goes through the 2-D ViT; of its features, with an embedding of their place, a learned query of
             each head takes a mean weighted by softmax(q·x/√(width/heads)), which starts as the plain mean

What is not the 2-D model's (depth, places, queries, head) counts as initialised at random.

Shapes: x (batch, 3, slices, size, size) → (batch, classes).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.data.images.source import ImageData
from lowrank.infra.checks import check_choice
from lowrank.infra.loaded_parameters import mark_all_but_
from lowrank.infra.registry import register
from lowrank.models.vision import check_outputs, fill_, read_weights, vit, vit_mini, weights_file


@register("model", "vit-3d", task="images")
def vit_3d(
    data: ImageData,
    *,
    by: Literal["cubes", "slices"] = "cubes",
    name: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    slices: int | None = None,
    patch_size: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """A ViT on volumes, its blocks those of a ViT on images, 0.5 M parameters by default.

    Args:
        by: cubes, or slices.
        name: timm's, of the 2-D model; none: a small one of the sizes below.
        weights: of the 2-D model, as ``vit`` takes them; or what ``lowrank export`` made of a run of this very shape.
        image_size: of a slice; by default the named model's own, or 28.
        slices: to which volumes are resized; by default the image size.
        patch_size, width, depth, heads: by default the name's, or 7, 96, 4, 4.
        dropout: before the head of a named model; in attention and MLPs of a small one.
    """
    check_choice("model.by", by, ("cubes", "slices"))
    check_outputs(data, volumes=True)
    given = {"image_size": image_size, "patch_size": patch_size, "width": width, "depth": depth, "heads": heads}
    shape: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    classes = ImageData.without_images(data.to_json())  # a model of images does not take volumes
    own = _exported(weights, by)
    flat_weights = weights if own is None else None
    flat: Any = (
        vit_mini(classes, weights=flat_weights, dropout=dropout, **({"patch_size": 7} | shape))
        if name is None
        else vit(classes, name=name, weights=flat_weights, dropout=dropout, **shape)
    )
    spec = flat.image_spec
    count = spec.size if slices is None else slices
    if count < 2:
        raise ValueError(f"model.slices={count}: a volume has at least two; vit and vit-mini take images")
    model: Any = inflated_(flat, count) if by == "cubes" else SliceViT(flat, count, len(data.classes))
    model.image_spec = replace(spec, depth=count)
    if own is not None:
        file, state = own
        fill_(model, state, [name for name in model.state_dict() if name.startswith("head.")], file)
        mark_all_but_(model, *model.drawn)
    return model


def _exported(weights: str | None, by: str) -> tuple[Path, dict[str, Tensor]] | None:
    """(file, tensors) where ``weights`` are those of a model of volumes by the same way; None: of images, or none."""
    if weights in (None, "hub") or (file := weights_file(str(weights))).suffix == ".npz":
        return None
    state = read_weights(file)
    return (file, state) if ("patch_embed.depth" if by == "cubes" else "places") in state else None


class CubeEmbed(nn.Module):
    """(batch, 3, d, h, w) → (batch, cubes, width): the patch embedding of a ViT, inflated."""

    def __init__(self, flat: Any, slices: int):
        super().__init__()
        old, side = flat.proj, flat.patch_size[0]
        self.proj = nn.Conv3d(old.in_channels, old.out_channels, side, side, bias=old.bias is not None)
        self.proj.weight = _instead_of(old.weight, old.weight.detach()[:, :, None].repeat(1, 1, side, 1, 1) / side)
        self.proj.bias = old.bias
        self.norm = flat.norm
        self.grid_size = (slices // side, *flat.grid_size)
        self.num_patches = math.prod(self.grid_size)
        self.depth = nn.Parameter(torch.zeros(1, old.out_channels, self.grid_size[0], 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x) + self.depth
        return self.norm(y.flatten(2).transpose(1, 2))


def inflated_(flat: Any, slices: int) -> nn.Module:
    """A timm ViT on images as one on volumes of so many slices.

    Raises:
        ValueError: its positions are no table that could be interpolated; slices that are not whole cubes.
    """
    from timm.models.vision_transformer import VisionTransformer

    plain = type(flat) is VisionTransformer
    if not plain or flat.pos_embed is None or flat.dynamic_img_size:
        raise ValueError(
            f"model.by=cubes takes timm's plain ViTs, with a table of positions; {type(flat).__name__} goes by slices: "
            "--model.by slices"
        )
    side = flat.patch_embed.patch_size[0]
    if slices % side:
        below = max(side, slices // side * side)
        raise ValueError(f"model.slices={slices} is not a multiple of the cube, {side}; {below} and {below + side} are")
    cubes = CubeEmbed(flat.patch_embed, slices)
    before = 0 if flat.no_embed_class else flat.num_prefix_tokens
    old = flat.pos_embed
    table = old.detach()[:, before:].unflatten(1, (1, *flat.patch_embed.grid_size)).permute(0, 4, 1, 2, 3)
    wide = F.interpolate(table, size=cubes.grid_size, mode="trilinear").flatten(2).transpose(1, 2)
    flat.patch_embed, flat.pos_embed = cubes, _instead_of(old, torch.cat([old.detach()[:, :before], wide], dim=1))
    flat.drawn = ("head", "patch_embed.depth")
    vars(flat).pop("made_by_timm_as", None)  # timm has no such model
    return flat


class SliceViT(nn.Module):
    """A timm ViT on each slice, and attention over the slices."""

    drawn: Any = ("head", "places", "query")

    def __init__(self, flat: Any, slices: int, classes: int):
        super().__init__()
        flat.reset_classifier(0)
        self.encoder = flat
        self.embed_dim = width = flat.num_features
        heads = math.gcd(width, 8)
        self.places = nn.Parameter(torch.zeros(1, slices, width))
        self.query = nn.Parameter(torch.zeros(heads, width // heads))
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, count = x.shape[0], x.shape[2]
        features = self.encoder(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, count)) + self.places
        parts = features.unflatten(2, self.query.shape)  # (batch, slices, heads, width / heads)
        weights = ((parts * self.query).sum(3, keepdim=True) * self.query.shape[1] ** -0.5).softmax(dim=1)
        return self.head((weights * parts).sum(1).flatten(1))


def _instead_of(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    """A parameter of other numbers that counts as loaded where the old one did."""
    made = nn.Parameter(new)
    if hasattr(old, "_lowrank_loaded"):
        made._lowrank_loaded = old._lowrank_loaded  # type: ignore[attr-defined]
    return made
