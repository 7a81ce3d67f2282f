"""Steps inside the backward pass: each parameter as soon as its gradient is complete, which is then freed.

With several micro-batches in a step the last one that reaches a parameter steps it; between them a rule whose coming
step needs only R = QᵀG keeps that. The two factors of an adapter under one rule step when the second gradient has come.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank.distributed.collectives import Group
from lowrank.optim.gradient_sync import agree_bases_, dense
from lowrank.optim.pairs import PairRule
from lowrank.optim.scaler import LayerScaler
from lowrank.optim.stepper import Stepper

if TYPE_CHECKING:
    from lowrank.optim.optimizer import Optimizer


class LayerSteps:
    """What the hooks of an ``optimizer`` call, and what they leave to its ``step()``. Final.

    Args:
        optimizer: whose parameters ``stepper`` changes.
        held: by parameter, sums R = QᵀG of the micro-batches so far.
        scaler: of the loss, where there is one.
        summed, agreed: as the optimizer has them.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        stepper: Stepper,
        held: dict[nn.Parameter, Tensor],
        scaler: LayerScaler | None,
        summed: Mapping[nn.Parameter, Group],
        agreed: Mapping[nn.Parameter, Group],
    ):
        self.optimizer, self.stepper, self.held, self.scaler = optimizer, stepper, held, scaler
        self.summed, self.agreed = summed, agreed
        self.waiting: dict[nn.Parameter, int] = {}  # micro-batches that have reached a parameter
        self.stepped: set[nn.Parameter] = set()
        self._halves: dict[nn.Parameter, dict[nn.Parameter, Tensor]] = {}  # A -> the one gradient of its pair

    @torch.no_grad()
    def on_gradient(self, p: nn.Parameter) -> None:
        """The hook: the gradient of ``p`` for one micro-batch is complete."""
        optimizer = self.optimizer
        if p.grad is None:
            raise RuntimeError(
                f"the gradient of {optimizer.name_of(p)} was taken by another hook before the step: only one can "
                "free it"
            )
        if p in self.stepped:
            raise RuntimeError(
                f"{optimizer.name_of(p)} was stepped by an earlier backward pass of this step already; call step() "
                f"after every {optimizer.accumulate} backward passes, or make the optimizer with the accumulate= of "
                "your loop"
            )
        count = self.waiting[p] = self.waiting.get(p, 0) + 1
        if optimizer.accumulate > 1 and (small := optimizer.project(p, dense(p.grad))) is not None:
            self.held[p] = self.held[p].add_(small) if p in self.held else small
            p.grad = None
        if count == optimizer.accumulate:
            self.complete(p)

    def complete(self, p: nn.Parameter) -> None:
        """Every micro-batch that reaches this parameter has done so: step it, and free its gradient."""
        group = self.stepper.place[p][1]
        del self.waiting[p]
        self.stepped.add(p)
        projected = p in self.held
        g: Tensor | None = self.held.pop(p) if projected else dense(p.grad)
        p.grad = None
        if self.scaler is not None and g is not None:
            g = self.scaler.unscaled(g)
        if g is None:
            return
        if p in self.summed:
            if not projected and (small := self.optimizer.project(p, g)) is not None:
                g, projected = small, True
            self.summed[p].sum_([g])
        if projected:
            self.stepper.step_projected(p, group, g)
        elif isinstance(group["rule"], PairRule):
            A, B = self._pair_of(p, group)
            grads = self._halves.setdefault(A, {})
            grads[p] = g
            if len(grads) == 2:
                self.stepper.step_pair(A, B, group, self._halves.pop(A))
        else:
            if self.stepper.shards[p] is None:  # of a sharded parameter no basis is shared by heads
                p.grad = g
                agree_bases_([p], self.stepper.rules, self.optimizer.state, self.agreed)
                p.grad = None
            self.stepper.step_one(p, group, g)

    @staticmethod
    def _pair_of(p: nn.Parameter, group: dict[str, Any]) -> tuple[nn.Parameter, nn.Parameter]:
        """(A, B) of which ``p`` is one."""
        at = next(i for i, q in enumerate(group["params"]) if q is p) // 2 * 2
        return group["params"][at], group["params"][at + 1]

    def finish(self) -> None:
        """What is left to ``step()``: parameters that not every micro-batch reached, and the scaler.

        Raises:
            RuntimeError: fewer backward passes than ``accumulate``.
        """
        if self.stepped:  # so K backward passes have run; parameters still waiting were not reached by all of them
            for p in list(self.waiting):
                self.complete(p)
            for A, grads in self._halves.items():  # whose other factor got no gradient
                group = self.stepper.place[A][1]
                self.stepper.step_pair(*self._pair_of(A, group), group, grads)
            self._halves.clear()
        if self.waiting:
            first, count = next(iter(self.waiting.items()))
            raise RuntimeError(
                f"step() was called after {count} of accumulate={self.optimizer.accumulate} backward passes (seen at "
                f"{self.optimizer.name_of(first)}); run all of them first, or make the optimizer with your loop's "
                "accumulate="
            )
        if not self.stepped:
            warnings.warn("step() was called without a backward pass: nothing was updated", stacklevel=3)
        self.stepped.clear()
        if self.scaler is not None:
            self.scaler.finish()

    def drop(self) -> None:
        """Forget the micro-batches of an unfinished step."""
        self.waiting.clear()
        self._halves.clear()
        self.held.clear()
