"""A model's repeated blocks: found, left out, and computed again in the backward pass to save what they hold."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(model: nn.Module) -> nn.ModuleList | nn.Sequential | None:
    """The longest list of modules of one class and form; None where nothing repeats."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1]
    alike = [m for m in lists if next(m[0].parameters(), None) is not None and len({_form(block) for block in m}) == 1]
    return max(alike, key=len, default=None)


def checkpoint_activations_(model: nn.Module) -> None:
    """Let each repeated block keep its input alone, and compute the rest again in the backward pass (Chen et al., arXiv
    1604.06174). No number changes, dropout's included.

    Raises:
        ValueError: the model has no repeated blocks.
    """
    blocks = blocks_of(model)
    if blocks is None:
        raise ValueError(
            f"{type(model).__name__} has no list of like blocks whose activations could be computed again: leave "
            "--checkpoint-activations out"
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _form(block: nn.Module) -> tuple[object, ...]:
    return type(block), *((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters())
