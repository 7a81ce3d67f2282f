"""FSDP2 for a plan: every weight in parts over the ranks, gathered a block at a time while it is computed.

    plan = apply_(model, method, ranks=ranks, workers=1)
    shard_(plan)                     torch's ``fully_shard`` on each block and on the root
    opt = plan.optimizer(lr=…)       state for the part here; what each rule makes of parts: ``optim.sharded``

With several workers (``distributed.workers``) each has a model of its own, in parts over its ranks: the mesh of two
dimensions on which LTE or local training runs between nodes and FSDP inside them.

Which way a weight is cut: a projected matrix along the side that is not projected, so that nothing of the projection
travels and its moments are cut too; every other along its rows. A dimension that does not go round the ranks (rows may
be uneven, but none without any; columns only even) is left, and a parameter without another stays whole on every rank.

Adapters' factors stay whole, their gradients summed as under DDP: they are small, a sum of their gradients is fewer
bytes than gathering them twice, and FSDP wants one dtype in a group, which factors of bfloat16 weights have not.

The weights must be alike on all ranks before they are cut; that is asked. All that FSDP sends goes through
``ProcessGroup``: it is counted, and a dead rank is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank.adapters.layers import adapted_layers
from lowrank.distributed.collectives import ring_gather_bytes
from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.shards import Shard, all_hold_some, to_local
from lowrank.optim.projected import Projected
from lowrank.optim.sharded import crosses, on_shard
from lowrank.plan.ledger import megabytes
from lowrank.plan.plan import Plan
from lowrank.plan.row import Row

WITHIN = "within_forward"  # a method of the model that runs a function of it as FSDP runs its forward (``models.text``)


def shard_(plan: Plan) -> None:
    """Shard the plan's model in place; afterwards make the optimizer. Every rank must call it.

    Raises:
        ValueError: one process, workers of one rank each, a rule that cannot act on parts, weights of several dtypes in
            a block; nothing has been changed.
        RanksDisagree: the ranks hold different weights.
    """
    everyone, ranks = _check(plan)
    every = [*plan.model.named_parameters(), *plan.model.named_buffers()]
    plain = {name: tensor for name, tensor in every if ".adapters." not in name}  # workers may have different heads
    everyone.agree_on(plain)
    parameters = dict(plan.model.named_parameters())
    parts = {row.name: part for row in plan.rows if (part := _cut(row, ranks)) is not None}
    shared = across_blocks(plan.model)
    parts = {name: part for name, part in parts.items() if id(parameters[name]) not in shared}
    for row in plan.rows:
        if row.rule is not None:
            on_shard(row.rule, parts.get(row.name), row.name)
    dims = {id(parameters[name]): part.dim for name, part in parts.items()}
    _fully_shard_(plan.model, {p for p in parameters.values() if id(p) not in dims}, dims, ranks)
    for _, layer in adapted_layers(plan.model):
        layer.original()  # the layer it replaced lets go of the whole weight
    plan.shards |= parts
    for cached in ("shared", "own", "local"):
        plan.__dict__.pop(cached, None)
    held = sum(to_local(p).nbytes for p in plan.model.parameters())
    whole = sum(p.nbytes for p in parameters.values())
    plan.notes.append(
        f"sharded over {ranks.count} ranks (FSDP2): this one holds {megabytes(held)} of {megabytes(whole)} of weights"
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks: the longest list of modules with parameters in it; none where it has no list."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and m is not model]
    longest: Sequence[nn.Module] = max(lists, key=len, default=())  # type: ignore[arg-type]
    return [block for block in longest if any(True for _ in block.parameters())]


def across_blocks(model: nn.Module) -> set[int]:
    """Parameters (by id) tied between blocks, or between a block and the rest.

    FSDP gathers a block at a time, and these have no one time; they stay whole.
    """
    owner: dict[int, set[int]] = {}
    inside = {id(module): number for number, block in enumerate(blocks(model)) for module in block.modules()}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owner.setdefault(id(p), set()).add(inside.get(id(module), -1))
    return {p for p, owners in owner.items() if len(owners) > 1}


def names_in_blocks(model: nn.Module) -> set[str]:
    """Names of the parameters in blocks, which FSDP gathers once more for the backward pass."""
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if id(module) in inside
        for name in module._parameters
    }


def _check(plan: Plan) -> tuple[ProcessGroup, ProcessGroup]:
    """(all ranks, those of this worker)."""
    if plan.ranks is None:
        raise ValueError("there is one process, and nothing to shard: start several with torchrun, and give ranks=")
    if plan.intra_worker is None:
        raise ValueError(
            "every rank is a worker that trains apart, and FSDP shards the model of ranks that train in step: "
            "apply_(model, method, ranks=ranks, workers=1), or fewer workers than ranks"
        )
    if plan.shards:
        raise ValueError("the plan's model is sharded already")
    parameters = dict(plan.model.named_parameters())
    trained = {row.name: row.dtype for row in plan.rows if row.rule is not None and not row.is_factor}
    if len(set(trained.values())) > 1:
        odd = next(name for name, dtype in trained.items() if dtype != next(iter(trained.values())))
        raise ValueError(
            f"FSDP wants trained weights of one dtype; {odd} is {parameters[odd].dtype}: use model.to(dtype) first"
        )
    return plan.ranks, plan.intra_worker


def _cut(row: Row, ranks: ProcessGroup) -> Shard | None:
    """Along which dimension the row's parameter is cut; None where it stays whole."""
    if row.is_factor or not row.shape:
        return None
    dims = list(range(len(row.shape)))
    if isinstance(row.rule, Projected):
        matrix = row.rule.stack or len(row.shape) == 2
        dims = dims[-2:] if matrix else dims[:1]
        if matrix:
            rule = row.rule
            dims.sort(key=lambda dim: crosses(rule, Shard(row.shape, dim, ranks), row.name))
    for dim in dims:
        size = row.shape[dim]
        if all_hold_some(size, ranks.count) and (dim == 0 or size % ranks.count == 0):
            return Shard(row.shape, dim, ranks)
    return None


def _fully_shard_(model: nn.Module, whole: set[nn.Parameter], dims: dict[int, int], ranks: ProcessGroup) -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    if not hasattr(FSDPModule, "set_custom_all_gather"):
        raise ValueError(f"--engine fsdp needs torch 2.9 or newer, this is {torch.__version__}; use --engine ddp")
    narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    options: dict[str, Any] = {
        "mesh": ranks.mesh,
        "shard_placement_fn": lambda p: Shard(dims[id(p)]),
        "ignored_params": whole,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None),
    }
    for module in [*blocks(model), model]:
        fully_shard(module, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # each rank divides its loss by the global batch
            module.set_force_sum_reduction_for_comms(True)
            gather: Any = _AllGather(ranks)  # torch does not export the interfaces that these two have
            scatter: Any = _ReduceScatter(ranks)
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(scatter)
    setattr(model, WITHIN, MethodType(lambda self, function, *args: function(self, *args), model))
    register_fsdp_forward_method(model, WITHIN)


class _Said:
    """What FSDP asks of a collective that is given to it."""

    def __init__(self, ranks: ProcessGroup):
        self.ranks = ranks

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Said):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        def run() -> Any:
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)

        size = ring_gather_bytes(input_tensor.nbytes, self.ranks.count)
        return self.ranks.collective("a gathering of weights", run, size)


class _ReduceScatter(_Said):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        def run() -> Any:
            return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)

        size = ring_gather_bytes(output_tensor.nbytes, self.ranks.count)
        return self.ranks.collective("a sum of gradients", run, size)
