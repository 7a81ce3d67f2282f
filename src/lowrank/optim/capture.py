"""Steps that a CUDA graph can hold: one launch in the place of thousands, where the host is what a step waits for.

    optimizer = plan.optimizer(lr=…, capturable=True)
    step = CapturedStep(optimizer)
    loss.backward(); step(); optimizer.zero_grad(set_to_none=False)     gradients stay where they are

What changes from step to step is on the device: learning rates in one tensor a group, counts of steps in the state.
What the host decides (clocks, schedules, merges) it does around the graph; and a step in which it has more to decide,
a refresh or the first, it makes as ever. ``check_capturable`` says at construction what no graph can hold.
"""

from __future__ import annotations

from typing import Any

import torch

from lowrank.optim.optimizer import Optimizer
from lowrank.optim.pairs import PairRule
from lowrank.optim.stepper import NARROW


def check_capturable(optimizer: Optimizer) -> None:
    """Raise ValueError, with what to do instead, unless every ordinary step of ``optimizer`` can be captured."""
    if optimizer.per_layer:
        raise ValueError("capturable=True is for steps at the end: per_layer=True steps inside the backward pass")
    for group in optimizer.param_groups:
        rule = group["rule"]
        why = "sees two parameters at once" if isinstance(rule, PairRule) else rule.refuses_capture
        if why:
            raise ValueError(f"capturable=True cannot hold for {rule!r}, which {why}; make it without capturable=True")
        for p in group["params"]:
            if p.dtype in NARROW:
                raise ValueError(
                    f"capturable=True cannot hold for {optimizer.name_of(p)} in {p.dtype}: it is rounded by random "
                    "numbers that the host seeds anew at each step; keep the weights in float32, and use autocast"
                )


class CapturedStep:
    """``optimizer.step()`` by a CUDA graph, wherever that is the same (module docstring); on a CPU just the step.

    Raises:
        ValueError: the optimizer was not made with ``capturable=True``.
        RuntimeError: when called, gradients that are not where they were when the step was captured.
    """

    def __init__(self, optimizer: Optimizer):
        if not optimizer.capturable:
            raise ValueError("a step can be captured if its optimizer was made with capturable=True")
        self.optimizer = optimizer
        self.graph: Any = None
        self._of: Any = None  # what the graph was captured of: where the gradients were, and which state
        self.replays = 0

    @torch.no_grad()
    def __call__(self) -> None:
        optimizer = self.optimizer
        if not optimizer.is_ordinary_step() or not self._on_cuda():
            optimizer.step()
            return
        optimizer.set_rates_()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        where = [None if p.grad is None else p.grad.data_ptr() for p in params]
        if self.graph is None or self._of[1] != optimizer.replaced:
            self._of = where, optimizer.replaced
            self.graph = self._captured()  # which runs the host's part of the step, and none of the device's
        elif self._of[0] != where:
            raise RuntimeError(
                "gradients are not where they were when the step was captured, so that the graph would read others: "
                "call optimizer.zero_grad(set_to_none=False), and run every layer in each step"
            )
        else:
            optimizer.advance_host_()
        self.graph.replay()
        self.replays += 1
        optimizer.complete_step_()

    def _on_cuda(self) -> bool:
        return all(p.is_cuda for group in self.optimizer.param_groups for p in group["params"])

    def _captured(self) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.optimizer.step_groups_()
        return graph
