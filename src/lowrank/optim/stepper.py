"""How parameters are changed by their rules: in place, as many at once as the rule likes.

Plain parameters of one group step together, one shape after the other; alone step those under a rule of their own (on a
shard), those that are clipped, and large ones where the rule works through them a part at a time. A parameter narrower
than float32 is changed as a float32 copy and rounded back, bfloat16 stochastically.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank.distributed.shards import Shard, to_local
from lowrank.infra.seeds import generator, stable_seed
from lowrank.linalg import kernels
from lowrank.linalg.chunks import at_once
from lowrank.linalg.rounding import round_into_
from lowrank.optim.gradient_sync import clipped, dense
from lowrank.optim.pairs import PairRule
from lowrank.optim.rules import Rule, State
from lowrank.optim.stacks import alike

if TYPE_CHECKING:
    from lowrank.optim.optimizer import Optimizer

NARROW = (torch.bfloat16, torch.float16)


class Stepper:
    """Steps the parameters of an ``optimizer``, each in its place: (its number, its group). Final."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.place: dict[nn.Parameter, tuple[int, dict[str, Any]]] = {}
        self.rules: dict[nn.Parameter, Rule] = {}  # the group's, or what acts in its place on a shard
        self.shards: dict[nn.Parameter, Shard | None] = {}
        self.alone: set[nn.Parameter] = set()  # under a rule of their own, for a shard
        self.any_shard = False

    def step_group(self, group: dict[str, Any], held: dict[nn.Parameter, Tensor]) -> None:
        """Step every parameter of a group that has a gradient, or of which R = QᵀG is ``held``, which is taken out."""
        rule = group["rule"]
        if isinstance(rule, PairRule):
            for A, B in zip(group["params"][::2], group["params"][1::2], strict=True):
                if grads := {p: dense(p.grad) for p in (A, B) if p.grad is not None}:
                    self.step_pair(A, B, group, grads)
            return
        for p in [p for p in group["params"] if p in held] if held else ():
            self.step_projected(p, group, held.pop(p))
        ready = [p for p in group["params"] if p.grad is not None]
        if ready and self.optimizer.clip_per_layer is None and kernels.possible(ready[0]):
            ready = [p for p in ready if not self._step_fused(p, group, dense(p.grad))]
        together = [p for p in ready if p not in self.alone] if self.alone else ready
        if self.optimizer.clip_per_layer is not None:
            together = []
        large = {p for p in together if p.numel() > at_once(p)} if rule.divides else set()
        together = [p for p in together if p not in large] if large else together
        wide_ones = [p for p in together if p.dtype not in NARROW]
        self._step_together(wide_ones, group)
        if len(wide_ones) < len(together):  # widened a stack at a time, which is to stay small
            narrow = [p for p in together if p.dtype in NARROW]
            for at in alike(narrow):
                self._step_together([narrow[i] for i in at], group)
        for p in [p for p in ready if p in self.alone or p in large] if together else ready:
            self.step_one(p, group, dense(p.grad))

    def _step_together(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Step parameters, all of them narrow or none: those are widened to float32 and rounded back."""
        grads, states = [dense(p.grad) for p in params], [self.optimizer.state[p] for p in params]
        lr, decay = self.optimizer.rate_of(group), group["decay"]

        def step_all(targets: list[Tensor]) -> None:
            gs = [g if g.dtype is p.dtype else g.to(p.dtype) for p, g in zip(targets, grads, strict=True)]
            group["rule"].apply_(targets, gs, states, lr=lr, decay=decay)

        if params and params[0].dtype not in NARROW and not self.any_shard:
            group["rule"].apply_(params, grads, states, lr=lr, decay=decay)
        elif params:
            self._write(params, step_all)

    def step_one(self, p: nn.Parameter, group: dict[str, Any], g: Tensor) -> None:
        """Step one parameter, its gradient clipped on request."""
        if self.optimizer.clip_per_layer is not None:
            g = clipped(g, self.optimizer.clip_per_layer, self.shards[p])
        if kernels.possible(p) and self._step_fused(p, group, g):
            return
        rule, lr, decay = self.rules[p], self.optimizer.rate_of(group), group["decay"]

        def step_(targets: list[Tensor], grad: Tensor, state: State) -> None:
            rule.apply_(targets, [grad.to(targets[0].dtype)], [state], lr=lr, decay=decay)

        whole = p if self.shards[p] is None else to_local(p)
        noise = self._noise(p) if p.dtype in NARROW else None
        for part, grad, state in rule.pieces(whole, g, self.optimizer.state[p]):
            self._write([p], partial(step_, grad=grad, state=state), [part], noise)

    def _step_fused(self, p: nn.Parameter, group: dict[str, Any], g: Tensor) -> bool:
        """Step one parameter by a kernel, where its rule has chosen one."""
        if self.shards[p] is not None:
            return False
        lr, decay, state = self.optimizer.rate_of(group), group["decay"], self.optimizer.state[p]
        seed = (
            stable_seed("rounding", self.optimizer.seed, self.place[p][0]) & 0x7FFFFFFF
        )  # to which kernels add a step
        return self.rules[p].fused_(p, g, state, lr=lr, decay=decay, seed=seed)

    def step_pair(
        self, A: nn.Parameter, B: nn.Parameter, group: dict[str, Any], grads: dict[nn.Parameter, Tensor]
    ) -> None:
        """Step the factors of one adapter together; a gradient that is missing counts as zero."""
        rule, state, lr, decay = group["rule"], self.optimizer.state[A], self.optimizer.rate_of(group), group["decay"]
        g, h = (grads[p] if p in grads else torch.zeros_like(p) for p in (A, B))
        if self.optimizer.clip_per_layer is not None:
            g, h = (clipped(each, self.optimizer.clip_per_layer, None) for each in (g, h))

        def step_both(factors: list[Tensor]) -> None:
            a, b = factors
            rule.apply_((a, b), (g.to(a.dtype), h.to(b.dtype)), state, lr=lr, decay=decay)

        self._write([A, B], step_both)

    def _write(
        self,
        params: list[nn.Parameter],
        change_: Callable[[list[Tensor]], None],
        parts: list[Tensor] | None = None,
        noise: torch.Generator | None = None,
    ) -> None:
        """Change parameters, or ``parts`` of them, in place; narrower ones as float32 copies, rounded back, bfloat16
        stochastically (by ``noise``, which those of one parameter share)."""
        mine: list[Tensor] = parts or [p if self.shards[p] is None else to_local(p) for p in params]
        if all(t.dtype not in NARROW for t in mine):
            return change_(mine)
        targets = [t.float() if t.dtype in NARROW else t for t in mine]
        change_(targets)
        for p, here, target in zip(params, mine, targets, strict=True):
            if here is not target:
                round_into_(here, target, self._noise(p) if noise is None else noise)

    def _noise(self, p: nn.Parameter) -> torch.Generator:
        """The random stream that rounds ``p`` in the coming step."""
        shard, place = self.shards[p], self.place[p][0]
        keys = (place,) if shard is None else (place, shard.start)
        return generator(p.device, "rounding", self.optimizer.seed, *keys, self.optimizer.steps)

    def step_projected(self, p: nn.Parameter, group: dict[str, Any], r: Tensor) -> None:
        rule, state, lr, decay = self.rules[p], self.optimizer.state[p], self.optimizer.rate_of(group), group["decay"]
        self._write([p], lambda targets: rule.apply_projected_(targets[0], r, state, lr=lr, decay=decay))
