"""Checkpoints of a run: what is saved, by which rank, and how a run goes back to it.

Saved is all that the next step depends on (weights, the optimizer's state, random generators, the step), as one process
with all heads would hold it, so that any number of ranks, sharded or not, can go on from it:

    consolidated   heads and shards of all ranks put together, one parameter at a time, in the memory of who writes
    sharded        the ranks of a worker write their shards into one folder, where they all see it
                   (``distributed.sharded_checkpoint``)
    load           each rank takes its heads and its shards out of a checkpoint of either kind

Of a rest that trains locally the weights saved are the workers' mean and the optimizer's state is that of the first
rank to write on each disk: such a run resumes as if it had just been averaged. Everything else resumes bitwise, with as
many ranks as saved it. State in 8 bits is kept in blocks of the shard: the ranks put it together in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank.adapters import SplitAdapter
from lowrank.adapters.head_gather import gather_heads
from lowrank.data.catalogue import Data
from lowrank.distributed.sharded_checkpoint import read_sharded, save_sharded
from lowrank.distributed.shards import Shard, ShardSpec, reshard_, shard_of, to_local
from lowrank.infra import checkpoint
from lowrank.infra.checkpoint import Checkpoint, check_dtypes
from lowrank.infra.checkpoint_tensors import random_state, set_random_state_, unflatten
from lowrank.optim.optimizer import Optimizer
from lowrank.optim.rules import Rule, State
from lowrank.optim.sharded import consolidated_state, local_state, shard_specs
from lowrank.optim.state import find_saved, leaves, mapped
from lowrank.plan.plan import Plan
from lowrank.plan.quantised_base import base_of, check_base, stored, stored_names
from lowrank.run.run import Run
from lowrank.run.session import load_fitting_
from lowrank.train.folder import SaveRole, save_role

if TYPE_CHECKING:
    from lowrank.train.coordinator import Coordinator


class NotFinite(FloatingPointError):
    """The loss or a weight became NaN or infinite; the message names the last good checkpoint."""


def not_finite(what: str, step: int, root: Path) -> NotFinite:
    """The error for it, with what there is to go back to among the checkpoints in ``root``."""
    kept = checkpoint.saved(root)
    where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been saved yet"
    return NotFinite(
        f"{what} at step {step}; {where}. Lower --lr, lengthen --warmup or clip (--max-grad-norm 1.0), then start "
        "again or resume"
    )


class Saver:
    """Writes the checkpoints of a run into ``root``, and puts the run back where one of them was; all ranks have one.

    ``writer``: whether this rank writes. ``last``: the step that was last saved. ``data``: what the model must know of
    it (classes, the tokenizer) goes into every checkpoint, and its fingerprint.
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        coordinator: Coordinator,
        root: Path,
        *,
        writer: bool,
        data: Data,
    ):
        self.run, self.plan, self.optimizer, self.scaler, self.coordinator = run, plan, optimizer, scaler, coordinator
        self.root, self.writer, self.last = root, writer, -1
        self.role: SaveRole = "full" if writer else "assist"
        self.data = data
        self.base = base_of(plan, str(run.model.args.get("path", "")))

    def prepare(self) -> None:
        """Find out, when the run's folder may be made, what each rank is to save; every rank must call it."""
        self.role = save_role(self.root.parent, self.plan, writer=self.writer)

    def save(self, step: int, metrics: dict[str, float], best: float | None, *, is_best: bool) -> None:
        """Save the run after ``step`` steps, inside ``consolidated_model``; once a step.

        Raises:
            NotFinite: a weight is not finite: the checkpoints of before are what one can go back to.
            CheckpointError: it could not be written.
        """
        if self.last == step:
            return
        self._check_weights(step)
        self.last = step
        model = consolidated_model_state(self.plan, self.role)
        optimizer = consolidated_optimizer_state(self.plan, self.optimizer, self.role)
        random = self.coordinator.gathered(random_state())
        work = (
            self.coordinator.gathered(dict(self.coordinator.synchroniser.progress.since))
            if self.coordinator.weighs
            else []
        )
        data = self.coordinator.gathered(self.data.fingerprint)
        if self.role in ("assist", "none"):
            return
        meta = {
            "random": random[0],
            "random_of_ranks": random[1:],
            "work_of_ranks": work,
            "scaler": self.scaler.state_dict(),
            "best": best,
            "metrics": metrics,
            "method": self.run.method.to_json(),
            "learnt": self.data.to_json(),
            "data_of_ranks": data,
            "base": self.base,
        }
        what = (self.root, step, model, optimizer, meta)
        options: dict[str, Any] = {"keep": self.run.keep, "best": is_best, "attach": self.data.write_facts}
        if self.role == "sharded" and self.plan.intra_worker is not None:
            save_sharded(*what, ranks=self.plan.intra_worker, writer=self.writer, **options)
        else:
            checkpoint.save(*what, **options)

    def _check_weights(self, step: int) -> None:
        named = self.plan.model.named_parameters()
        bad = next((name for name, p in named if not bool(to_local(p).isfinite().all())), None)
        if self.plan.shards:  # what is not finite may be in another rank's shard
            bad = next((name for name in self.coordinator.gathered(bad) if name is not None), None)
        if bad is not None:
            raise not_finite(f"{bad} became NaN or infinite", step, self.root)

    def restore(self, saved: Checkpoint) -> None:
        """Weights, optimizer and scaler as they were.

        Raises:
            ValueError: the checkpoint is of another method, or its state does not fit.
        """
        method = self.run.method.to_json()
        if saved.meta["method"] != method:
            raise ValueError(
                f"the run was trained with {saved.meta['method']}, not with {method}; resume it with its own method, "
                "or start a new run from its weights with --init-from"
            )
        load_model_(self.plan, saved)
        self.coordinator.synchroniser.keep_reference_copies_()
        self.optimizer.load_state_dict(local_optimizer_state(self.plan, self.optimizer, saved))
        self.scaler.load_state_dict(saved.meta["scaler"])
        self.last = saved.step

    def restore_random(self, saved: Checkpoint) -> None:
        """Put the random generators back, where the run was saved by as many ranks; drop later checkpoints."""
        states = [saved.meta["random"], *saved.meta.get("random_of_ranks", [])]
        rank, ranks = self.coordinator.place or (0, 1)
        if len(states) == ranks:
            set_random_state_(states[rank])
            self.coordinator.synchroniser.progress.since.update((saved.meta.get("work_of_ranks") or [{}] * ranks)[rank])
        if self.writer:
            checkpoint.discard_after(self.root, saved.step)
            checkpoint.prune_(self.root, self.run.keep)  # a run killed right after it saved has not come to that


