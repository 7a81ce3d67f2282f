"""When adapters are merged into the weights.

At a boundary W becomes merged(W), the mean over the heads, and every adapter settles: it keeps its factors and
subtracts them from then on (LTE's reset-less merge, arXiv 2402.16828), or starts anew (ReLoRA, arXiv 2307.05695).
Either way the mean model is the same before and after.

On request an outer optimizer takes the step instead (DiLoCo, arXiv 2311.08105: SGD with Nesterov momentum on the change
U = merged(W) − W, which is minus its outer gradient):

    M ← μ·M + U,   W ← W + outer_lr·(U + μ·M)

At outer_lr 1 and μ = 0 that is the plain merge. M is one float32 matrix per adapted matrix, a buffer of the adapter.

``exchange``, ``weigh``, ``overlap`` and ``fragments`` are for several workers (``merge_across_workers``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lowrank.adapters.adapter import Adapter
from lowrank.adapters.compression import FEEDBACK, Compression
from lowrank.adapters.fragments import due
from lowrank.adapters.layers import AdaptedQuantised, adapted_layers, dequantise_, merge_layer_, replace
from lowrank.adapters.split_adapter import SplitAdapter
from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.shards import is_sharded, unsharded_parameter
from lowrank.infra.checks import check_choice, check_integer
from lowrank.linalg.rounding import wide

Weigh = Literal["equal", "tokens", "steps", "seconds"]


@dataclass(frozen=True)
class Merge:
    """Merge the adapters into the weights every ``merge_every`` steps.

    Args:
        merge_every: steps between merges, the paper's T.
        keep: go on with the factors, subtracting what was merged (reset-less), instead of restarting them.
        forget: share of the factors' moments zeroed at a merge, where the first moment is smallest; 1 starts them anew.
        outer_lr, outer_momentum: of the outer optimizer's step (module docstring).
        exchange: what travels between ranks, at merges and at averages of the rest: numbers as they are, or rounded
            (``compression``).
        weigh: what a rank's heads weigh in the mean, and its local rest: the same, or by what the rank has done since
            the last: tokens seen (images, where it learns images), steps, or seconds of training.
        overlap: what is sent at one merge arrives at the next, while training goes on.
        fragments: into how many groups the matrices are divided, which merge at different steps of the interval
            (``fragments``); a rest that trains locally is averaged by so many shares of each parameter's rows.

    Raises:
        ValueError: a number out of its range, an unknown word, or ``overlap``, ``exchange`` or ``fragments`` with what
            they cannot go with.
    """

    merge_every: int
    keep: bool = True
    forget: float = 0.0
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    exchange: Compression = "float32"
    weigh: Weigh = "equal"
    overlap: bool = False
    fragments: int = 1

    def __post_init__(self) -> None:
        check_integer("merge_every", self.merge_every)
        if not 0.0 <= self.forget <= 1.0:
            raise ValueError(f"forget={self.forget} must lie in [0, 1]")
        if not 0.0 < self.outer_lr < float("inf"):
            raise ValueError(f"outer_lr={self.outer_lr} must be above 0 and finite: at 0 merges would add nothing")
        if not 0.0 <= self.outer_momentum < 1.0:
            raise ValueError(f"outer_momentum={self.outer_momentum} must lie in [0, 1)")
        check_integer("fragments", self.fragments)
        if self.fragments > self.merge_every:
            raise ValueError(
                f"fragments={self.fragments} are merged each at a step of its own, and merge_every={self.merge_every} "
                f"has no more: use at most {self.merge_every} fragments, or a longer interval"
            )
        check_choice("exchange", self.exchange, Compression)
        check_choice("weigh", self.weigh, Weigh)
        if self.exchange in FEEDBACK and not self.keep:
            raise ValueError(
                f"exchange={self.exchange!r} leaves much out of each merge, which the heads keep to send it later, and "
                "keep=False restarts them: use keep=True, or exchange='int8'"
            )
        if self.overlap and not self.keep:
            raise ValueError(
                "overlap=True goes on with factors that are in flight, and keep=False restarts them: use keep=True, "
                "or overlap=False"
            )
        if self.fragments > 1 and self.weigh != "equal":
            raise ValueError(
                f"weigh={self.weigh!r} counts what was done since the last merge, and fragments={self.fragments} have "
                "different last ones: use weigh='equal', or fragments=1"
            )
        if self.overlap and self.weigh != "equal":
            raise ValueError(
                f"weigh={self.weigh!r} is lost where a run resumes while a merge is in flight (overlap=True): use "
                "weigh='equal', or overlap=False"
            )

    def prepare_(self, adapter: Adapter, W: Tensor) -> None:
        """Give an adapter on W (out, in) what the outer optimizer keeps, and a place for what is in flight.

        Raises:
            ValueError: fragments= for other adapters than heads that split the batch, overlap= for others than LoRA's.
        """
        splits = isinstance(adapter, SplitAdapter) and adapter.split
        kind = type(adapter).__name__
        if self.overlap and not (splits and adapter.overlaps):
            raise ValueError(
                f"overlap=True is for LoRA heads that split the batch (lte), not for {kind}: use overlap=False"
            )
        if self.fragments > 1 and not splits:
            raise ValueError(
                f"fragments={self.fragments} is for heads that split the batch (lte, diloco), not for {kind}: "
                "use fragments=1"
            )
        if self.overlap and isinstance(adapter, SplitAdapter):
            adapter.prepare_overlap_()
        if self.outer_momentum:
            adapter.register_buffer("momentum", torch.zeros_like(W, dtype=wide(W.dtype)))

    def step(self, W: Tensor, merged: Tensor, adapter: Adapter) -> Tensor:
        """Where W (wide) goes when its adapters say ``merged``; moves the adapter's momentum on."""
        if self.outer_lr == 1.0 and not self.outer_momentum:
            return merged
        change = merged - W
        if self.outer_momentum:
            momentum = adapter.get_buffer("momentum").mul_(self.outer_momentum).add_(change)
            change = change.add_(momentum, alpha=self.outer_momentum)
        return change.mul_(self.outer_lr).add_(W)

    def check_steps(self, steps: int) -> None:
        """Raise ValueError where a run of so many steps would never merge."""
        if self.merge_every > steps:
            raise ValueError(
                f"merge_every={self.merge_every} is longer than the run of {steps} steps: nothing would ever merge; "
                f"use at most {steps}"
            )
        if self.overlap and 2 * self.merge_every > steps:
            raise ValueError(
                f"overlap=True merges at step {2 * self.merge_every} what was sent at step {self.merge_every}, and the "
                f"run has {steps} steps: use merge_every of at most {steps // 2}, or overlap=False"
            )

    def due(self, steps: int) -> bool:
        """Whether a merge, of a fragment where there are several, is due after ``steps`` completed steps.

        >>> tuple(n for n in range(7) if Merge(3).due(n))
        (3, 6)
        """
        return due(steps, self.merge_every, self.fragments) is not None


