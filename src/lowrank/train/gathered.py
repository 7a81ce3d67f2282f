"""Checkpoints of several ranks: what one process with all heads would have saved, so that any number can resume.

    save    inside ``consolidated_model``: the model's own ``state_dict``, and here the optimizer's, all heads gathered
    load    each rank takes its heads out of it; one process takes it as it is

Of a rest that trains locally the weights saved are the workers' mean and the optimizer's state is that of the first
rank to write on each disk: such a run resumes as if it had just been averaged. Everything else resumes bitwise, with as
many ranks as saved it. For sharded models see ``gathered_parts``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lowrank.adapters.head_gather import KEPT, SENT, SplitAdapter, gather_heads, own_part
from lowrank.infra import checkpoint
from lowrank.optim.optimizer import Optimizer
from lowrank.optim.state import find_saved, leaves, mapped
from lowrank.plan.plan import Plan
from lowrank.train.gathered_parts import Keeping, load_model_parts_, own_optimizer_parts, whole_parts


def split_names(model: nn.Module) -> dict[str, tuple[SplitAdapter, str]]:
    """The tensors with a dimension for split heads: name in the ``state_dict`` → (adapter, name in the adapter)."""
    found: dict[str, tuple[SplitAdapter, str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SplitAdapter) and module.split:
            tensors = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if n in (*KEPT, *SENT))]
            found |= {f"{prefix}.{name}": (module, name) for name, _ in tensors}
    return found


def check_state(plan: Plan, opt: Optimizer) -> None:
    """Refuse, before any work, heads whose optimizer state is not kept head by head.

    Raises:
        ValueError: naming the parameter.
    """
    for p in plan.own:
        for _, tensor in leaves(opt.state[p]):
            if tensor.dim() and len(tensor) != len(p):
                raise ValueError(
                    f"the optimizer state of {opt.name_of(p)} is not kept head by head and cannot be put together from "
                    "several ranks: use storage='float32' for the heads' rule"
                )


def whole_optimizer_state(plan: Plan, opt: Optimizer, keeping: Keeping = "whole") -> dict[str, Any]:
    """``opt.state_dict()`` of one process with all heads. Every rank must call it; of the state of sharded parameters
    each gets what ``keeping`` says."""
    parts = whole_parts(plan, opt, keeping) if plan.shards else {}
    heads = _all_heads(plan, opt)
    if keeping in ("help", "nothing"):
        return {}
    state = opt.state_dict()
    state["state"] |= parts
    saved = find_saved(state, opt.param_groups)
    for p, everyone in heads.items():
        nest = saved[p][1]
        nest.update(mapped(nest, lambda path, t, everyone=everyone: everyone.get(path, t)))  # type: ignore[misc]
    return state


def _all_heads(plan: Plan, opt: Optimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Of each parameter of this worker's own heads the tensors of its state, by path, for the heads of all workers."""
    if plan.workers is None or not plan.own:
        return {}
    mine = [{path: t for path, t in leaves(opt.state[p]) if t.dim()} for p in plan.own]
    return dict(zip(plan.own, gather_heads(mine, plan.own_adapters, plan.workers), strict=True))


def load_model_(plan: Plan, saved: checkpoint.Checkpoint) -> None:
    """Load what this rank's model holds of a checkpoint.

    Raises:
        RanksDisagree: the ranks of a sharded model have different checkpoints.
    """
    split = split_names(plan.model)

    def own(name: str, tensor: Tensor) -> Tensor:
        return own_part(*split[name], tensor) if name in split else tensor

    if plan.shards and plan.ranks is not None:
        plan.ranks.agree({"checkpoint": checkpoint.fingerprint(saved.folder)})
        load_model_parts_(plan, saved, own)
    else:
        plan.model.load_state_dict({name: own(name, tensor) for name, tensor in saved.tensors.items()})


def own_optimizer_state(plan: Plan, opt: Optimizer, saved: checkpoint.Checkpoint) -> dict[str, Any]:
    """What this rank's optimizer holds of a checkpoint's optimizer state."""
    own: dict[str, Any] = own_optimizer_parts(plan, opt, saved) if plan.shards else saved.optimizer
    if plan.own:
        states = find_saved(own, opt.param_groups)
        for p, adapter in zip(plan.own, plan.own_adapters, strict=True):
            nest = states[p][1]
            nest.update(mapped(nest, lambda _, t, a=adapter: own_part(a, "", t) if t.dim() else t))  # type: ignore[misc]
    return own
