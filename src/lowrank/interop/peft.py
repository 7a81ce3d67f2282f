"""Adapters of PEFT (github.com/huggingface/peft), read and written by their format alone; PEFT itself is not needed.

    adapter_config.json         r, lora_alpha, use_rslora, use_dora, target_modules, modules_to_save, bias, …
    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (r, in), .lora_B.weight (out, r),
                                .lora_magnitude_vector (out,) of DoRA, and every other parameter that was trained

Both ways the function is the same: W + s B A, of DoRA m · (W + s B A) / ‖W + s B A‖.

written   each layer has one LoRA: heads are put beside each other (rank N·r, scale s/N), the start of PiSSA is
          subtracted (rank 2r, as W stays as it was), and adapters on parts of a fused projection are stacked, with zero
          rows for the parts that have none. Smaller ranks are filled up with zeros to the largest.
read      every layer has alpha = rank, its own scale being multiplied into B; a layer whose smaller side is below the
          largest rank is held as its merged weight.

Shapes: W (out, in), A (rank, in), B (out, rank), m (out,).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank.adapters.adapter import Adapter
from lowrank.adapters.dora import DoRAAdapter
from lowrank.adapters.layers import (
    WHOLE,
    AdaptedEmbedding,
    AdaptedLayer,
    adapted_layers,
    is_conv1d,
    is_linear,
    matrix_of,
)
from lowrank.adapters.lora import LoRAAdapter
from lowrank.infra.files import user_mode_, write_json
from lowrank.interop.adapter_bank import ADAPTER, AdapterInfo, restored_for
from lowrank.plan.plan import Plan
from lowrank.run.run import Call

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Switches of a LoRA in PEFT that make it another function than the one above.
_OTHER = (
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# Ways to start of which the base that PEFT trains on is the model's own.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


# --- writing ---------------------------------------------------------------------------------------------------------


def write_peft(plan: Plan, folder: Path | str, *, base: str = "") -> None:
    """Write the adapters of ``plan``, and what else it trained, as a folder that ``PeftModel.from_pretrained`` opens.

    Args:
        plan: of a method whose adapters are LoRA or DoRA and are not merged.
        folder: is made; files of the same names are overwritten.
        base: where the base model is, for PEFT to find it.

    Raises:
        ValueError: what was trained cannot be said in PEFT's format.
    """
    if plan.method.merge is not None:
        raise ValueError(f"{plan.method.name} merges its factors into the weights: no adapter is left apart for PEFT")
    layers = dict(adapted_layers(plan.model))
    kinds = {type(adapter) for layer in layers.values() for _, adapter, _ in layer.pieces()}
    if kinds not in ({LoRAAdapter}, {DoRAAdapter}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no adapter"
        raise ValueError(f"PEFT's format holds LoRA, or DoRA, on every layer; {plan.method.name} has {found}")
    dora = kinds == {DoRAAdapter}
    tied = [name for name, layer in layers.items() if isinstance(layer, AdaptedEmbedding)]
    if tied and dora:
        raise ValueError(f"{tied[0]} is tied to a layer with DoRA, which PEFT cannot say: use ties='leave' or 'untie'")
    factors = {name: stacked(layer) for name, layer in layers.items()}
    rank = max(A.shape[0] for A, _, _ in factors.values())
    scale = next(iter(factors.values()))[2]
    changes = {}
    for name, (A, B, own) in factors.items():
        fill = rank - A.shape[0]
        A, B = torch.cat([A, A.new_zeros(fill, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), fill)], dim=1)
        changes[name] = Change(A, B * (own / scale), magnitude_of(layers[name]) if dora else None)
    trained = {row.name for row in plan.rows if row.rule is not None and ADAPTER not in row.name}
    write_changes(Path(folder), plan.model, changes, trained, scale=scale, base=base)


@dataclass(frozen=True)
class Change:
    """What PEFT is to add to a layer: A (R, in) and B (out, R), of DoRA m (out,) too."""

    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None


def write_changes(
    folder: Path,
    model: nn.Module,
    changes: Mapping[str, Change],
    trained: Collection[str],
    *,
    scale: float = 1.0,
    base: str = "",
) -> list[str]:
    """Write a folder of PEFT's: ``changes`` by layer, W + scale · B A, and the parameters ``trained`` beside them.

    Returns:
        The modules that are saved whole.

    Raises:
        ValueError: a trained parameter belongs to a module that PEFT would not save alone; nothing is written.
    """
    saved, biases = _beside(model, trained, changes)
    whole = sorted({name.rpartition(".")[0] for name in saved})
    ranks = {name: change.A.shape[0] for name, change in changes.items()}
    rank = max(ranks.values())
    modules = [model.get_submodule(name) for name in changes]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if re.search("ForCausalLM|LMHead", type(model).__name__) else None,
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": {re.escape(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {re.escape(name): scale * own for name, own in ranks.items() if own != rank},
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": any(change.magnitude is not None for change in changes.values()),
        "target_modules": _targets(model, changes),
        "modules_to_save": whole or None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": all(is_conv1d(each) or getattr(each, "transposed", False) for each in modules),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = saved | biases
    for name, change in changes.items():
        tensors |= _named(name, change, model.get_submodule(name))
    folder.mkdir(parents=True, exist_ok=True)
    content = {_PREFIX + name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    save_file(content, folder / WEIGHTS, {"format": "pt"})
    user_mode_(folder)
    write_json(folder / CONFIG, config)
    return whole


def _named(name: str, change: Change, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a layer as PEFT names and shapes them: an embedding's are transposed, a convolution's have four
    dimensions."""
    A, B, m = change.A, change.B, change.magnitude
    if isinstance(module, (AdaptedEmbedding, nn.Embedding)):
        return {f"{name}.lora_embedding_A": B.mT, f"{name}.lora_embedding_B": A.mT}
    weight: Any = module.weight
    if weight.dim() == 4:
        A, B = A.unflatten(1, weight.shape[1:]), B[:, :, None, None]
        m = None if m is None else m.view(1, -1, 1, 1)
    made = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    return made if m is None else {**made, f"{name}.lora_magnitude_vector": m}


