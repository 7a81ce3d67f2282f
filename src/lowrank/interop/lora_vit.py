"""Files of LoRA-ViT (github.com/JamesQFreeman/LoRA-ViT, MeLo: arXiv 2311.08236), read by their format alone.

    w_a_000, w_b_000   A (rank, in) and B (out, rank) of q in the first block
    w_a_001, w_b_001   of v in the first block, and so on: two entries a block
    fc_768in_9out      the head's weight (9, 768)

A model's whole state dict is read too (``….blocks.0.attn.proj_q.w_a.weight``, or ``….attn.qkv.linear_a_q.weight`` of
timm's): it is all that its wrapper for segmentation can be kept as. That one's decoder, torchvision's DeepLab, is
another than ours: on a ``Segmenter`` the factors are taken where they fit the encoder, and the decoder stays its own.

The files do not hold the head's bias, which becomes zero, nor the scale. LoRA-ViT computes it as ``alpha // r``, which
is 1 for its usual r = alpha = 4 and 0 wherever r exceeds alpha: such an adapter never added anything (``scale=0`` here
leaves it out).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lowrank.adapters.layers import WHOLE
from lowrank.adapters.targets import linear_layers, select
from lowrank.interop.adapter_bank import AdapterInfo
from lowrank.models.segmenter import Segmenter
from lowrank.models.vision import read_weights
from lowrank.run.run import Call

WITHIN = re.compile(
    r"blocks\.(?P<block>\d+)\.attn\.(?:proj_(?P<q1>[qv])\.w_(?P<f1>[ab])|qkv\.linear_(?P<f2>[ab])_(?P<q2>[qv]))\.weight$"
)


def read_lora_vit(
    path: Path | str, model: nn.Module, *, scale: float = 1.0, classes: tuple[str, ...] = ()
) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """An adapter from a file of LoRA-ViT, for ``AdapterBank.add(name, *read_lora_vit(path, model))``.

    Args:
        path: the ``.safetensors`` file, or a state dict in torch's format.
        model: the plain base: timm's ViT, or another whose q and v the groups of the same names find; or a segmenter
            on it.
        scale: LoRA-ViT's ``alpha // r`` as it was in training.
        classes: the names of the outputs; numbers by default.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is not LoRA-ViT's, or for another model.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        found = _numbers(load_file(file) if file.suffix == ".safetensors" else read_weights(file))
    except SafetensorError as error:
        raise ValueError(f"{path} is no .safetensors file: {error}") from error
    if not scale >= 0:
        raise ValueError(f"scale={scale} must be at least 0")
    down, up = _numbered(found, "w_a_"), _numbered(found, "w_b_")
    places = _places(model)
    if not down or len(down) != len(up):
        raise ValueError(
            f"{path} is no file of LoRA-ViT: w_a_000, w_b_000, … are wanted, it has {', '.join(sorted(found)[:4])}"
        )
    if len(down) != len(places):
        raise ValueError(f"{path} has factors for {len(down)} matrices, and the model {len(places)} of q and v")
    tensors: dict[str, Tensor] = {}
    for (layer, part, out_features, in_features), A, B in zip(places, down, up, strict=True):
        if A.shape[1] != in_features or B.shape[0] != out_features or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"{path}: factors {tuple(A.shape)} and {tuple(B.shape)} do not fit {layer}, "
                f"{out_features} × {in_features}"
            )
        prefix = f"{layer}.adapters.{part}"
        tensors |= {f"{prefix}.A": A[None].float(), f"{prefix}.B": (B * (scale > 0))[None].float()}
        tensors[f"{prefix}.merges"] = torch.zeros((), dtype=torch.int64)
    segments = isinstance(model, Segmenter)
    tensors |= (head := {} if segments else _head(found, model, file))
    count = next((len(t) for t in head.values()), 0)
    rank = down[0].shape[0]
    info = AdapterInfo(
        method=Call(name="lora", args={"target_modules": ("q", "v"), "rank": rank, "alpha": (scale or 1.0) * rank}),
        model=Call(name="vit-segment" if segments else "vit", args={}),
        task="segmentation" if segments else "images",
        classes=classes or tuple(map(str, range(count))),
        origin=str(path),
    )
    return info, tensors


def _numbers(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by their numbers, those of a state dict renamed: two a block, of q and of v."""
    named = {}
    for name, tensor in found.items():
        if match := WITHIN.search(name):
            block, q_or_v, factor = match["block"], match["q1"] or match["q2"], match["f1"] or match["f2"]
            named[int(block), q_or_v, factor] = tensor
    places = sorted({(block, q_or_v) for block, q_or_v, _ in named})
    return dict(found) | {
        f"w_{factor}_{places.index((block, q_or_v)):03d}": t for (block, q_or_v, factor), t in named.items()
    }


def _numbered(found: dict[str, Tensor], prefix: str) -> list[Tensor]:
    names = sorted(name for name in found if re.fullmatch(re.escape(prefix) + r"\d+", name))
    return [found[name] for name in names]


def _places(model: nn.Module) -> list[tuple[str, str, int, int]]:
    """(layer, part, out, in) of q and v, block by block."""
    layers = linear_layers(model)
    places = []
    for of_q, of_v in zip(select(layers, "q"), select(layers, "v"), strict=True):
        for layer, part in (of_q, of_v):
            out_features = layer.out_features if part == WHOLE else layer.out_features // 3
            places.append((layer.name, part, out_features, layer.in_features))
    return places


def _head(found: dict[str, Tensor], model: nn.Module, file: Path) -> dict[str, Tensor]:
    """The head under the base's names; empty where the file has none."""
    names = [name for name in found if re.fullmatch(r"fc_\d+in_\d+out", name)]
    heads = [layer for layer in linear_layers(model) if "head" in layer.groups]
    if not names or not heads:
        return {}
    weight = found[names[0]].float()
    if weight.shape[1] != heads[0].in_features:
        raise ValueError(f"{file}: the head takes {weight.shape[1]} numbers, the base gives {heads[0].in_features}")
    made = {f"{heads[0].name}.weight": weight}
    if heads[0].module.bias is not None:
        made[f"{heads[0].name}.bias"] = torch.zeros(len(weight))
    return made
