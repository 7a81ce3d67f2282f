"""Layers that carry adapters, and how they take the place of the originals.

An :class:`AdaptedLinear` takes over the very ``weight`` and ``bias`` parameters of the layer that it replaces, under
the same names, so that a state dict keeps its keys (adapters only add ``<layer>.adapters.<part>.…``) and tied
parameters stay tied. It replaces ``nn.Linear`` and transformers' ``Conv1D`` (weight (in, out)); :class:`AdaptedPatches`
replaces a ViT's convolutional patch embedding, :class:`AdaptedEmbedding` the embedding whose table is tied to an
adapted output layer, and :class:`AdaptedQuantised` a layer of bitsandbytes, whose own product it calls.

Parts: a fused projection (GPT-2's ``c_attn``, timm's ``qkv``) holds several matrices in one. Adapters on parts join the
one fused product; parts without an adapter cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.adapter import Adapter, Additive
from lowrank.distributed.shards import is_sharded
from lowrank.infra.seeds import generator
from lowrank.linalg.quantised_linear import dense_weight, dequantised, is_quantised, keep_unpacked_
from lowrank.linalg.rounding import round_into_, wide

if TYPE_CHECKING:
    from lowrank.adapters.merge import Merge

WHOLE = "all"  # the part that is all of the matrix
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, a linear layer stored transposed; told by name, without the import."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def is_patch_embedding(module: nn.Module) -> bool:
    """Whether a convolution is a linear map of patches without overlap or gaps, as a ViT's first layer is."""
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
        return False
    plain = module.padding in ((0, 0), "valid") and module.dilation == (1, 1) and module.groups == 1
    return plain and module.stride == module.kernel_size and module.weight.is_contiguous()


def is_linear(module: nn.Module) -> bool:
    """Whether an adapted layer can replace this module.

    It must compute what ``nn.Linear`` or ``Conv1D`` does (a subclass with its own ``forward`` may not, but for those of
    bitsandbytes), or embed patches, and own its weight (a parametrised one is made anew at each call).
    """
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    owned = module._parameters.get("weight") is not None
    return owned and (plain or is_conv1d(module) or is_patch_embedding(module) or is_quantised(module))