def export_peft(source: Path, out: Path, *, which: str = "best") -> int:
    """Write the adapter of a run for PEFT (see :func:`write_peft`); returns the step of the checkpoint.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: what the run trained cannot be said in PEFT's format.
    """
    session, step = restored_for(out, source, which)
    try:
        write_peft(session.plan, out, base=base_place(session.run.model))
    except ValueError as error:
        raise ValueError(
            f"{error}; --rank N or --energy 0.9 writes what was changed in the weights as a LoRA"
        ) from error
    return step


def base_place(model: Call) -> str:
    """Where a run's base is, for PEFT: a folder's path written whole, which leads there from anywhere, or a name."""
    return model.placed().places.get("path") or str(model.args.get("path", ""))


def stacked(layer: AdaptedLayer) -> tuple[Tensor, Tensor, float]:
    """A (R, in), B (out, R) and s of the whole matrix: the parts' factors on their rows, zero elsewhere."""
    above, beside, scale = [], [], 0.0
    for part, adapter, _ in layer.pieces():
        A, B, own = lora_of(adapter).factors()
        scale = scale or own
        rows = B.new_zeros(layer.matrix.shape[0], B.shape[1])
        rows[layer.parts[part]] = B * (own / scale)
        above.append(A)
        beside.append(rows)
    return torch.cat(above), torch.cat(beside, dim=1), scale


def lora_of(adapter: Adapter) -> LoRAAdapter:
    inner = adapter.inner if isinstance(adapter, DoRAAdapter) else adapter
    if not isinstance(inner, LoRAAdapter):
        raise ValueError(f"PEFT's format holds LoRA or DoRA of LoRA; here there is {type(inner).__name__}")
    return inner


def magnitude_of(layer: AdaptedLayer) -> Tensor:
    """m (out,) of the whole matrix; rows without an adapter keep their norm."""
    whole = layer.matrix.detach().float().norm(dim=1)
    for part, adapter, _ in layer.pieces():
        whole[layer.parts[part]] = adapter.magnitude.detach().to(whole.dtype)  # type: ignore[operator]
    return whole


