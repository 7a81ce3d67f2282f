"""Vision transformers, through timm and transformers: ``vit-mini``, any timm ViT by name, a folder of transformers'.

Functions here are what a run's model can be; their keyword arguments are the run's ``--model.…`` options. The first
argument is the data, which gives the number of outputs. A model says how it wants its images in ``image_spec``. The
head is always made anew for the task and counts as initialised at random; position embeddings are resized to the image.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank.data.images.set import ImageSpec
from lowrank.data.images.source import ImageData
from lowrank.infra.convert import nearest
from lowrank.infra.hub import ask_hub
from lowrank.infra.loaded_parameters import mark_all_but_, mark_loaded_
from lowrank.infra.registry import register
from lowrank.infra.text import some
from lowrank.models.new_head import with_new_head


@register("model", "vit-mini", task="images")
def vit_mini(
    data: ImageData,
    *,
    image_size: int = 28,
    patch_size: int = 4,
    width: int = 96,
    depth: int = 4,
    heads: int = 4,
    mlp_ratio: float = 4.0,
    dropout: float = 0.0,
    weights: str | None = None,
) -> nn.Module:
    """A small ViT (Dosovitskiy et al., arXiv 2010.11929) for images of 28 pixels, 0.46 M parameters by default.

    Args:
        image_size: images of any size are resized to it.
        patch_size: pixels of a patch's side.
        width, depth, heads, mlp_ratio: of the transformer.
        dropout: in attention, MLPs and on the positions.
        weights: a file, or a folder with one, to start from (``lowrank export RUN OUT`` writes such a folder); the head
            is not taken from it.
    """
    _check_shape(image_size, patch_size, width, heads)
    from timm.models.vision_transformer import VisionTransformer

    model: Any = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        num_classes=check_outputs(data),
        pos_drop_rate=dropout,
        proj_drop_rate=dropout,
        attn_drop_rate=dropout,
    )
    if weights is not None:
        load_timm_(model, weights)
    shape = {"img_size": image_size, "patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": heads}
    model.made_by_timm_as = {"architecture": "vit_tiny_patch16_224", "model_args": {**shape, "mlp_ratio": mlp_ratio}}
    return _wanting(model, ImageSpec(size=image_size))


@register("model", "vit", task="images")
def vit(
    data: ImageData,
    *,
    name: str = "vit_base_patch16_224",
    weights: str | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> nn.Module:
    """Any ViT of timm by its name, with random weights, the hub's, or those of a local file.

    Args:
        name: timm's, such as ``vit_base_patch16_224`` or ``vit_small_patch16_224.augreg_in21k``.
        weights: ``hub`` downloads the pre-trained ones; otherwise a file (``.safetensors``, ``.pth``, Google's
            ``.npz``) or a folder with one; none: at random.
        image_size: by default the model's own; another one resizes the position embeddings.
        patch_size, width, depth, heads: by default the name's.
        dropout: before the head.
        drop_path: the probability of skipping a block's branch (stochastic depth).
    """
    import timm

    base = name.partition(".")[0]
    if base not in timm.list_models():
        raise ValueError(f"timm has no model {name!r}{nearest(base, timm.list_models('*vit*'))}")
    shape = {"img_size": image_size, "patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": heads}
    given: dict[str, Any] = {option: value for option, value in shape.items() if value is not None}
    if weights == "hub":
        ask_hub()
    try:
        model: Any = timm.create_model(
            name,
            pretrained=weights == "hub",
            num_classes=check_outputs(data),
            drop_rate=dropout,
            drop_path_rate=drop_path,
            **given,
        )
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{name} cannot be made with {given}: {error}") from error
    except (OSError, RuntimeError) as error:
        raise _not_made(name, weights, error) from error
    config = model.pretrained_cfg
    patches = getattr(model, "patch_embed", None)
    own = image_size or _side(getattr(patches, "img_size", None) or config["input_size"][-1])
    _check_patches(own, _side(getattr(patches, "patch_size", 1)))
    mode = "bicubic" if config.get("interpolation") == "bicubic" else "bilinear"
    mean, std = (tuple(map(float, config.get(key, (0.5,) * 3))) for key in ("mean", "std"))
    if weights == "hub":
        mark_all_but_(model, *_timm_heads(model))
    elif weights is not None:
        load_timm_(model, weights)
    model.made_by_timm_as = {"architecture": base, "model_args": given}
    return _wanting(model, ImageSpec(size=own, mean=mean, std=std, interpolation=mode))  # type: ignore[arg-type]


@register("model", "hf-vit", task="images")
def hf_vit(data: ImageData, *, path: str = "", image_size: int | None = None) -> nn.Module:
    """transformers' ViT (or another of its image classifiers) from a local folder, or by its name on the hub.

    Args:
        path: the folder with ``config.json``, or the name.
        image_size: by default the model's own; another one resizes a ViT's position embeddings.
    """
    model, new = with_new_head("AutoModelForImageClassification", path, check_outputs(data), torch.float32)
    head = [name for name, _ in model.named_parameters() if name.startswith(("classifier", "score"))]
    if new - set(head):
        raise ValueError(f"the weights of {path} do not fit the model: {some(sorted(new - set(head)))}")
    _fresh_(model, head)
    mark_all_but_(model, *head)
    if image_size is not None and image_size != model.config.image_size:
        _resize_positions_(model, image_size)
    return _wanting(model, _spec_of_folder(Path(path).expanduser(), _side(model.config.image_size)))


def logits_of(model: Callable[..., Any], images: Tensor) -> Tensor:
    """(batch, 3, h, w) → (batch, classes) float32, whatever the model wraps them in."""
    if isinstance(model, nn.Module) and (narrow := next(model.parameters()).dtype) in (torch.bfloat16, torch.float16):
        images = images.to(narrow)
    out = model(images)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits.float()


def timm_config(model: Any, classes: Sequence[str]) -> dict[str, Any]:
    """What ``timm.create_model("local-dir:FOLDER")`` must find in ``config.json`` to make a model of ours."""
    spec: ImageSpec = model.image_spec
    heads = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return {
        **model.made_by_timm_as,
        "num_classes": len(classes),
        "num_features": model.num_features,
        "pretrained_cfg": {
            "num_classes": len(classes),
            "input_size": [3, spec.size, spec.size],
            "fixed_input_size": True,
            "interpolation": spec.interpolation,
            "crop_pct": 1.0,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "first_conv": (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or "patch_embed.proj",
            "classifier": heads,
            "label_names": list(classes),
        },
    }


# --- weights ---------------------------------------------------------------------------------------------------------


def load_timm_(model: nn.Module, source: str) -> None:
    """Start a timm model from a local file, all but the head, and mark what was loaded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights do not fit; the keys are named.
    """
    file = weights_file(source)
    heads = _timm_heads(model)
    if file.suffix == ".npz":
        model.load_pretrained(str(file))  # type: ignore[operator]
        _fresh_(model, heads)
        mark_all_but_(model, *heads)
        return
    state = read_weights(file)
    if "patch_embed.depth" in state:
        raise ValueError(f"the weights of {file} are of vit-3d by cubes, and no model of images: give --model vit-3d")
    within = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    fill_(model, _converted(within or state, model), heads, file)  # of ours with a decoder, or over slices: its ViT
    mark_all_but_(model, *heads)


def fill_(model: nn.Module, state: Mapping[str, Tensor], heads: Sequence[str], file: Path) -> None:
    """Load every tensor of ``model`` but its ``heads`` from the ``state`` of a file.

    Raises:
        ValueError: they do not fit; the keys are named.
    """
    ours = {name: tensor for name, tensor in model.state_dict().items() if name not in heads}
    state = {name: tensor for name, tensor in state.items() if name not in heads and not name.startswith("head.")}
    wrong = {
        "it lacks": [n for n in ours if n not in state],
        "the model has no": [n for n in state if n not in ours],
        "shapes differ:": [
            f"{n} {tuple(state[n].shape)} where {tuple(ours[n].shape)} is wanted"
            for n in ours
            if n in state and state[n].shape != ours[n].shape
        ],
    }
    if any(wrong.values()):
        told = "; ".join(f"{what} {some(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"the weights of {file} do not fit the model: {told}")
    model.load_state_dict(state, strict=False)


def read_weights(file: Path) -> dict[str, Tensor]:
    """A state dict from ``.safetensors`` or torch's own format (tensors only, never code)."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} holds no weights that can be read safely: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    return dict(found)


