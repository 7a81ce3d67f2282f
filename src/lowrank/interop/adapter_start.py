"""Adapters of others as a start: a model of text with one in use, and a run that trains one further.

    base_of, use_adapter_   where its base is, and the base with it, for scoring and generating
    start_from_adapter_     the factors of a folder put into the adapters of a plan

Folders are ours (``adapter.json``) or PEFT's (``adapter_config.json``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.adapter import Adapter
from lowrank.adapters.dora import DoRAAdapter
from lowrank.adapters.layers import AdaptedLayer, adapted_layers, replace
from lowrank.adapters.lora import LoRAAdapter
from lowrank.infra.files import read_json
from lowrank.interop.adapter_bank import AdapterBank, is_peft, read_adapter
from lowrank.interop.peft import lora_of, magnitude_of, stacked
from lowrank.plan.plan import Plan


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, ours or PEFT's."""
    return is_peft(folder) or (folder / "adapter.json").is_file()


def base_of(folder: Path, base: str | None = None) -> str:
    """Where the base of an adapter of text is: ``base``, or what the adapter says.

    Raises:
        ValueError: it does not say, it is of another task, or the base is a run.
    """
    place = base
    if base is None and is_peft(folder):
        place = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    elif base is None:
        info, _ = read_adapter(folder)
        if info.reading:
            raise ValueError(f"{folder} is an adapter for {info.task}: see lowrank predict --adapter {folder}")
        place = str(info.model.args.get("path", "")) if info.model.name == "pretrained" else None
    if not place:
        raise ValueError(f"{folder} does not say where its base is: give --base, a model's folder or its name")
    if (Path(place).expanduser() / "run.json").is_file():
        raise ValueError(f"the base {place} is a run: lowrank export {place} OUT makes a model of it, then give OUT")
    return place


def base_options(folder: Path) -> dict[str, Any]:
    """How the base of an adapter of ours was loaded: dtype and quantisation; nothing of PEFT's, which do not say."""
    args = {} if is_peft(folder) else read_adapter(folder)[0].model.args
    return {name: args[name] for name in ("dtype", "quantise") if args.get(name) is not None}


def use_adapter_(model: nn.Module, folder: Path) -> nn.Module:
    """Put the adapter of ``folder`` into the plain ``model``, its base.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is for another model.
    """
    bank = AdapterBank(model)
    bank.load(folder, "adapter")
    return bank.use("adapter").eval()


def start_from_adapter_(plan: Plan, folder: Path) -> None:
    """Put the factors of an adapter's folder, and what else it holds, into ``plan``, to be trained further.

    The plan may have a higher rank, another scale, and adapters on more layers or on parts of a fused projection: what
    the model computes is the same.

    Raises:
        ValueError: the plan has no LoRA where the adapter has one, or a smaller rank; the base is another; nothing has
            changed then.
    """
    if plan.shards:
        raise ValueError("--init-adapter: a sharded model cannot take it (--engine fsdp); use --engine ddp")
    layers = dict(adapted_layers(plan.model))
    flags = {name: p.requires_grad for name, p in plan.model.named_parameters()}
    for name, layer in layers.items():
        replace(plan.model, name, layer.original())
    try:
        bank = AdapterBank(plan.model)
        bank.load(folder, "start")
        found, own = bank.parts("start")
    finally:
        for name, layer in layers.items():
            replace(plan.model, name, layer)
        for name, p in plan.model.named_parameters():
            p.requires_grad_(flags[name])
    missing = [name for name in found if name not in layers]
    if missing:
        names = ",".join(sorted({name.rpartition(".")[2] for name in found}))
        raise ValueError(
            f"{folder} adapts {missing[0]}, and {plan.method.name} does not: name the adapter's layers with "
            f"--method.target_modules {names}, and a method such as lora"
        )
    moves = [move for name, layer in found.items() for move in _moves(name, layer, layers[name], folder)]
    known = dict(plan.model.named_parameters())
    wrong = [name for name, p in own.items() if known[name].shape != p.shape]
    if wrong:
        raise ValueError(f"{folder} is for another shape: {wrong[0]} is {tuple(own[wrong[0]].shape)}")
    with torch.no_grad():
        for target, source in [*moves, *((known[name], p) for name, p in own.items())]:
            target.copy_(source)


def _moves(name: str, source: AdaptedLayer, target: AdaptedLayer, folder: Path) -> list[tuple[Tensor, Tensor]]:
    """(where to, what) of one layer's factors."""
    A, B, scale = stacked(source)
    moves: list[tuple[Tensor, Tensor]] = []
    left = B.clone()
    for part, adapter, _ in target.pieces():
        lora = _taking(name, adapter, source, folder)
        rows = target.parts[part]
        left[rows] = 0
        used = B[rows].abs().amax(dim=0) > 0
        rank = int(used.sum())
        if rank > lora.config.rank:
            raise ValueError(
                f"{folder} has rank {rank} on {name} and the run {lora.config.rank}: use --method.rank {rank} or more"
            )
        new_A, new_B = lora.A.detach().clone(), torch.zeros_like(lora.B)
        new_A[0, :rank] = A[used]
        new_B[0, :, :rank] = B[rows][:, used] * (scale / lora.config.scale)
        moves += [(lora.A, new_A), (lora.B, new_B)]
        if isinstance(adapter, DoRAAdapter):
            moves.append((adapter.magnitude, magnitude_of(source)[rows]))
    if bool(left.any()):
        raise ValueError(f"{folder} changes parts of {name} that the run does not adapt: name the whole layer")
    return moves


def _taking(name: str, adapter: Adapter, source: AdaptedLayer, folder: Path) -> LoRAAdapter:
    """The LoRA that takes the factors."""
    dora = any(isinstance(each, DoRAAdapter) for _, each, _ in source.pieces())
    if dora != isinstance(adapter, DoRAAdapter):
        kind, method = ("DoRA", "dora") if dora else ("LoRA", "lora")
        raise ValueError(f"{folder} is {kind}, and the run is not: use --method {method}")
    lora = lora_of(adapter)
    if lora.heads != 1 or lora.all_heads != 1 or lora.subtracts:
        raise ValueError(
            f"{name} has several heads, or starts from singular vectors (pissa): an adapter is trained further with "
            "--method lora, rslora, lora_plus or dora"
        )
    return lora
