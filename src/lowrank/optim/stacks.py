"""Parameters of one shape, stepped together: what a step costs the host is paid once a shape and not once a matrix.

Rules batch over leading dimensions, so that N parameters with their states, joined along a new first dimension, step as
one. A stack is at most ``LARGEST`` numbers, so that joining costs little memory and only matrices that are too small to
keep a processor busy are joined; a larger one is a stack by itself, of views.

What a parameter becomes must not depend on which others it is joined with (law 6: a step in a hook joins it with none).
So all that is done to a stack is element-wise or a norm of each matrix; products are made a matrix at a time, on
memory that begins at a multiple of 64 bytes, since BLAS sums in an order that depends on it.

Shape legend: N parameters (..., rows, cols) → a stack (N, ..., rows, cols);  a scalar of a state → (N, 1, ..., 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LARGEST, LARGEST_OFF_CPU = 1 << 18, 1 << 22  # numbers in a stack: 1 and 16 MiB of float32
ALIGNED = 64  # bytes


def alike(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The numbers of those tensors that may be joined, a stack at a time; each is in one, vectors
    and numbers alone."""
    found: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        found.setdefault((t.shape, t.dtype, t.device), []).append(i)
    for (shape, _, device), members in found.items():
        largest = LARGEST if device.type == "cpu" else LARGEST_OFF_CPU
        most = max(1, largest // max(1, shape.numel())) if len(shape) > 1 else 1  # blocks of codes never cross matrices
        yield from (members[i : i + most] for i in range(0, len(members), most))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as a stack (N, ...): a view of one alone, a copy of several."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def apart(stack: Tensor) -> list[Tensor]:
    """The N members of a stack for BLAS: views where all of them begin at a multiple of 64 bytes, else copies."""
    members = list(stack.unbind())
    if len(members) == 1 or stack.stride(0) * stack.element_size() % ALIGNED == 0:
        return members
    return [member.clone() for member in members]


def copied(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A copy of tensors of one shape as a stack, and its members, views for BLAS to change."""
    shape, size = tensors[0].shape, tensors[0].numel()
    step = ALIGNED // tensors[0].element_size()
    room = tensors[0].new_empty(len(tensors), math.ceil(size / step) * step)
    stack = room[:, :size].view(len(tensors), *shape)
    torch.stack(list(tensors), out=stack)
    return stack, list(stack.unbind())


def add_one_(numbers: list[Tensor]) -> None:
    """Count on, in many numbers of one dtype and device."""
    if numbers[0].is_cpu:  # where a list of ones costs a quarter of what one does
        torch._foreach_add_(numbers, [torch.ones((), dtype=numbers[0].dtype)] * len(numbers))
    else:  # where a tensor would be read back
        torch._foreach_add_(numbers, 1)


@contextmanager
def joined_states(states: Sequence[Any], dims: int) -> Iterator[Any]:
    """N states of one form as one, whose changes are written back: leaves (N, ...), scalars (N, 1, ..., 1).

    Args:
        states: of parameters of one shape under one rule.
        dims: how many dimensions of size 1 a scalar gets.
    """
    paths: list[tuple[list[Tensor], Tensor]] = []
    yield _joined(states, dims, paths)
    for targets, stack in paths:
        torch.unbind_copy(stack, out=targets)


def _joined(states: Sequence[Any], dims: int, paths: list[tuple[list[Tensor], Tensor]]) -> dict[str, Any]:
    """The joined state; ``paths`` gets each list of tensors and the stack to be written back to it."""
    whole: dict[str, Any] = {}
    for key, first in states[0].items():
        every = [state[key] for state in states]
        if isinstance(first, dict):
            whole[key] = _joined(every, dims, paths)
            continue
        stack = joined(every)
        if len(every) > 1:
            paths.append((every, stack))
        whole[key] = stack if first.dim() else stack.view(-1, *(1,) * dims)
    return whole