def weights_file(source: str) -> Path:
    path = Path(source).expanduser()
    for file in (path, path / "model.safetensors", path / "pytorch_model.bin"):
        if file.is_file():
            return file
    if (path / "run.json").is_file():
        raise ValueError(f"{source} is a run: lowrank export {source} OUT writes its merged weights, then give OUT")
    raise FileNotFoundError(
        f"model.weights={source!r} is no file, and no folder with model.safetensors; give one, hub for timm's own "
        "weights, or none"
    )


def _converted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The keys as timm has them now, positions and patches resized to the model's."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return state if convert is None else dict(convert(state, model))


def _timm_heads(model: nn.Module) -> list[str]:
    """Names of the parameters of the output layers."""
    told = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    layers = tuple(f"{layer}." for layer in ([told] if isinstance(told, str) else told))
    return [n for n, _ in model.named_parameters() if n.startswith(layers)]


@torch.no_grad()
def _fresh_(model: nn.Module, heads: list[str]) -> None:
    """Draw the head anew, also where one of the right size was loaded: its classes were others."""
    parameters = dict(model.named_parameters())
    for name in heads:
        p = parameters[name]
        p.zero_() if p.dim() == 1 else nn.init.trunc_normal_(p, std=0.02)
        p._is_hf_initialized = False  # type: ignore[attr-defined]


