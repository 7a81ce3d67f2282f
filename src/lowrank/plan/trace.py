"""One training step, counted: where its peak is, and what it is made of.

    watch_     hooks that tell a ``LiveBytes`` where a step is: embeddings, first and last block, head, and back
    Steps      runs steps of each kind: first, ordinary, refresh, merge, evaluation
    traced     counts them on fake tensors, of a model with few of its blocks, and says what all of them would take

A model's repeated blocks are the longest list of modules of one class with parameters of the same shapes. What is held
grows by the same amount with each of them, and the most in a backward pass is held at one of the two ends, so that two
models with 2 and 3 blocks tell of any number; where blocks differ, all are traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.layers import quantised_layers
from lowrank.distributed.shards import is_sharded, to_local
from lowrank.linalg.quantised_linear import held
from lowrank.models.blocks import blocks_of
from lowrank.optim.optimizer import Optimizer
from lowrank.optim.state import leaves
from lowrank.plan.flops import of_blocks
from lowrank.plan.live_bytes import (
    ACTIVATIONS,
    BASIS,
    FACTORS,
    GRADIENTS,
    KEPT,
    LOSS,
    MOMENTS,
    OTHER_STATE,
    WEIGHTS,
    WORKSPACE,
    Counts,
    LiveBytes,
    Peak,
)
from lowrank.plan.plan import Plan
from lowrank.plan.synchronisation import Synchroniser, consolidated_model


class Watched:
    """Tells ``live`` where a step of ``model`` is, by hooks on its repeated blocks and trained parameters; a context.

    They change no number and hold no memory: forward hooks name the block, and a hook on its output's gradient names
    the block that goes backward next.
    """

    def __init__(self, live: LiveBytes, model: nn.Module):
        self.live, self.model, self.going_back = live, model, False
        self.handles: list[Any] = []
        self._sharded = any(is_sharded(p) for p in model.parameters())

    def __enter__(self) -> Watched:
        blocks = list(blocks_of(self.model) or [])
        for i, block in enumerate(blocks):
            which = "first layer" if i == 0 else "last layer" if i == len(blocks) - 1 else "layers"
            self.handles += [
                block.register_forward_pre_hook(self._entering(which), with_kwargs=True),
                block.register_forward_hook(self._leaving(which, is_last=i == len(blocks) - 1)),
            ]
            self.handles.append(block.register_forward_pre_hook(self._gathered))
            for child in block.children():  # of a block that is computed again these alone are called
                self.handles += [
                    child.register_forward_pre_hook(self._again),
                    child.register_forward_hook(self._inside),
                ]
        for p in self.model.parameters():
            if p.requires_grad:
                self.handles.append(p.register_post_accumulate_grad_hook(self._gradient))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def forward(self) -> None:
        self.going_back = False
        self.live.at("forward of the embeddings", ACTIVATIONS)

    def backward(self) -> None:
        self.going_back = True
        self.live.at("backward of the head", WORKSPACE)

    def _entering(self, which: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.going_back:
                return
            self.live.at(f"forward of the {which}", ACTIVATIONS)
            if which == "first layer":
                self._when_back([*args, *kwargs.values()], "backward of the embeddings")

        return enter

    def _leaving(self, which: str, *, is_last: bool) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if self.going_back:
                return
            self._when_back(out if isinstance(out, (tuple, list)) else [out], f"backward of the {which}")
            if is_last:
                self.live.at("forward of the head", LOSS)

        return leave

    def _when_back(self, values: Sequence[Any], where: str) -> None:
        tensor = next((value for value in values if isinstance(value, Tensor)), None)
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(lambda gradient: self.live.at(where, WORKSPACE))

    def _gathered(self, module: nn.Module, args: object) -> None:
        """Of a sharded model, what has been put together for this block."""
        if self._sharded:
            self.live.hold_gathered(self.model.parameters())

    def _again(self, module: nn.Module, args: object) -> None:
        if self.going_back:
            self.live.kind = ACTIVATIONS

    def _inside(self, module: nn.Module, args: object, out: Any) -> None:
        if not self.going_back and isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(lambda gradient: setattr(self.live, "kind", WORKSPACE))

    def _gradient(self, p: Tensor) -> None:
        if p.grad is not None:
            self.live.hold([p.grad], GRADIENTS)


def hold_static(live: LiveBytes, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Count weights, factors, kept copies and optimizer state as what they are; adapters are known by their names."""
    parameters, buffers = list(model.named_parameters()), list(model.named_buffers())
    live.hold([p for name, p in parameters if not _is_adapter(name)], WEIGHTS)
    live.hold([b for name, b in buffers if not _is_adapter(name)], WEIGHTS)
    live.hold([t for layer in quantised_layers(model).values() for t in held(layer)], WEIGHTS)
    live.hold([p for name, p in parameters if _is_adapter(name)], FACTORS)
    live.hold([b for name, b in buffers if _is_adapter(name)], KEPT)
    synchroniser = getattr(optimizer, "synchroniser", None)
    live.hold(synchroniser.reference_copies if isinstance(synchroniser, Synchroniser) else (), KEPT)
    hold_state(live, optimizer)


