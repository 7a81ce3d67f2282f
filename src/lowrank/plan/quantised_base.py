"""A quantised base is in no checkpoint: it is made again from where it came, and must be what it was.

A checkpoint then holds what trains and what adapters keep, and in its ``meta["base"]``

    place        the folder or name that the base was loaded from; empty where the seed alone makes it
    plain        a digest of the frozen weights that are not quantised
    quantised    one of the codes and scales, which are compared on the kind of ``device`` that made them: another
                 one's kernels may round a few codes otherwise
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lowrank.adapters.layers import quantised_layers
from lowrank.infra.checkpoint import Checkpoint
from lowrank.infra.fingerprints import digest
from lowrank.linalg.quantised_linear import held
from lowrank.plan.plan import Plan

_ADAPTER = ".adapters."


def stored_names(plan: Plan) -> set[str] | None:
    """The names of a checkpoint's tensors; None: all of the model's, where nothing is quantised."""
    if not quantised_layers(plan.model):
        return None
    named = dict(plan.model.named_parameters(remove_duplicate=False))
    trained = {id(named[row.name]) for row in plan.rows if row.rule is not None}
    beside = {name for name in plan.model.state_dict() if _ADAPTER in name}
    return beside | {name for name, p in named.items() if id(p) in trained}


def stored(plan: Plan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a model's ``state_dict`` what a checkpoint holds."""
    names = stored_names(plan)
    return {name: tensor for name, tensor in state.items() if names is None or name in names}


def base_of(plan: Plan, place: str) -> dict[str, str] | None:
    """What is to be known of a quantised base (module docstring); None where nothing is quantised."""
    layers = quantised_layers(plan.model)
    if not layers:
        return None
    names, codes = stored_names(plan) or set(), {f"{name}.weight" for name in layers}
    plain = {n: p for n, p in plan.model.named_parameters() if n not in names | codes}
    packed = {f"{name}.{i}": t for name, layer in layers.items() for i, t in enumerate(held(layer))}
    device = next(iter(packed.values())).device.type
    return {"place": place, "plain": digest(plain), "quantised": digest(packed), "device": device}


def check_base(plan: Plan, saved: Checkpoint) -> None:
    """Refuse to put a checkpoint's adapters on another base than they were trained on.

    Raises:
        ValueError: naming where the base came from.
    """
    told: Any = saved.meta.get("base")
    now = base_of(plan, "") if told else None
    if now is None:
        return
    compared = ("plain", "quantised") if told["device"] == now["device"] else ("plain",)
    if any(told[which] != now[which] for which in compared):
        where = f"the base {told['place']}" if told["place"] else "the base, which the seed makes,"
        raise ValueError(
            f"{where} is not what it was when {saved.folder} was written: its weights have changed, and a checkpoint "
            "on a quantised base holds the adapters alone. Put the old weights back"
        )