def size_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of the weight."""
    if is_quantised(module):
        return module.out_features, module.in_features  # type: ignore[return-value]
    out_features, in_features = matrix_of(module).shape
    return out_features, in_features


def matrix_of(module: nn.Module) -> Tensor:
    """The weight as (out, in), a view of the parameter; of a quantised one a new tensor."""
    if is_quantised(module):
        return dense_weight(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Conv2d):
        return weight.view(weight.shape[0], -1)
    return weight.mT if is_conv1d(module) else weight


class AdaptedLayer(nn.Module):
    """What adapted linear layers and embeddings share: the original's parameters, and adapters by part of it."""

    def __init__(self, original: nn.Module, adapters: dict[str, Adapter], parts: dict[str, slice]):
        super().__init__()
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        if isinstance(original, (nn.Linear, nn.Conv2d)) and original.bias is None:
            self.register_parameter("bias", None)
        self.transposed = is_conv1d(original)
        for hooks in HOOKS:  # the very dicts, so that their handles go on working
            self.__dict__[hooks] = original.__dict__[hooks]
        self._is_full_backward_hook = original._is_full_backward_hook
        self.adapters = nn.ModuleDict(adapters)
        self.adapters.register_forward_pre_hook(_keep_off_the_fast_path)
        self.parts = {part: parts[part] for part in adapters}
        self._original = [original]  # in a list, so that it is no submodule; it answers for what is not here
        self.on_read: Callable[[], None] | None = None
        self.train(original.training)

    @property
    def matrix(self) -> Tensor:
        """The weight as (out, in), a view of the parameter."""
        return self._weight.mT if self.transposed else self._weight

    @property
    def _weight(self) -> Tensor:
        """The parameter, whether or not readers of ``weight`` are watched."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def pieces(self) -> Iterator[tuple[str, Adapter, Tensor]]:
        """(part, adapter, its rows of the matrix as a view)."""
        for part, adapter in self.adapters.items():
            yield part, adapter, self.matrix[self.parts[part]]  # type: ignore[misc]

    def original(self) -> nn.Module:
        """The layer that this one replaced, with the parameters as they are now."""
        module = self._original[0]
        for name in list(module._parameters):
            module._parameters[name] = self._parameters[name]
        return module.train(self.training)

    def __getattr__(self, name: str) -> Any:
        """Attributes that this layer does not have (``in_features``, ``nf``, …), from the original.

        Who reads ``weight`` past the layer does not see its adapters, and a merge would change what is computed there:
        ``on_read``, where it is set, is told of it when a gradient comes back to what was read. While a weight is
        sharded nobody computes with it, and FSDP takes what it reads for the parameter.
        """
        on_read = self.__dict__.get("on_read")
        if name == "weight" and on_read is not None and torch.is_grad_enabled() and not is_sharded(self._weight):
            read = self._weight.detach().requires_grad_()
            read.register_hook(lambda gradient: on_read())
            return read
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None or name.startswith("_"):
                raise
            return getattr(original[0], name)


def _keep_off_the_fast_path(module: nn.Module, args: object) -> None:
    """A hook that is never called, since an ``nn.ModuleDict`` is not; that it exists is enough.

    In evaluation ``nn.TransformerEncoderLayer`` reads the weights of its layers without calling them, and would miss
    their adapters, unless some module in it has a hook.
    """


class AdaptedLinear(AdaptedLayer):
    """A linear layer with adapters: y = x Wᵀ + bias, each adapter adding its change to its rows."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 1:
            return self.forward(x[None])[0]
        W, bias = self.matrix, self._parameters["bias"]
        adapters: Any = self._modules["adapters"]._modules  # type: ignore[union-attr]  # past two slow look-ups
        if isinstance(whole := adapters.get(WHOLE), Additive):
            return whole.linear(x, W, bias)
        if all(isinstance(adapter, Additive) for adapter in adapters.values()):
            y = F.linear(x, W, bias)
            for part, adapter in adapters.items():
                y = adapter.add_(y, x, self.parts[part].start)
            return y
        if WHOLE in adapters:
            y = adapters[WHOLE](x, W)
        else:
            y = torch.cat([self._rows(x, rows, part) for part, rows in self._covering(W.shape[0])], dim=-1)
        return y if bias is None else y + bias.to(y.dtype)

    def _covering(self, width: int) -> Iterator[tuple[str | None, slice]]:
        """All rows in order: those of each adapted part, and the stretches between them (part None)."""
        at = 0
        for part, rows in sorted(self.parts.items(), key=lambda item: item[1].start):
            if rows.start > at:
                yield None, slice(at, rows.start)
            yield part, rows
            at = rows.stop
        if at < width:
            yield None, slice(at, width)

    def _rows(self, x: Tensor, rows: slice, part: str | None) -> Tensor:
        W = self.matrix[rows]
        return F.linear(x, W) if part is None else self.adapters[part](x, W)

    def extra_repr(self) -> str:
        return f"{self.matrix.shape[1]} → {self.matrix.shape[0]}, bias={self.bias is not None}"


class AdaptedPatches(AdaptedLinear):
    """A patch embedding (see :func:`is_patch_embedding`) as the linear layer that it is, on patches as rows.

    x (batch, channels, h, w) → (batch, out, h // p, w // q); W (out, channels·p·q) is a view of the convolution's
    weight.
    """

    @property
    def matrix(self) -> Tensor:
        return self._weight.view(self._weight.shape[0], -1)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.forward(x[None])[0]
        p, q = self._weight.shape[2:]
        rows, columns = x.shape[2] // p, x.shape[3] // q  # a border that is no whole patch is not seen, as in Conv2d
        patches = x[..., : rows * p, : columns * q].unflatten(3, (columns, q)).unflatten(2, (rows, p))
        return super().forward(patches.permute(0, 2, 4, 1, 3, 5).flatten(3)).permute(0, 3, 1, 2)


class AdaptedQuantised(AdaptedLinear):
    """A layer of bitsandbytes (see ``linalg.quantised_linear``) with adapters, which join its own product.

    The weight whole exists for the moment where an adapter asks for it (DoRA's norms), and is not kept for backward.
    """

    def __init__(self, original: nn.Module, adapters: dict[str, Adapter], parts: dict[str, slice]):
        super().__init__(original, adapters, parts)
        keep_unpacked_(original)

    @property
    def matrix(self) -> Tensor:
        return dense_weight(self._base())

    def _base(self) -> nn.Module:
        """The layer of bitsandbytes as it is to be called: without its bias, which it would cast in place."""
        base = self._original[0]
        base._parameters.update(weight=self._parameters["weight"], bias=None)
        base.training = self.training
        return base

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 1:
            return self.forward(x[None])[0]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = self._base().forward(x)
        y = y.clone() if y._is_view() else y  # which cannot be changed in place
        for part, rows in self.parts.items():
            adapter: Any = self.adapters[part]
            if isinstance(adapter, Additive):
                y = adapter.add_(y, x, rows.start)
                continue
            changed = adapter.onto(y[..., rows].contiguous(), x, self.matrix[rows])
            y = torch.cat([y[..., : rows.start], changed, y[..., rows.stop :]], dim=-1)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)


