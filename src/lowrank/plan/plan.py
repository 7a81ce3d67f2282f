"""Binds a method to a model, and shows what came of it.

    plan = apply_(model, method)    in place; what would silently not happen is an error before anything is changed
    print(plan)                     the table: layer, adapter, rule, what trains, and why not
    opt = plan.optimizer(lr=…)      the one optimizer, with merges at their time

``assignment`` decides which parameter trains, and documents how.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from lowrank.adapters import Adapter, SplitAdapter
from lowrank.adapters.head_gather import split_adapters
from lowrank.adapters.layers import adapted_layers, quantised_layers
from lowrank.distributed.collectives import Group
from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.shards import Shard, is_sharded
from lowrank.distributed.workers import ProcessLayout, process_layout
from lowrank.infra.checks import check_choice
from lowrank.linalg.quantised_linear import keep_unpacked_
from lowrank.methods import Method
from lowrank.optim.optimizer import Optimizer
from lowrank.optim.pairs import OneFactor
from lowrank.optim.state import check_forgets
from lowrank.plan.assignment import Assignment
from lowrank.plan.ledger import Ledger, ledger
from lowrank.plan.placement import Placement
from lowrank.plan.row import Across, Row
from lowrank.plan.synchronisation import Synchroniser, fragments_of
from lowrank.plan.table import table


@dataclass
class Plan:
    """A model bound to a method.

    ``rows`` holds every parameter once; ``notes`` what a reader should know; ``layout`` the processes that train it,
    and which of them in step; ``parts`` what this rank holds of each sharded parameter, by name (``fsdp.shard_``). What
    changes between steps is in the ``Synchroniser`` of each optimizer.
    """

    model: nn.Module
    method: Method
    seed: int
    rows: list[Row]
    adapters: dict[str, Adapter]
    notes: list[str] = field(default_factory=list)
    layout: ProcessLayout = field(default_factory=ProcessLayout)
    shards: dict[str, Shard] = field(default_factory=dict)

    @property
    def ranks(self) -> ProcessGroup | None:
        """All processes that train the model; None for one."""
        return self.layout.ranks

    @property
    def intra_worker(self) -> ProcessGroup | None:
        """The ranks that train in step with this one; None where it trains alone."""
        return self.layout.intra_worker

    @property
    def workers(self) -> Group | None:
        """Those who train apart, of which this rank's worker is one; None where all ranks train in step."""
        return self.layout.workers

    @cached_property
    def shared(self) -> list[nn.Parameter]:
        """Trained parameters whose gradients the ranks sum; empty in one process, as the next two are."""
        return self._across("shared")

    @cached_property
    def own(self) -> list[nn.Parameter]:
        """Heads that this worker alone trains."""
        return self._across("own")

    @cached_property
    def own_adapters(self) -> list[SplitAdapter]:
        """The adapter of each of ``own``."""
        owner = {id(p): a for a in self.adapters.values() if isinstance(a, SplitAdapter) for p in a.parameters()}
        return [owner[id(p)] for p in self.own]

    @cached_property
    def local(self) -> list[nn.Parameter]:
        """Parameters that each worker trains by itself, averaged every ``method.rest_interval`` steps."""
        return self._across("local")

    def _across(self, which: Across) -> list[nn.Parameter]:
        parameters = dict(self.model.named_parameters())
        chosen = [row.name for row in self.rows if row.rule is not None and row.across == which]
        return [parameters[name] for name in chosen] if self.ranks is not None else []

    @property
    def parameters_total(self) -> int:
        """Parameters of the model and its adapters; tied ones count once."""
        return sum(row.numel for row in self.rows)

    @property
    def parameters_trained(self) -> int:
        return sum(row.numel for row in self.rows if row.rule is not None)

    @property
    def ledger(self) -> Ledger:
        """Bytes of weights, gradients, optimizer state and kept copies, before the first step."""
        return ledger(self)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state, exact."""
        return self.ledger.state

    @property
    def kept_bytes(self) -> int:
        """Bytes that adapters keep beside their trainable factors."""
        return self.ledger.kept

    def __str__(self) -> str:
        return table(self)

    def optimizer(
        self,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        per_layer: bool = False,
        accumulate: int = 1,
        clip_per_layer: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        merge: Literal["auto", "manual"] = "auto",
        capturable: bool = False,
    ) -> Optimizer:
        """The optimizer of this plan: every trained parameter in one group with its rule.

        Args:
            lr: learning rate; a ``Use`` may multiply it.
            weight_decay: decoupled decay, for every trained parameter but adapter factors (unless a ``Use`` names
                those).
            per_layer, accumulate, clip_per_layer, scaler, capturable: see ``lowrank.optim.Optimizer``.
            merge: ``"auto"``, where ``step()`` merges when it is due, or ``"manual"``, where you call
                ``lowrank.merge_(plan, opt)``.

        Raises:
            ValueError: a negative or not finite ``lr`` or ``weight_decay``, or an unknown ``merge``.
        """
        if not 0 <= lr < float("inf") or not 0 <= weight_decay < float("inf"):
            raise ValueError(f"lr={lr} and weight_decay={weight_decay} must be finite and not negative")
        if self.method.merge is not None and 0 < self.method.merge.forget < 1:
            for row in self.rows:
                if row.is_factor and row.rule is not None:
                    check_forgets(row.rule, torch.empty(row.shape, dtype=row.dtype, device="meta"), row.name)
        check_choice("merge", merge, ("auto", "manual"))
        synchroniser = self.synchroniser(automatic=merge == "auto")
        synchroniser.keep_reference_copies_()
        synchroniser.watch_weights_()
        synchroniser.optimizer = Optimizer(
            self._groups(lr, weight_decay),
            per_layer=per_layer,
            accumulate=accumulate,
            clip_per_layer=clip_per_layer,
            scaler=scaler,
            schedule=self.method.lr,
            synchroniser=synchroniser,
            expect={p: name for name, adapter in self.adapters.items() for p in list(adapter.parameters())[:1]},
            seed=self.seed,
            intra_worker=self.intra_worker,
            summed=self._summed(),
            agreed=dict.fromkeys(self.own, self.workers) if self.workers is not None else {},
            capturable=capturable,
        )
        return synchroniser.optimizer

    def synchroniser(self, opt: Optimizer | None = None, *, automatic: bool = True) -> Synchroniser:
        """What merges and averages between steps: that of ``opt`` where this plan's ``optimizer`` made it, else a new
        one, which knows of nothing done before."""
        found = None if opt is None else opt.synchroniser
        if isinstance(found, Synchroniser) and found.model is self.model:
            return found
        made = Synchroniser(
            self.model,
            self.layout,
            self.method.merge,
            adapters=list(self.adapters.values()),
            own=dict(zip(self.own, self.own_adapters, strict=True)),
            local=self.local,
            rest_every=self.method.rest_interval,
            automatic=automatic,
        )
        made.optimizer = opt
        return made

    def _summed(self) -> dict[nn.Parameter, Group]:
        """Over which ranks the optimizer sums each gradient; FSDP has summed those of parts within the worker."""
        layout, parts = self.layout, {id(p) for n, p in self.model.named_parameters() if n in self.shards}
        over: list[tuple[nn.Parameter, Group | None]]
        over = [(p, layout.cross_worker if id(p) in parts else layout.world) for p in self.shared]
        over += [(p, None if id(p) in parts else layout.intra_worker) for p in (*self.own, *self.local)]
        return {p: group for p, group in over if group is not None}

    def _groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        parameters = dict(self.model.named_parameters())
        groups: dict[tuple[Any, float, float], list[tuple[str, nn.Parameter]]] = {}
        for row in self.rows:
            if row.use is None:
                continue
            rule = row.rule.pair if isinstance(row.rule, OneFactor) else row.rule
            key = (rule, row.lr, row.decay * weight_decay)
            groups.setdefault(key, []).append((row.name, parameters[row.name]))
        return [
            {"params": params, "rule": rule, "lr": lr, "lr_ratio": ratio, "decay": decay}
            for (rule, ratio, decay), params in groups.items()
        ]


def apply_(
    model: nn.Module, method: Method, *, seed: int = 0, ranks: ProcessGroup | None = None, workers: int | None = None
) -> Plan:
    """Bind ``method`` to ``model`` in place, and return the plan.

    Args:
        model: any module with linear layers; it is changed: layers get adapters, ``requires_grad`` is set.
        method: from ``lowrank.methods``, or your own ``lowrank.methods.Method``.
        seed: of the factors' random streams.
        ranks: the processes that train it together (``lowrank.distributed.process_group.joined``). Every rank divides
            its loss by the global batch.
        workers: how many of them train apart, each with its share of the heads that split the batch; the ranks of one
            worker train in step. None: every rank is a worker. 1: all ranks train in step, as DDP
            and FSDP do, and each has all heads. Unless every rank is a worker, ``lowrank.plan.fsdp.shard_(plan)`` may
            follow, by which the ranks of a worker hold its model in parts.

    Raises:
        ValueError: targets that match no linear layer, a rank above a matrix, nothing left to train, a parameter
            without a rule, ranks that cannot be divided so; in each case the model is as it was.
    """
    if next(adapted_layers(model), None) is not None:
        raise ValueError("the model carries adapters already; lowrank.merge_and_unload(model) takes them off first")
    if next(model.parameters(), None) is None:
        raise ValueError("the model has no parameters")
    _refuse_wrapped(model)
    layout = process_layout(ranks, workers)
    placement = Placement(model, method, seed, layout)
    assignment = Assignment(placement)
    assignment.check_rest()
    try:
        for layer in quantised_layers(model).values():
            keep_unpacked_(layer)
        placement.place()
        if method.merge is not None:
            fragments_of(split_adapters(model), method.merge.fragments)
        rows = assignment.rows()
    except Exception:
        placement.undo()
        raise
    plan = Plan(model, method, seed, rows, placement.adapters, placement.notes, layout)
    parameters = dict(model.named_parameters())
    for row in rows:
        parameters[row.name].requires_grad_(row.rule is not None)
    return plan


def _refuse_wrapped(model: nn.Module) -> None:
    """A plan is made of the plain model: what wraps or shards it comes after."""
    sharded = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
    if sharded is not None:
        raise ValueError(
            f"{sharded} is sharded already (fully_shard), so that adapters and rules cannot be chosen by its shape: "
            "first apply_(model, method, ranks=ranks, workers=1), then lowrank.plan.fsdp.shard_(plan)"
        )
    kind = type(model).__name__
    if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise ValueError(
            f"the model is wrapped in {kind}, which would sum gradients that the optimizer sums itself: give "
            "model.module before it was wrapped, with ranks= of lowrank.distributed.process_group.joined"
        )


def merge_(plan: Plan, opt: Optimizer | None = None) -> None:
    """Fold the adapters into the weights now; with ``opt``, its state forgets as the method's ``Merge.forget`` says.

    An optimizer made with ``merge="auto"`` does this by itself when a merge is due. Of several ranks all must call it.
    """
    plan.synchroniser(opt).synchronise_(merging=True, averaging=False)