# --- the model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def consolidated_model_state(plan: Plan, role: SaveRole = "full") -> dict[str, Tensor]:
    """The model's ``state_dict`` as one process would have it. Every rank of a sharded model's worker must call it.

    ``role``: "full" and "assist" go together on the ranks of a worker; "sharded" gives DTensors.
    """
    if not plan.shards:
        return stored(plan, plan.model.state_dict()) if role == "full" else {}
    reshard_(plan.model)
    state: dict[str, Tensor] = plan.model.state_dict(keep_vars=True)
    if role in ("sharded", "none"):
        return state if role == "sharded" else {}
    full: dict[int, Tensor] = {}  # tied names get one tensor
    for held in state.values():
        if id(held) not in full:
            shard = shard_of(held, plan.intra_worker)
            tensor = held.detach() if shard is None else shard.gather(to_local(held))
            full[id(held)] = tensor.cpu() if role == "full" else held
    return {name: full[id(held)] for name, held in state.items()} if role == "full" else {}


@torch.no_grad()
def load_model_(plan: Plan, saved: Checkpoint) -> None:
    """Load what this rank's model holds of a checkpoint.

    Raises:
        RanksDisagree: the ranks of a sharded model have different checkpoints.
        ValueError: a shape differs.
        CheckpointError: a dtype differs.
    """
    heads = _split_tensors(plan.model)

    def own(name: str, tensor: Tensor) -> Tensor:
        if name not in heads:
            return tensor
        adapter, own_name = heads[name]
        return adapter.own_heads(tensor, own_name)

    reshard_(plan.model)
    held: dict[str, Tensor] = plan.model.state_dict(keep_vars=True)
    if not plan.shards or plan.intra_worker is None or plan.ranks is None:
        state = {name: own(name, tensor) for name, tensor in saved.tensors.items()}
        check_dtypes(held, state, saved)
        check_base(plan, saved)
        load_fitting_(plan.model, state, saved.folder, only=stored_names(plan))
        return
    plan.ranks.agree({"checkpoint": checkpoint.fingerprint(saved.folder)})
    shards = {name: shard for name, p in held.items() if (shard := shard_of(p, plan.intra_worker, name)) is not None}
    names = saved.names("model")
    specs = {name: ShardSpec(shard, shard.dim, shard.shape) for name, shard in shards.items() if name in names}
    read = read_sharded(saved, "model", names, specs, plan.intra_worker)
    state = {name: tensor if name in specs else own(name, tensor) for name, tensor in read.items()}
    check_dtypes(held, state, saved)
    for name in specs:
        to_local(held[name]).copy_(state[name])
        state[name] = held[name].detach()
    plan.model.load_state_dict(state)


