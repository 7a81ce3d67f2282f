"""Checkpoints of a sharded model (``sharding``): what one process that holds it all would have saved, in parts or put
together, and back.

    in parts   every rank of a worker writes its own into one folder (``infra.checkpoint_parts``)
    whole      where the ranks of a worker do not all see one folder, as on nodes with disks of their own: each
               parameter, and its optimizer state, is put together from everyone's parts, one at a time; who writes
               (each node's first rank) keeps the result, in its processor's memory
    load       every rank reads its parts, of a checkpoint of either kind

So a run goes on with any number of ranks, sharded or not, and its folder opens in one process. State in 8 bits is kept
in blocks of the part; it is put together to be saved, by the ranks in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank.distributed.sharded_checkpoint import read_parts
from lowrank.distributed.shards import Shard, ShardSpec, reshard_, shard_of, to_local
from lowrank.infra.checkpoint import Checkpoint
from lowrank.infra.checkpoint_tensors import unflatten
from lowrank.optim.optimizer import Optimizer
from lowrank.optim.rules import Rule, State
from lowrank.optim.sharded import consolidated_state, local_state, shard_specs
from lowrank.optim.state import find_saved, mapped
from lowrank.plan.plan import Plan

# What a rank gets of what is to be saved: all of it; its parts; nothing, but it helps those who do; or nothing.
Keeping = Literal["whole", "parts", "help", "nothing"]


@torch.no_grad()
def whole_model_state(plan: Plan, keeping: Keeping = "whole") -> dict[str, Tensor]:
    """The model's ``state_dict`` as one process would have it. Every rank of a sharded model's worker must call it.

    ``keeping``: "whole" and "help" go together on the ranks of a worker; "parts" gives DTensors.
    """
    if not plan.shards:
        return plan.model.state_dict() if keeping == "whole" else {}
    reshard_(plan.model)
    state: dict[str, Tensor] = plan.model.state_dict(keep_vars=True)
    if keeping in ("parts", "nothing"):
        return state if keeping == "parts" else {}
    wholes: dict[int, Tensor] = {}  # tied names get one tensor
    for held in state.values():
        if id(held) not in wholes:
            part = shard_of(held, plan.intra_worker)
            whole = held.detach() if part is None else part.gather(to_local(held))
            wholes[id(held)] = whole.cpu() if keeping == "whole" else held
    return {name: wholes[id(held)] for name, held in state.items()} if keeping == "whole" else {}


@torch.no_grad()
def whole_parts(plan: Plan, opt: Optimizer, keeping: Keeping) -> dict[int, State]:
    """By its number in the optimizer the state of every sharded parameter, as ``keeping`` says; every rank of a worker
    must call it."""
    found: dict[int, State] = {}
    for index, p, rule, part in _sharded(plan, opt) if keeping != "nothing" else ():
        mine = opt.state[p]
        cuts = shard_specs(rule, part, mine, to_local(p)) if keeping == "parts" else None
        if cuts is not None:
            found[index] = mapped(mine, lambda path, t, cuts=cuts: _spread(t, cuts.get(path)))  # type: ignore[misc]
            continue
        whole = consolidated_state(rule, part, mine, to_local(p))
        if keeping == "parts" and part.ranks.rank != index % part.ranks.count:
            found[index] = mapped(whole, lambda _, t: t.to("meta"))  # another rank writes it
        elif keeping != "help":
            found[index] = mapped(whole, lambda _, t: t.cpu())
    return found


@torch.no_grad()
def load_model_parts_(plan: Plan, saved: Checkpoint, own: Callable[[str, Tensor], Tensor]) -> None:
    """Load a checkpoint's model, each rank its parts; ``own(name, tensor)`` is what this rank has of a whole tensor.

    Raises:
        ValueError: a shape differs.
    """
    assert plan.intra_worker is not None
    reshard_(plan.model)
    held = dict(plan.model.named_parameters(remove_duplicate=False))
    parts = {name: part for name, p in held.items() if (part := shard_of(p, plan.intra_worker, name)) is not None}
    names = saved.names("model")
    cuts = {name: ShardSpec(part, part.dim, part.shape) for name, part in parts.items() if name in names}
    read = read_parts(saved, "model", names, cuts, plan.intra_worker)
    state = {name: tensor if name in cuts else own(name, tensor) for name, tensor in read.items()}
    for name in cuts:
        to_local(held[name]).copy_(state[name])
        state[name] = held[name].detach()
    plan.model.load_state_dict(state)


def own_optimizer_parts(plan: Plan, opt: Optimizer, saved: Checkpoint) -> dict[str, Any]:
    """Of a checkpoint's optimizer state what this rank's optimizer holds.

    Raises:
        ValueError: it is of other parameters or rules than the optimizer's.
    """
    assert plan.intra_worker is not None
    tree = saved.state["tree"]["optimizer"]
    paths = find_saved(unflatten(tree, _Itself()), opt.param_groups)
    cuts: dict[str, ShardSpec] = {}
    coded: list[tuple[nn.Parameter, Rule, Shard]] = []
    for _, p, rule, part in _sharded(plan, opt):
        found = shard_specs(rule, part, opt.state[p], to_local(p))
        if found is None:
            coded.append((p, rule, part))
        else:
            cuts |= {_at(paths[p][1], path): cut for path, cut in found.items()}
    names = [name for name in saved.names("optimizer") if name.startswith("optimizer.")]
    own: dict[str, Any] = unflatten(tree, read_parts(saved, "optimizer", names, cuts, plan.intra_worker))
    states = find_saved(own, opt.param_groups)
    for p, rule, part in coded:
        state = states[p][1]
        state.update(local_state(rule, part, state, torch.empty_like(to_local(p), device="cpu")))
    return own


def _sharded(plan: Plan, opt: Optimizer) -> Iterator[tuple[int, nn.Parameter, Rule, Shard]]:
    """(number in the optimizer, parameter, its rule, its part) of every sharded parameter that trains."""
    index = 0
    for group in opt.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if name in plan.shards:
                yield index, p, group["rule"], plan.shards[name]
            index += 1


class _Itself(dict[str, Any]):
    """Gives for each path the path."""

    def __missing__(self, path: str) -> str:
        return path


def _at(nest: Any, path: str) -> Any:
    """What stands at a dotted path."""
    for key in path.split("."):
        nest = nest[key]
    return nest


def _spread(mine: Tensor, cut: ShardSpec | None) -> Tensor:
    return mine if cut is None else cut.spread(mine.contiguous())
