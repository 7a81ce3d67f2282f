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
from lowrank.linalg.quantised_linear import held
from lowrank.models.blocks import blocks_of
from lowrank.optim.optimizer import Optimizer
from lowrank.optim.state import leaves
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
from lowrank.plan.plan import Plan, merge_


class Watched:
    """Tells ``live`` where a step of ``model`` is, by hooks on its repeated blocks and trained parameters; a context.

    They change no number and hold no memory: forward hooks name the block, and a hook on its output's gradient names
    the block that goes backward next.
    """

    def __init__(self, live: LiveBytes, model: nn.Module):
        self.live, self.model, self.going_back = live, model, False
        self.handles: list[Any] = []

    def __enter__(self) -> Watched:
        blocks = list(blocks_of(self.model) or [])
        for i, block in enumerate(blocks):
            which = "first layer" if i == 0 else "last layer" if i == len(blocks) - 1 else "layers"
            self.handles += [
                block.register_forward_pre_hook(self._entering(which), with_kwargs=True),
                block.register_forward_hook(self._leaving(which, is_last=i == len(blocks) - 1)),
            ]
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

    def _again(self, module: nn.Module, args: object) -> None:
        if self.going_back:
            self.live.kind = ACTIVATIONS

    def _inside(self, module: nn.Module, args: object, out: Any) -> None:
        if not self.going_back and isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(self._no_longer_again)

    def _no_longer_again(self, gradient: Tensor) -> None:
        self.live.kind = WORKSPACE

    def _gradient(self, p: Tensor) -> None:
        if p.grad is not None:
            self.live.hold([_local(p.grad)], GRADIENTS)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def hold_static(live: LiveBytes, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Count weights, factors, kept copies and optimizer state as what they are; adapters are known by their names."""
    parameters, buffers = list(model.named_parameters()), list(model.named_buffers())
    live.hold([p for name, p in parameters if not _is_adapter(name)], WEIGHTS)
    live.hold([b for name, b in buffers if not _is_adapter(name)], WEIGHTS)
    live.hold([t for layer in quantised_layers(model).values() for t in held(layer)], WEIGHTS)
    live.hold([p for name, p in parameters if _is_adapter(name)], FACTORS)
    live.hold([b for name, b in buffers if _is_adapter(name)], KEPT)
    hold_state(live, optimizer)


def _is_adapter(name: str) -> bool:
    return ".adapters." in name or ".lora_" in name


def hold_state(live: LiveBytes, optimizer: torch.optim.Optimizer | None) -> None:
    """Count what an optimizer keeps, by kind."""
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        states = [v for state in optimizer.state.values() for v in state.values()]
        live.hold([_local(t) for t in states if isinstance(t, Tensor)], MOMENTS)
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
    """What takes a step: a model and its optimizer, and ``loss``, which goes forward on a batch of the given number."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    plan: Plan | None = None
    accumulate: int = 1
    norm: bool = True
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext


class Steps:
    """Runs the steps of a setup under a mode that counts (module docstring)."""

    def __init__(self, live: LiveBytes, setup: Setup):
        self.live, self.setup, self.watched = live, setup, Watched(live, setup.model)

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
        if setup.norm:
            torch.nn.utils.get_total_norm([p.grad for p in setup.model.parameters() if p.grad is not None])
        setup.optimizer.step()
        setup.optimizer.zero_grad(set_to_none=True)
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
        merge_(self.setup.plan, self.setup.optimizer)

    def evaluate(self) -> None:
        self.setup.model.eval()
        self.watched.going_back = False
        self.live.at("forward of the embeddings", ACTIVATIONS, step="evaluation")
        with torch.no_grad(), self.setup.autocast():
            self.setup.loss()
        self.setup.model.train()

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
    return found
