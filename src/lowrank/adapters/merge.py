"""When adapters fold into the weights.

At a boundary W becomes merged(W), the mean over the heads, and every adapter settles: it keeps its factors and
subtracts them from then on (LTE's reset-less merge, arXiv 2402.16828), or starts anew (ReLoRA, arXiv 2307.05695).
Either way the mean model is the same before and after.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lowrank.adapters.adapter import check_whole
from lowrank.adapters.layer import adapted_layers, fold_, replace


@dataclass(frozen=True)
class Merge:
    """Fold the adapters into the weights every ``merge_every`` steps.

    Args:
        merge_every: steps between merges, the paper's T.
        keep: go on with the factors, subtracting what was merged (reset-less), instead of restarting them.
        forget: share of the factors' moments zeroed at a merge, where the first moment is smallest; 1 starts them anew.

    Raises:
        ValueError: a ``merge_every`` that is not a whole number of at least 1, or ``forget`` outside [0, 1].
    """

    merge_every: int
    keep: bool = True
    forget: float = 0.0

    def __post_init__(self) -> None:
        check_whole("merge_every", self.merge_every)
        if not 0.0 <= self.forget <= 1.0:
            raise ValueError(f"forget={self.forget} must lie in [0, 1]")

    def due(self, steps: int) -> bool:
        """Whether a merge is due after ``steps`` completed steps.

        >>> [n for n in range(7) if Merge(3).due(n)]
        [3, 6]
        """
        return steps > 0 and steps % self.merge_every == 0


def merge_adapters_(model: nn.Module) -> None:
    """Fold every adapter of ``model`` into its weights now, and let it settle.

    Raises:
        FloatingPointError: an adapter holds numbers that are not finite; nothing was merged.
    """
    for name, layer in adapted_layers(model):
        if not all(p.isfinite().all() for p in layer.adapters.parameters()):
            raise FloatingPointError(
                f"the adapters of {name} hold numbers that are not finite, and nothing was merged. Resume from the "
                "last checkpoint with a smaller learning rate"
            )
    done: set[int] = set()
    for _, layer in adapted_layers(model):
        fold_(layer, done)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """``model`` with every adapter folded in and the original layers back: a plain model with its own state-dict keys.

    In place, and returned. Parameters that were frozen stay frozen; call ``model.requires_grad_(True)`` to train it
    further.
    """
    merge_adapters_(model)
    for name, layer in list(adapted_layers(model)):
        replace(model, name, layer.original())
    return model
