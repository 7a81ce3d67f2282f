"""The doctor for a model at hand: one real step on a copy, and what is silently wrong with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.doctor.faults import Fault, examine, untied
from lowrank.doctor.watch import Watch
from lowrank.infra.environment import available_memory
from lowrank.infra.progress import short_bytes
from lowrank.plan.measure import loss_of


def check(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> list[Fault]:
    """Take one training step on a copy of ``model`` and ``optimizer``, and say what is silently wrong.

    Nothing given is changed, random number generators included. The faults come first, then notes; ``print(*faults,
    sep="\\n")`` is what ``lowrank doctor`` prints.

    Args:
        model: any module, as it is about to be trained.
        optimizer: of torch or of this library, over its parameters.
        batch: what ``loss`` takes.
        loss: ``loss(model, batch)`` gives the scalar to go backward from; by default ``model(**batch).loss``.

    Raises:
        TypeError: a batch or model that the default loss cannot take.
        ValueError: no copy of the model fits beside it, or the optimizer steps within the backward pass, by hooks that
            a copy does not have (``lowrank doctor`` watches the script itself).
    """
    loss = loss or loss_of(batch)
    _refuse_too_large(model, optimizer)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]), torch.enable_grad():
        try:
            copied, stepping = copy.deepcopy((model, optimizer))
        except ValueError as error:
            raise ValueError(f"{error}; or watch the script instead: lowrank doctor SCRIPT") from error
        copied.train()
        stepping.zero_grad()
        with Watch() as watch:
            watch.model(copied)
            loss(copied, batch).backward()
            stepping.step()
            watch.settle()
    return [*untied(Watch(roots=[model])), *examine(watch)]  # a copy shares no memory that is not one parameter's


def _refuse_too_large(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A copy of the weights and the optimizer's state, the weights once more to compare with, and gradients."""
    held = [*model.parameters(), *model.buffers()]
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [t for each in optimizer.state.values() for t in each.values() if isinstance(t, Tensor)]
    needs = sum(t.nbytes for t in (*held, *state, *trained, *trained))
    free = available_memory(held[0].device) if held else None
    if free is not None and needs > free:
        raise ValueError(
            f"no copy of the model fits beside it: that needs {short_bytes(needs)}, and {short_bytes(free)} are free; "
            "watch the script instead (lowrank doctor SCRIPT), or check a smaller model of its kind"
        )
