"""Checkpoints of a sharded model (``sharding``): what one process that holds it all would have saved, and back.

    save    each parameter, and its optimizer state, is put together from everyone's parts, one at a time; who writes
            the checkpoint (each node's first rank) keeps the result, in its processor's memory
    load    every rank reads the whole checkpoint and keeps its parts

So a run goes on with any number of ranks, sharded or not, and its folder opens in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.infra.parts import Part, local, part_of, reshard_
from lowrank.optim.optimizer import Optimizer
from lowrank.optim.rules import Rule, State
from lowrank.optim.sharded import own_state, whole_state
from lowrank.plan import Plan


@torch.no_grad()
def whole_model_state(plan: Plan, *, keep: bool = True) -> dict[str, Tensor]:
    """The model's ``state_dict`` with every weight whole. Every rank must call it; of a sharded model who does not
    ``keep`` it gets nothing."""
    if not plan.parts:
        return plan.model.state_dict()
    reshard_(plan.model)
    wholes: dict[int, Tensor] = {}  # tied names get one tensor
    state: dict[str, Tensor] = {}
    for name, held in plan.model.state_dict(keep_vars=True).items():
        if id(held) not in wholes:
            part = part_of(held, plan.mates, name)
            whole = held.detach() if part is None else part.gather(local(held))
            wholes[id(held)] = whole.cpu() if keep else held
        state[name] = wholes[id(held)]
    return state if keep else {}


@torch.no_grad()
def load_model_state_(plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Load what ``whole_model_state`` gave, each rank its parts.

    Raises:
        ValueError: a shape differs.
    """
    reshard_(plan.model)
    state = dict(tensors)
    for name, held in plan.model.named_parameters(remove_duplicate=False):
        part = part_of(held, plan.mates, name)
        if part is None or name not in state:
            continue
        if tuple(state[name].shape) != part.shape:
            raise ValueError(f"{name} is {tuple(state[name].shape)} in the checkpoint, {part.shape} in the model")
        local(held).copy_(part.cut(state[name]))
        state[name] = held.detach()
    plan.model.load_state_dict(state)


@torch.no_grad()
def put_together_(plan: Plan, opt: Optimizer, state: dict[str, Any], *, keep: bool = True) -> None:
    """``opt.state_dict()`` with the state of every sharded parameter whole, or empty for who does not ``keep`` it.
    Every rank must call it."""
    for index, p, rule, part in _sharded(plan, opt):
        whole = whole_state(rule, part, state["state"][index], local(p))
        state["state"][index] = _on_cpu(whole) if keep else {}


@torch.no_grad()
def take_parts_(plan: Plan, opt: Optimizer, saved: dict[str, Any]) -> None:
    """Of a checkpoint's optimizer state, which is changed, what this rank's optimizer holds."""
    places = {
        name: index
        for group in saved["param_groups"]
        for name, index in zip(group.get("param_names", ()), group["params"], strict=False)
    }
    for _, p, rule, part in _sharded(plan, opt):
        index = places.get(opt.name_of(p))
        if index in saved["state"]:
            like = torch.empty_like(local(p), device="cpu")
            saved["state"][index] = own_state(rule, part, saved["state"][index], like)


def _sharded(plan: Plan, opt: Optimizer) -> Iterator[tuple[int, nn.Parameter, Rule, Part]]:
    """(number in the optimizer, parameter, its rule, its part) of every sharded parameter that trains."""
    index = 0
    for group in opt.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if name in plan.parts:
                yield index, p, group["rule"], plan.parts[name]
            index += 1


def _on_cpu(state: State) -> State:
    return {key: value.cpu() if isinstance(value, Tensor) else _on_cpu(value) for key, value in state.items()}
