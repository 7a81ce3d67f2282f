"""What an adapter costs: one adapted layer, forward and backward, against the limit, the same layer frozen.

    python -m benchmarks.layer

x 8 × 256 × 768, 768 → 3072 and back, 4 heads of rank 4, float32. Goals: at most 1.15 × the frozen layer, and no slower
than PEFT's LoRA at one head; kept for backward: the input once, and rank-sized tensors. Also q, k and v as three
adapters on one fused product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import in_turns, medians, ratio, save
from lowrank.adapters import AdaptedLinear, DoRA, LoRA, Site

BATCH, TOKENS, RANK, ROUNDS = 8, 256, 4, 25


def adapted(
    linear: nn.Linear,
    *,
    rank: int = RANK,
    heads: int = 1,
    split: bool = False,
    keep: bool = False,
    direction: bool = False,
    parts: str = "",
) -> nn.Module:
    """``linear`` with adapters that are no longer fresh; ``keep``: merged once; ``direction``: DoRA."""
    height = linear.out_features // max(1, len(parts))
    rows = {part: slice(i * height, (i + 1) * height) for i, part in enumerate(parts)} or {"all": slice(0, height)}
    adapters = {}
    for part, place in rows.items():
        config = LoRA(rank=rank, heads=heads, split=split)
        site = Site(part, linear.weight[place].detach(), keep=keep)
        adapter: Any = DoRA(config)(site) if direction else config(site)
        for name, factor in adapter.named_parameters():
            if name.endswith("B"):
                nn.init.normal_(factor, std=0.01)
        if keep:
            adapter.settle_()
        adapters[part] = adapter
    return AdaptedLinear(linear, adapters, rows)


def frozen(inputs: int, outputs: int, **kind: Any) -> nn.Linear:
    return nn.Linear(inputs, outputs, **kind).requires_grad_(False)


def with_peft(linear: nn.Linear, rank: int = RANK, dora: bool = False) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, use_dora=dora, target_modules=["0"])
    model: nn.Module = get_peft_model(nn.Sequential(linear), config)
    return model


def round_trip(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    trained = [p for p in layer.parameters() if p.requires_grad]

    def run() -> None:
        x.grad = None
        for p in trained:
            p.grad = None
        layer(x).backward(dy)

    return run


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that the forward pass keeps for backward, parameters left out, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(kept.values())


def measure(inputs: int, outputs: int, parts: str = "") -> dict[str, object]:
    x, dy = torch.randn(BATCH, TOKENS, inputs, requires_grad=True), torch.randn(BATCH, TOKENS, outputs)
    layers: dict[str, nn.Module] = {
        "frozen": frozen(inputs, outputs),
        "lora": adapted(frozen(inputs, outputs)),
        "multi-head, 4 heads": adapted(frozen(inputs, outputs), heads=4),
        "lte, 4 heads": adapted(frozen(inputs, outputs), heads=4, split=True, keep=True),
        "peft lora": with_peft(nn.Linear(inputs, outputs)),
    }
    if parts:
        layers[f"lora on {', '.join(parts)} of one product"] = adapted(frozen(inputs, outputs), parts=parts)
    seconds = in_turns({name: round_trip(layer, x, dy) for name, layer in layers.items()}, rounds=ROUNDS)
    return {
        "seconds": medians(seconds),
        "ratio to frozen": {name: ratio(seconds, name, "frozen") for name in layers},
        "lora / peft": ratio(seconds, "lora", "peft lora"),
        "kept for backward, bytes": {name: kept_bytes(layer, x) for name, layer in layers.items()},
        "input, bytes": x.numel() * 4,
    }


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    result = {
        "768 → 3072": measure(768, 3072),
        "3072 → 768": measure(3072, 768),
        "768 → 2304, fused": measure(768, 2304, parts="qkv"),
    }
    for name, figures in result.items():
        print(name)
        for key, value in figures.items():
            print(f"  {key}: {value}")
    print("written to", save("layer", result).name)


if __name__ == "__main__":
    main()