def _is_adapter(name: str) -> bool:
    return ".adapters." in name or ".lora_" in name


def hold_state(live: LiveBytes, optimizer: torch.optim.Optimizer | None) -> None:
    """Count what an optimizer keeps, by kind."""
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        states = [v for state in optimizer.state.values() for v in state.values()]
        live.hold([t for t in states if isinstance(t, Tensor)], MOMENTS)
        return
    for state in optimizer.state.values():
        for path, tensor in leaves(state):
            live.hold([tensor], kind_of_state(path))


def kind_of_state(path: str) -> str:
    """What a tensor of a rule's state is, by its dotted name."""
    words = path.split(".")
    if "basis" in words:
        return BASIS
    return MOMENTS if any(word.startswith(("exp_avg", "momentum")) for word in words) else OTHER_STATE


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What takes a step: a model and its optimizer, ``loss``, which goes forward on a batch, and what becomes of the
    gradients before the optimizer sees them: their norm taken, and limited."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    plan: Plan | None = None
    accumulate: int = 1
    norm: bool = True
    limit: float | None = None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    def finish(self) -> None:
        """What follows the backward passes."""
        if self.norm:
            gradients = [to_local(p.grad) for p in self.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if self.limit is not None:
                torch._foreach_mul_(gradients, (self.limit / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Steps:
    """Runs the steps of a setup under a mode that counts (module docstring)."""

    def __init__(self, live: LiveBytes, setup: Setup):
        self.live, self.setup, self.watched = live, setup, Watched(live, setup.model)
        if getattr(setup.optimizer, "per_layer", False):
            self._mark_steps(setup.optimizer)

    def _mark_steps(self, optimizer: Any) -> None:
        """Have it said when the optimizer steps a layer inside the backward pass."""
        complete, live = optimizer.layers.complete, self.live

        def marked(p: nn.Parameter) -> None:
            live.stepping = True
            complete(p)
            live.stepping = False

        optimizer.layers.complete = marked

    def step(self, kind: str) -> None:
        setup, live = self.setup, self.live
        live.step = kind
        for _ in range(setup.accumulate):
            self.watched.forward()
            with setup.autocast():
                loss = setup.loss()
            self.watched.backward()
            loss.backward()
            del loss
        live.at("the optimizer's step", WORKSPACE)
        setup.finish()
        hold_state(live, setup.optimizer)

    def refresh(self) -> None:
        """A step in which every basis is refreshed from the one before."""
        for state in self.setup.optimizer.state.values():
            for path, tensor in leaves(state):
                if path.rpartition(".")[2] == "due":
                    tensor.fill_(0)
        self.step("refresh")

    def merge(self) -> None:
        assert self.setup.plan is not None
        assert isinstance(self.setup.optimizer, Optimizer)
        self.live.at("the merge", WORKSPACE, step="merge")
        synchroniser = self.setup.plan.synchroniser(self.setup.optimizer)
        synchroniser.synchronise_(merging=True, averaging=bool(synchroniser.local), largest=True)

    def evaluate(self) -> None:
        self.setup.model.eval()
        self.watched.going_back = False
        self.live.at("forward of the embeddings", ACTIVATIONS, step="evaluation")
        with self._consolidated(), torch.no_grad(), self.setup.autocast():
            self.setup.loss()
        self.setup.model.train()

    def _consolidated(self) -> AbstractContextManager[None]:
        plan, optimizer = self.setup.plan, self.setup.optimizer
        if plan is None or not isinstance(optimizer, Optimizer):
            return nullcontext()
        return consolidated_model(plan, optimizer)

    def all(self) -> None:
        """Every kind of step that the setup has."""
        with self.watched:
            self.step("first")
            projects = any(rule.projects for rule in getattr(self.setup.optimizer, "_rules", {}).values())
            if projects:
                self.step("ordinary")
                self.refresh()
            if self.setup.plan is not None and self.setup.plan.method.merge is not None:
                self.merge()
                self.step("ordinary")
            self.evaluate()


def extrapolated(few: Counts, more: Counts, blocks: tuple[int, int, int]) -> Counts:
    """What a model of ``blocks[2]`` blocks takes, from what the same with ``blocks[0]`` and ``blocks[1]`` did."""
    a, b, n = blocks

    def line(x: int, y: int) -> int:
        return y + (y - x) * (n - b) // (b - a)

    found = Counts()
    for place, peak in more.peaks.items():
        before = few.peaks.get(place)
        if before is None:
            continue
        names = dict.fromkeys((*peak.parts, *before.parts))
        parts = {name: line(before.parts.get(name, 0), peak.parts.get(name, 0)) for name in names}
        total, rounding = line(before.total, peak.total), line(before.rounding, peak.rounding)
        found.peaks[place] = Peak(total, parts, rounding)
    found.work = of_blocks(few.work, more.work, blocks)
    return found