def _resize_positions_(model: Any, image_size: int) -> None:
    """Give a transformers ViT another image size: positions are interpolated, the patches stay."""
    from timm.layers import resample_abs_pos_embed

    embeddings = getattr(getattr(model, "vit", None), "embeddings", None)
    if embeddings is None:
        raise ValueError(f"{type(model).__name__} cannot take another image size; leave model.image_size out")
    patch = _side(model.config.patch_size)
    _check_patches(image_size, patch)
    old: Tensor = embeddings.position_embeddings
    new = image_size // patch
    embeddings.position_embeddings = nn.Parameter(resample_abs_pos_embed(old.detach(), [new, new]))
    mark_loaded_(model, ["vit.embeddings.position_embeddings"])
    for holder in (embeddings, embeddings.patch_embeddings):
        if hasattr(holder, "image_size"):
            holder.image_size = (image_size, image_size)
    embeddings.patch_embeddings.num_patches = new * new
    model.config.image_size = image_size


def _spec_of_folder(folder: Path, size: int) -> ImageSpec:
    """Mean and deviation as the folder's processor says, a half each where it does not."""
    file = folder / "preprocessor_config.json"
    told = json.loads(file.read_text()) if file.is_file() else {}
    mean, std = (tuple(map(float, told.get(key, (0.5,) * 3))) for key in ("image_mean", "image_std"))
    mode: Literal["bilinear", "bicubic"] = "bicubic" if told.get("resample") == 3 else "bilinear"
    return ImageSpec(size=size, mean=mean, std=std, interpolation=mode)  # type: ignore[arg-type]


# --- checks ----------------------------------------------------------------------------------------------------------


def check_outputs(data: Any, *, volumes: bool = False) -> int:
    """How many classes the model is to tell apart.

    Raises:
        ValueError: the data is text, or volumes where the model takes images, or the reverse.
    """
    if not hasattr(data, "classes"):
        raise ValueError(f"the model looks at images, and the data is {type(data).__name__}; see lowrank recipes")
    if not data.unread and data.set.volumes != volumes:
        what, other = ("images", "vit or vit-mini") if volumes else ("volumes", "vit-3d")
        raise ValueError(f"{data.set.name} holds {what}, which --model {other} takes")
    return len(data.classes)


def _check_shape(image_size: int, patch_size: int, width: int, heads: int) -> None:
    if patch_size < 1 or width < 1 or heads < 1:
        raise ValueError(
            f"model.patch_size={patch_size}, model.width={width} and model.heads={heads} must be at least 1"
        )
    if width % heads:
        raise ValueError(f"model.width={width} must be a multiple of model.heads={heads}")
    _check_patches(image_size, patch_size)


def _check_patches(image_size: int, patch: int) -> None:
    """An image must be whole patches: what is over at its border would silently not be seen."""
    if image_size < patch or image_size % patch:
        below = max(patch, image_size // patch * patch)
        raise ValueError(
            f"model.image_size={image_size} is not a multiple of the patch, {patch}; {below} and {below + patch} are"
        )


def _side(size: Any) -> int:
    return int(size[0]) if isinstance(size, (tuple, list)) else int(size)


def _not_made(name: str, weights: str | None, error: Exception) -> Exception:
    if weights != "hub":
        return ValueError(f"{name} cannot be made: {error}")
    return OSError(
        f"the weights of {name} could not be had from the hub ({type(error).__name__}: {error}); give a local "
        "file with --model.weights FILE, or none to start at random"
    )


def _wanting(model: Any, spec: ImageSpec) -> nn.Module:
    """The model, which says how it wants its images."""
    model.image_spec = spec
    module: nn.Module = model
    return module