def _beside(
    model: nn.Module, trained: Iterable[str], layers: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was trained beside the adapters: parameters of whole modules, and biases of the adapted layers."""
    known = dict(model.named_parameters(remove_duplicate=False))
    pointers = {known[name].data_ptr() for name in trained}
    names = [name for name, p in known.items() if p.data_ptr() in pointers and ADAPTER not in name]
    owners = {name: name.rpartition(".")[0] for name in names}
    modules = {owner for owner in owners.values() if owner not in layers}
    alone = [n for n in names if owners[n] in modules and any(model.get_submodule(owners[n]).children())]
    if alone:
        raise ValueError(
            f"PEFT saves modules whole, which {', '.join(alone[:5])} is not: train with rest='freeze', or "
            "name it in freeze="
        )
    whole = {n: p.detach() for n, p in known.items() if n.rpartition(".")[0] in modules}
    return whole, {f"{owners[n]}.base_layer.bias": known[n].detach() for n in names if owners[n] in layers}


def _targets(model: nn.Module, layers: Iterable[str]) -> list[str] | str:
    """What ``target_modules`` must say for PEFT to find these layers and no others: ends of names where they do."""
    wanted = set(layers)
    every = [name for name, module in model.named_modules() if name in wanted or is_linear(module)]
    for said in (sorted({name.rpartition(".")[2] for name in wanted}), sorted(wanted)):
        if {name for name in every if any(f".{name}".endswith(f".{end}") for end in said)} == wanted:
            return said
    return "|".join(map(re.escape, sorted(wanted)))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_peft(folder: Path | str, model: nn.Module) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """A LoRA of PEFT, for ``AdapterBank(model).add(name, *read_peft(folder, model))``.

    Args:
        folder: what ``PeftModel.save_pretrained`` wrote.
        model: the plain base, its weights as PEFT had them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another kind than LoRA, rsLoRA, DoRA and PiSSA, or for another model.
    """
    path = Path(folder)
    config, tensors = _config(path), _tensors(path)
    layers: dict[str, dict[str, Tensor]] = {}
    own: dict[str, Tensor] = {}
    for name, t in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?", name)
        looked_up = re.fullmatch(r"(.+)\.lora_embedding_(A|B)", name)
        if looked_up:
            layers.setdefault(looked_up[1], {})["B" if looked_up[2] == "A" else "A"] = t.float().mT
        elif found:
            layers.setdefault(found[1], {})[found[2]] = t.float()
        elif "lora_" in name:
            raise ValueError(f"{path} adapts something else than a linear layer: {name}")
        else:
            own[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = t
    modules, known = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    strange = [n for n in layers if n not in modules or not (is_linear(modules[n]) or _looks_up(modules[n]))]
    strange += [name for name in own if name not in known]
    if strange or not layers:
        raise ValueError(f"{path} is for another model: this one has no {', '.join(strange[:5]) or 'layer of it'}")
    changes = {name: _change(config, name, modules[name], parts, path) for name, parts in layers.items()}
    rank, dora = max(A.shape[0] for A, _ in changes.values()), bool(config.get("use_dora"))
    small = [  # where there is no adapter of ours
        name for name in changes if _looks_up(modules[name]) or rank > min(matrix_of(modules[name]).shape)
    ]
    small += [
        name for name in changes if name not in small and _weight_names(known, name) & {f"{n}.weight" for n in small}
    ]
    own |= {f"{name}.weight": _merged(modules[name], *changes.pop(name), layers[name]) for name in small}
    _refuse_half_of_a_tie(known, own, small, path)
    made = _unaliased(model, own, path)
    for name, (A, B) in changes.items():
        prefix, fill = f"{name}{ADAPTER}{WHOLE}.", rank - A.shape[0]
        inner = prefix + "inner." if dora else prefix
        made[f"{inner}A"] = torch.cat([A, A.new_zeros(fill, A.shape[1])])[None]
        made[f"{inner}B"] = torch.cat([B, B.new_zeros(len(B), fill)], dim=1)[None]
        made[f"{inner}merges"] = torch.zeros((), dtype=torch.int64)
        if dora:
            made[f"{prefix}magnitude"] = layers[name]["magnitude_vector"].flatten()
    args: dict[str, Any] = {"target_modules": tuple(changes), "rank": rank, "alpha": float(rank), "ties": "leave"}
    info = AdapterInfo(
        method=Call(name="dora" if dora else "lora", args=args),
        model=Call(name="pretrained", args={"path": str(config.get("base_model_name_or_path") or "")}),
        task="text" if config.get("task_type") == "CAUSAL_LM" else "images",
        origin=str(path),
    )
    return info, made


def _config(path: Path) -> dict[str, Any]:
    """The configuration, of a kind that can be read."""
    file = path / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no folder of PEFT: it has no {CONFIG}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, start = config["peft_type"], config.get("init_lora_weights")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error!r}") from error
    other = [name for name in _OTHER if config.get(name)]
    if kind != "LORA":
        other = [f"peft_type={kind}"]
    elif start not in (*_PLAIN_STARTS, "pissa"):
        other.append(f"init_lora_weights={start!r}, for which PEFT changes the base,")
    if other:
        raise ValueError(f"{path}: {' and '.join(other)} cannot be expressed; LoRA, rsLoRA, DoRA and PiSSA can")
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    """The weights under the base's names; an older file of torch is read without running code."""
    try:
        if (path / WEIGHTS).is_file():
            found = load_file(path / WEIGHTS)
        else:
            found = torch.load(path / "adapter_model.bin", map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} has no {WEIGHTS}") from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: its weights cannot be read: {error}") from error
    return {name.removeprefix(_PREFIX): t for name, t in found.items()}


