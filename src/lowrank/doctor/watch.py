"""Watches one training step of any model by any optimizer, and keeps what its faults are read from (``faults``).

Only public hooks of torch are used, so that the step is the one that would have been without: forward hooks of all
modules, hooks on gradients, hooks around the steps of all optimizers. The weights before the step are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lowrank.infra.loaded_parameters import Origin, origin

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass
class Watched:
    """What a step did to one trained parameter.

    ``gradient`` is None where none came, else whether any number of it was not zero; ``lost`` the share of the numbers
    with a gradient that stayed as they were.
    """

    name: str
    parameter: nn.Parameter
    before: Tensor
    gradient: bool | None = None
    lost: float = 0.0
    _pushed: Tensor | None = None

    def on_gradient(self, gradient: Tensor) -> None:
        pushed = gradient != 0
        self.gradient = bool(self.gradient) or bool(pushed.any())
        if self.parameter.dtype in LOW_PRECISION:
            self._pushed = pushed if self._pushed is None else self._pushed | pushed

    def settle(self) -> None:
        """Compare with the weights before."""
        same = self.parameter.detach() == self.before
        pushed = torch.ones_like(same) if self._pushed is None else self._pushed
        self.lost = float((same & pushed).sum() / pushed.sum().clamp(min=1))


@dataclass
class Clip:
    """A call that clips gradients: how many of the tensors it was given had one, and whether they were still scaled."""

    with_gradient: int
    scaled: bool
    where: str | None = None


@dataclass
class Watch:
    """What one step showed.

    By id, ``origins`` tells of a root whether it was loaded before the step, ``rates`` at what rate a parameter was
    stepped; ``settings`` are the numbers of the script's variables by name, where there is a script; ``lines`` the
    script's lines at which something was made or called.
    """

    roots: list[nn.Module] = field(default_factory=list)
    origins: dict[int, Origin] = field(default_factory=dict)
    called: dict[int, nn.Module] = field(default_factory=dict)
    parameters: dict[int, Watched] = field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    stepped: set[int] = field(default_factory=set)
    rates: dict[int, float] = field(default_factory=dict)
    micro_batches: int = 0
    clips: list[Clip] = field(default_factory=list)
    settings: dict[str, float] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)
    before_forward: Callable[[], None] = lambda: None
    before_step: Callable[[], None] = lambda: None

    _depth: int = 0
    _hooks: list[Any] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self._hooks = [
            register_module_forward_pre_hook(self._entering),
            register_module_forward_hook(self._leaving, always_call=True),
            register_optimizer_step_pre_hook(self._stepping),
            register_optimizer_step_post_hook(self._stepped),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def model(self, root: nn.Module) -> None:
        """Watch the parameters of ``root``, named as in ``root.named_parameters()``."""
        if any(root is each for each in self.roots):
            return
        self.roots.append(root)
        self.origins[id(root)] = origin(root)
        for name, p in root.named_parameters():
            if p.requires_grad and id(p) not in self.parameters:
                watched = Watched(name, p, p.detach().clone())
                self.parameters[id(p)] = watched
                self._hooks.append(p.register_hook(watched.on_gradient))

    def settle(self) -> None:
        """Read what the step has changed."""
        for watched in self.parameters.values():
            watched.settle()

    def named(self) -> Mapping[str, nn.Parameter]:
        """Every parameter of the models by name, frozen ones too; the first name of one with several."""
        return {name: p for root in self.roots for name, p in root.named_parameters()}

    def modules(self) -> Iterable[tuple[str, nn.Module]]:
        return (pair for root in self.roots for pair in root.named_modules())

    def groups(self) -> Iterable[dict[str, Any]]:
        return (group for optimizer in self.optimizers for group in optimizer.param_groups)

    def _entering(self, module: nn.Module, inputs: object) -> None:
        self._depth += 1
        if not torch.is_grad_enabled():
            return
        self.called[id(module)] = module
        if self._depth == 1 and not _in_backward() and next(module.parameters(), None) is not None:
            self.before_forward()
            self.micro_batches += not self.stepped
            self.model(module)

    def _leaving(self, module: nn.Module, inputs: object, output: object) -> None:
        self._depth -= 1

    def _stepping(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if not any(optimizer is each for each in self.optimizers):
            self.optimizers.append(optimizer)
        self.before_step()
        for group in optimizer.param_groups:
            self.rates |= {id(p): float(group.get("lr", 1.0)) for p in group["params"]}

    def _stepped(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        self.stepped.add(id(optimizer))


def _in_backward() -> bool:
    """A checkpointed block is run again in the backward pass, which is no new step of its model."""
    return bool(torch._C._current_graph_task_id() != -1)