def _split_tensors(model: nn.Module) -> dict[str, tuple[SplitAdapter, str]]:
    """The tensors with a dimension for split heads: name in the ``state_dict`` → (adapter, name in the adapter)."""
    found: dict[str, tuple[SplitAdapter, str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SplitAdapter) and module.split:
            found |= {f"{prefix}.{name}": (module, name) for name in module.head_tensors()}
    return found


# --- the optimizer ---------------------------------------------------------------------------------------------------


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


def consolidated_optimizer_state(plan: Plan, opt: Optimizer, role: SaveRole = "full") -> dict[str, Any]:
    """``opt.state_dict()`` of one process with all heads. Every rank must call it; of the state of sharded parameters
    each gets what its ``role`` says."""
    shards = _state_of_shards(plan, opt, role)
    heads = _state_of_heads(plan, opt)
    if role in ("assist", "none"):
        return {}
    state = opt.state_dict()
    state["state"] |= shards
    saved = find_saved(state, opt.param_groups)
    for p, full in heads.items():
        tree = saved[p][1]
        tree.update(mapped(tree, lambda path, t, full=full: full.get(path, t)))  # type: ignore[misc]
    return state


def local_optimizer_state(plan: Plan, opt: Optimizer, saved: Checkpoint) -> dict[str, Any]:
    """What this rank's optimizer holds of a checkpoint's optimizer state.

    Raises:
        ValueError: it is of other parameters or rules than the optimizer's.
    """
    own: dict[str, Any] = _read_shards(plan, opt, saved) if plan.shards else saved.optimizer
    if plan.own:
        states = find_saved(own, opt.param_groups)
        for p, adapter in zip(plan.own, plan.own_adapters, strict=True):
            tree = states[p][1]
            tree.update(mapped(tree, lambda _, t, a=adapter: a.own_heads(t) if t.dim() else t))  # type: ignore[misc]
    return own


def _state_of_heads(plan: Plan, opt: Optimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Of each parameter of this worker's own heads the tensors of its state, by path, for the heads of all workers."""
    if plan.workers is None or not plan.own:
        return {}
    mine = [{path: t for path, t in leaves(opt.state[p]) if t.dim()} for p in plan.own]
    return dict(zip(plan.own, gather_heads(mine, plan.own_adapters, plan.workers), strict=True))


@torch.no_grad()
def _state_of_shards(plan: Plan, opt: Optimizer, role: SaveRole) -> dict[int, State]:
    """By its number in the optimizer the state of every sharded parameter, as ``role`` says; every rank of a worker
    must call it."""
    found: dict[int, State] = {}
    for index, p, rule, shard in _sharded(plan, opt) if role != "none" else ():
        mine = opt.state[p]
        specs = shard_specs(rule, shard, mine, to_local(p)) if role == "sharded" else None
        if specs is not None:
            found[index] = mapped(mine, lambda path, t, s=specs: s[path].as_dtensor(t.contiguous()) if path in s else t)  # type: ignore[misc]
            continue
        full = consolidated_state(rule, shard, mine, to_local(p))
        if role == "sharded" and shard.ranks.rank != index % shard.ranks.count:
            found[index] = mapped(full, lambda _, t: t.to("meta"))  # another rank writes it
        elif role != "assist":
            found[index] = mapped(full, lambda _, t: t.cpu())
    return found


def _read_shards(plan: Plan, opt: Optimizer, saved: Checkpoint) -> dict[str, Any]:
    """``local_optimizer_state`` of a sharded model, heads aside."""
    assert plan.intra_worker is not None
    tree = saved.state["tree"]["optimizer"]
    paths = find_saved(unflatten(tree, _Itself()), opt.param_groups)
    specs: dict[str, ShardSpec] = {}
    coded: list[tuple[nn.Parameter, Rule, Shard]] = []
    for _, p, rule, shard in _sharded(plan, opt):
        found = shard_specs(rule, shard, opt.state[p], to_local(p))
        if found is None:
            coded.append((p, rule, shard))
        else:
            specs |= {_at(paths[p][1], path): spec for path, spec in found.items()}
    names = [name for name in saved.names("optimizer") if name.startswith("optimizer.")]
    own: dict[str, Any] = unflatten(tree, read_sharded(saved, "optimizer", names, specs, plan.intra_worker))
    states = find_saved(own, opt.param_groups)
    for p, rule, shard in coded:
        state = states[p][1]
        state.update(local_state(rule, shard, state, torch.empty_like(to_local(p), device="cpu")))
    return own


def _sharded(plan: Plan, opt: Optimizer) -> Iterator[tuple[int, nn.Parameter, Rule, Shard]]:
    """(number in the optimizer, parameter, its rule, its shard) of every sharded parameter that trains."""
    named = [
        (name, p, group["rule"])
        for group in opt.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]
    for index, (name, p, rule) in enumerate(named):
        if name in plan.shards:
            yield index, p, rule, plan.shards[name]


class _Itself(dict[str, Any]):
    """Gives for each path the path."""

    def __missing__(self, path: str) -> str:
        return path


def _at(tree: Any, path: str) -> Any:
    """What stands at a dotted path."""
    for key in path.split("."):
        tree = tree[key]
    return tree