def _change(
    config: Mapping[str, Any], name: str, module: nn.Module, parts: Mapping[str, Tensor], path: Path
) -> tuple[Tensor, Tensor]:
    """A (R, in) and B (out, R) with the layer's change as B A."""
    W = matrix_of(module)
    wanted = {"A", "B"} | ({"magnitude_vector"} if config.get("use_dora") else set())
    if parts.keys() != wanted:
        raise ValueError(f"{path}: {name} has {', '.join(sorted(parts))}, and needs {', '.join(sorted(wanted))}")
    A, B = parts["A"].flatten(1), parts["B"].flatten(1)
    if (B.shape[0], A.shape[1]) != tuple(W.shape) or A.shape[0] != B.shape[1]:
        raise ValueError(f"{path}: factors {tuple(A.shape)} and {tuple(B.shape)} do not fit {name}, {tuple(W.shape)}")
    alpha = _of_layer(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    B = B * (alpha / (A.shape[0] ** 0.5 if config.get("use_rslora") else A.shape[0]))
    if config.get("init_lora_weights") == "pissa":  # PEFT trains on W without its leading part
        U, S, Vh = torch.linalg.svd(W.detach().float(), full_matrices=False)
        r = A.shape[0]
        return torch.cat([A, Vh[:r]]), torch.cat([B, -U[:, :r] * S[:r]], dim=1)
    return A, B


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _weight_names(known: Mapping[str, Tensor], layer: str) -> set[str]:
    """All names of a layer's weight, where it is tied."""
    return {name for name, p in known.items() if p is known[f"{layer}.weight"]}


def _refuse_half_of_a_tie(
    known: Mapping[str, Tensor], own: Mapping[str, Tensor], merged: Iterable[str], path: Path
) -> None:
    """A merged weight that is tied must be changed under all its names: one parameter cannot be two."""
    for layer in merged:
        left = sorted(_weight_names(known, layer) - own.keys())
        if left:
            raise ValueError(
                f"{path} changes {layer} and not {left[0]}, which is the same parameter in this model: load the base "
                "with tie_word_embeddings=False"
            )


@torch.no_grad()
def _merged(module: nn.Module, A: Tensor, B: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight of a layer with its change, as the layer stores it."""
    V = matrix_of(module).float() + B @ A
    if "magnitude_vector" in parts:
        V = V * (parts["magnitude_vector"].flatten() / V.norm(dim=1))[:, None]
    return (V.mT if is_conv1d(module) else V).reshape(module.weight.shape).to(module.weight.dtype)  # type: ignore[arg-type]


def _of_layer(pattern: Mapping[str, float] | None, name: str, otherwise: float) -> float:
    """A layer's value in PEFT's ``alpha_pattern``: of the first expression that matches the end of its name."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def _unaliased(model: nn.Module, own: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Saved parameters under the one name that the model lists them by: of tied ones, both of which PEFT saves."""
    listed = {p.data_ptr(): name for name, p in model.named_parameters()}
    known, made = dict(model.named_parameters(remove_duplicate=False)), dict[str, Tensor]()
    for name, t in own.items():
        first = listed[known[name].data_ptr()]
        if first in made and not torch.equal(made[first], t):
            raise ValueError(f"{path}: {first} and {name} are one parameter here, and are saved with two values")
        made[first] = t
    return made