def adapted(module: nn.Module, adapters: dict[str, Adapter], parts: dict[str, slice]) -> AdaptedLayer:
    """The layer that takes the place of ``module``."""
    if isinstance(module, nn.Embedding):
        return AdaptedEmbedding(module, adapters, parts)
    if is_quantised(module):
        return AdaptedQuantised(module, adapters, parts)
    kind = AdaptedPatches if isinstance(module, nn.Conv2d) else AdaptedLinear
    return kind(module, adapters, parts)


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of bitsandbytes in ``model``, by name, those that carry adapters included."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedQuantised):
            found[name] = module.original()
        elif is_quantised(module):
            found[name] = module
    return found


def dequantise_(model: nn.Module) -> nn.Module:
    """``model`` with plain layers in the place of those of bitsandbytes, in the dtype of its other weights; adapters
    stay. In place, and returned."""
    layers = quantised_layers(model)
    plain = (p for name, p in model.named_parameters() if p.is_floating_point() and ".adapters." not in name)
    dtype = next((p.dtype for p in plain), torch.float32)
    for name, base in layers.items():
        layer, made = model.get_submodule(name), dequantised(base, dtype)
        if isinstance(layer, AdaptedLayer):
            made = adapted(made, dict(layer.adapters.items()), layer.parts)  # type: ignore[arg-type]
        replace(model, name, made)
    config: Any = getattr(model, "config", None)
    if layers and hasattr(config, "quantization_config"):
        del config.quantization_config
    return model


class AdaptedEmbedding(AdaptedLayer):
    """An embedding tied to an adapted output layer: it looks up rows of the adapted matrix, with the same adapter."""

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.adapters[WHOLE].rows(ids, self._weight)  # type: ignore[operator]
        if self.padding_idx is None:
            return rows
        return torch.where((ids == self.padding_idx)[..., None], rows.detach(), rows)  # as in nn.Embedding


def check_embedding(module: nn.Embedding, name: str) -> None:
    """Raise ValueError for options of an embedding that its adapted form would not honour."""
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise ValueError(
            f"{name} is tied to an adapted layer and uses max_norm, scale_grad_by_freq or sparse, which an adapted "
            "embedding cannot: make it without them, or use ties='leave' or ties='untie'"
        )


@torch.no_grad()
def merge_layer_(layer: AdaptedLayer, skip: set[int], merge: Merge | None = None) -> None:
    """W ← merged(W) for every adapter of ``layer`` not in ``skip`` (tied layers share one), which then settles. With
    ``merge`` W goes where its outer optimizer says.

    Extends ``skip``, a set of ids. The arithmetic is float32 or wider; a bfloat16 weight is rounded stochastically.
    """
    for part, adapter, W in layer.pieces():
        if id(adapter) in skip:
            continue
        skip.add(id(adapter))
        before = W.to(wide(W.dtype))
        merged = adapter.merged(before)
        write_merged_(W, merged if merge is None else merge.step(before, merged, adapter), adapter, part)
        with adapter.counting_a_merge():
            adapter.settle_()


@torch.no_grad()
def write_merged_(W: Tensor, merged: Tensor, adapter: Adapter, part: str) -> None:
    """W ← ``merged``, float32 or wider and of the same shape, before ``adapter`` settles.

    Raises:
        FloatingPointError: ``merged`` is not finite.
    """
    if not torch.isfinite(merged).all():
        raise FloatingPointError(
            f"the adapter on part {part!r} of a layer has grown to values that are not finite; nothing was merged "
            "into it. Resume from the last checkpoint with a smaller learning rate"
        )
    round_into_(W, merged, generator(W.device, "merge", adapter.seed, adapter.name, int(adapter.merges)))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """(name, layer) of every adapted layer of ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield name, module


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