def merge_adapters_(
    model: nn.Module,
    merge: Merge | None = None,
    ranks: ProcessGroup | None = None,
    but: Collection[Adapter] = (),
) -> None:
    """Merge every adapter of ``model`` ``but`` some into its weights now, and let it settle; by ``merge``'s outer step
    if given.

    A weight that is sharded over ``ranks`` is unsharded for the moment, one layer at a time: DoRA's norms, transposed
    weights and the noise of rounding are then those of one process.

    Raises:
        FloatingPointError: an adapter holds numbers that are not finite; nothing was merged.
        ValueError: a weight is quantised.
    """
    for name, layer in adapted_layers(model):
        if isinstance(layer, AdaptedQuantised):
            raise ValueError(f"{name} is quantised and stays as it is: merge_and_unload makes a plain model of it")
        if not all(p.isfinite().all() for p in layer.adapters.parameters()):
            raise FloatingPointError(
                f"the adapters of {name} hold numbers that are not finite, and nothing was merged. Resume from the "
                "last checkpoint with a smaller learning rate"
            )
    done = {id(adapter) for adapter in but}
    for _, layer in adapted_layers(model):
        if all(id(adapter) in done for adapter in layer.adapters.values()):
            continue
        with unsharded_parameter(layer, "weight", ranks):
            merge_layer_(layer, done, merge)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """``model`` with every adapter merged and the original layers back: a plain model with its own state-dict keys.

    In place, and returned. Parameters that were frozen stay frozen; call ``model.requires_grad_(True)`` to train it
    further. Quantised layers become plain ones, with the weights that their codes say.
    """
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            "the model is sharded over several processes: unload it in one, from a checkpoint (lowrank export)"
        )
    merge_adapters_(dequantise_(model))
    for name, layer in list(adapted_layers(model)):
        replace(model, name, layer.original())
    return model
