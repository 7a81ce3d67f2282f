"""Linear layers whose weight bitsandbytes has quantised: how they are told, what they hold, how they are made.

    nf4    4 bits a weight, the largest magnitude of every 64 in 8 bits, and of every 256 of those in 32: 4.127 bits
           (QLoRA, arXiv 2305.14314: normal floats, double quantisation)
    int8   8 bits a weight and one scale a row (LLM.int8(), arXiv 2208.07339); but for training on a CPU the inputs of a
           product are rounded to 8 bits as well

They are told by their names: bitsandbytes is imported only where a layer is made or its weight is wanted whole.

Shapes: W (out, in).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from lowrank.infra.extras import import_extra

Quantised = Literal["nf4", "int8"]
KINDS = get_args(Quantised)


def bitsandbytes() -> Any:
    """The library.

    Raises:
        ImportError: it is missing; names the extra.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of kernels that it can do without
    with _disable_current_modes():  # the tables that it makes when it is imported must not be fake
        return import_extra("bitsandbytes", "quantised")


def is_quantised(module: nn.Module) -> bool:
    """Whether this is a linear layer of bitsandbytes whose weight has been quantised, to 4 or to 8 bits."""
    weight = module._parameters.get("weight")
    if weight is None or not type(module).__module__.startswith("bitsandbytes.") or not isinstance(module, nn.Linear):
        return False
    return getattr(weight, "quant_state", None) is not None or weight.dtype is torch.int8


def keep_unpacked_(module: nn.Module) -> None:
    """Have the codes of a layer stay as they are in evaluation.

    On some CPUs bitsandbytes packs them otherwise there, which no layer of odd sizes survives, and products with what
    is packed have no gradient when training goes on.
    """
    module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module.state_dict()  # unpacks them in place


def held(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor that stands for a quantised weight: codes, scales, tables."""
    weight: Any = module.weight
    yield weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        yield _row_scales(module)
        return
    yield state.absmax
    yield state.code
    if state.nested:
        yield from (state.offset, state.state2.absmax, state.state2.code)


@torch.no_grad()
def dense_weight(module: nn.Module) -> Tensor:
    """W (out, in) as the codes say it, in the dtype that it was quantised from (of int8: float32); a new tensor."""
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.float() * (_row_scales(module).float() / 127)[:, None]
    made: Tensor = bitsandbytes().functional.dequantize_4bit(weight.data.view(-1, 1), state)
    return made


def _row_scales(module: nn.Module) -> Tensor:
    """Of int8 the largest magnitude of each row, (out,); the layer's first product moves it."""
    scales: Tensor | None = getattr(module.weight, "SCB", None)
    return module.state.SCB if scales is None else scales  # type: ignore[union-attr, return-value]


@torch.no_grad()
def quantised(layer: nn.Module, W: Tensor, kind: Quantised, *, double: bool = True) -> nn.Module:
    """What takes the place of ``layer``, whose weight as (out, in) is W: of bitsandbytes, the bias the very same.

    ``double``: the scales of nf4 are quantised too. On fake tensors (``plan.live_bytes``) the weight is a plain
    parameter of the same size, since a subclass would lose what makes it fake.
    """
    library, fake = bitsandbytes(), isinstance(W, FakeTensor)
    out_features, in_features = W.shape
    options: dict[str, Any] = {"bias": False, "device": "meta"}
    if kind == "nf4":
        if double and "dynamic" not in library.functional.name2qmap:
            with _disable_current_modes():  # the library keeps this table: it must not be a fake one
                library.functional.name2qmap["dynamic"] = library.functional.create_dynamic_map().to(W.device)
        codes, state = library.functional.quantize_4bit(
            W.contiguous(), blocksize=64, compress_statistics=double, quant_type="nf4"
        )
        with _disable_current_modes():
            made = library.nn.Linear4bit(
                in_features, out_features, compress_statistics=double, quant_type="nf4", **options
            )
        made.compute_type_is_set = True  # to none: it computes in its input's dtype, as nn.Linear does
        if fake:
            weight: Any = nn.Parameter(codes, requires_grad=False)
            weight.quant_state = state
        else:
            weight = library.nn.Params4bit(
                codes, quant_state=state, compress_statistics=double, quant_type="nf4", module=made, bnb_quantized=True
            )
        made.quant_state = state
    else:
        codes, scales, _ = library.functional.int8_vectorwise_quant(W.contiguous().half())
        with _disable_current_modes():
            made = library.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False, **options)
        weight = nn.Parameter(codes, requires_grad=False) if fake else library.nn.Int8Params(codes, requires_grad=False)
        weight.CB, weight.SCB = weight.data, scales
    made.weight = weight
    made.register_parameter("bias", layer.bias)
    made.source_cls = type(layer)
    return made.train(layer.training)


@torch.no_grad()
def dequantised(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The layer that a quantised one stands for, with its weight as the codes say it."""
    W, kind = dense_weight(module).to(dtype), getattr(module, "source_cls", nn.Linear)
    plain = kind is nn.Linear
    out_features, in_features = W.shape
    made: nn.Module = (
        nn.Linear(in_features, out_features, bias=False, device="meta") if plain else kind(out_features, in_features)
    )
    made.weight = nn.Parameter(W if plain else W.mT.contiguous(), requires_grad=False)
    made.register_parameter("bias", module._parameters["bias"])
    return made.train(module.training)
