"""The work of a step: the operations that it is made of, counted while its memory is (``live_bytes``).

    operations   floating-point ones: torch's formulae for products (``torch.utils.flop_counter``); of a decomposition
                 rows · columns · the shorter side
    bytes        of all tensors read and written; a view is neither, and a look-up reads what it gives
    calls        of kernels, each of which costs something by itself

They are kept by place (kind of step, part of it) and by kind of operation. All three grow by the same amount with each
of a model's blocks, as memory does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

FORWARD, BACKWARD, AGAIN, STEP = "forward", "backward", "again", "step"
PARTS = (FORWARD, BACKWARD, AGAIN, STEP)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
JOINED = -1  # the size of large operations inside the optimizer, which join more tensors the more there are
SMALL, LARGEST = 1 << 14, 9
FRESH = 32 << 20  # glibc maps blocks above this size anew, whatever was freed before
_LOOK_UPS = ("embedding", "index_select", "index", "gather")
_DECOMPOSITIONS = ("linalg_qr", "_linalg_svd", "_linalg_eigh", "linalg_cholesky_ex", "linalg_solve_triangular")


@dataclass(frozen=True)
class Kind:
    """A kind of operation: its name, the dtype of its numbers, and the class of its size: of bytes in powers of 4, from
    16 KiB, or ``JOINED``; of a product its shortest side in powers of 2, while the name says whether that is the one
    that is summed over."""

    name: str
    dtype: str
    size: int = JOINED

    @property
    def is_product(self) -> bool:
        return self.name.startswith(("mm", "bmm"))


@dataclass
class Amount:
    """How much of one kind: kernels called, bytes moved, floating-point operations, and bytes of memory that an
    allocator fetches from the system each time."""

    calls: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0
    fresh: float = 0.0

    def add(self, other: Amount, times: float = 1.0) -> None:
        self.calls += times * other.calls
        self.bytes += times * other.bytes
        self.flops += times * other.flops
        self.fresh += times * other.fresh


@dataclass
class Work:
    """What a step does, by place: (kind of step, one of ``PARTS``)."""

    places: dict[tuple[str, str], dict[Kind, Amount]] = field(default_factory=dict)

    def add(self, place: tuple[str, str], kind: Kind, amount: Amount, times: float = 1.0) -> None:
        self.places.setdefault(place, {}).setdefault(kind, Amount()).add(amount, times)

    def at(self, step: str, part: str) -> Mapping[Kind, Amount]:
        return self.places.get((step, part), {})

    def total(self, step: str, part: str) -> Amount:
        found = Amount()
        for amount in self.at(step, part).values():
            found.add(amount)
        return found


def of_blocks(few: Work, more: Work, blocks: tuple[int, int, int]) -> Work:
    """The work of a model of ``blocks[2]`` blocks, from that of the same with ``blocks[0]`` and ``blocks[1]``."""
    a, b, n = blocks
    slope = (n - b) / (b - a)
    found = Work()
    for work, times in ((more, 1 + slope), (few, -slope)):
        for place, kinds in work.places.items():
            for kind, amount in kinds.items():
                found.add(place, kind, amount, times)
    return found


def described(func: Any, args: Any, kwargs: Mapping[str, Any], out: Any, *, joined: bool) -> tuple[Kind, Amount] | None:
    """What one operation of torch is and does; None of one that does nothing. ``joined``: inside the optimizer."""
    if func.namespace in ("c10d", "prim"):  # "prim": a tensor without numbers is asked for its device by such a call
        return None
    name = func._schema.name.partition("::")[2]
    read = {option: value for option, value in kwargs.items() if option != "out"}
    inputs = [t for t in tree_iter((args, read)) if isinstance(t, Tensor)]
    outputs = [t for t in tree_iter(out) if isinstance(t, Tensor)]
    changed = [t for at in _changed(func) if at < len(args) for t in tree_iter(args[at]) if isinstance(t, Tensor)]
    changed += [t for t in tree_iter(kwargs.get("out")) if isinstance(t, Tensor)]
    moved, fresh = _bytes(name, inputs, outputs, changed)
    flops = _flops(name, func, args, kwargs, out, inputs)
    dtype = next((t.dtype for t in (*inputs, *outputs) if t.is_floating_point()), torch.int64)
    text = str(dtype).removeprefix("torch.")
    if name.rstrip("_") in PRODUCTS:
        (rows, inner), columns = inputs[-2].shape[-2:], inputs[-1].shape[-1]
        shortest = min(rows, inner, columns)
        name = f"{'bmm' if inputs[-1].dim() == 3 else 'mm'} {'inner' if inner == shortest else 'outer'}"
        return Kind(name, text, min(LARGEST, int(math.log2(max(1, shortest))))), Amount(1, moved, flops, fresh)
    return Kind(name, text, JOINED if joined and moved >= SMALL else size_class(moved)), Amount(1, moved, flops, fresh)


def size_class(moved: float) -> int:
    """Of bytes, in powers of 4 above ``SMALL``."""
    return min(LARGEST, max(0, int(math.log(max(1.0, moved) / SMALL, 4))))


@cache
def _changed(func: Any) -> tuple[int, ...]:
    """Which arguments an operation writes to; of fused optimizers not the gradients, which only a scaler changes."""
    arguments = enumerate(func._schema.arguments)
    return tuple(i for i, a in arguments if a.alias_info and a.alias_info.is_write and a.name != "grads")


def _bytes(name: str, inputs: list[Tensor], outputs: list[Tensor], changed: list[Tensor]) -> tuple[int, int]:
    """(bytes read and written, those of large blocks that are new)."""
    known = {t.untyped_storage()._cdata for t in (*inputs, *changed)}
    made = [_held(t) for t in outputs if t.untyped_storage()._cdata not in known]
    fresh = sum(size for size in made if size > FRESH)
    if name.startswith(("empty", "new_empty")) or (inputs and not made and not changed):
        return 0, 0
    if name in _LOOK_UPS:
        return 2 * sum(map(_held, outputs)), fresh
    return sum(map(_held, inputs)) + sum(made) + sum(map(_held, changed)), fresh


def _held(tensor: Tensor) -> int:
    """Bytes of what is looked at; numbers that are repeated by a stride of zero count once."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * (
        tensor.element_size()
    )


def _flops(name: str, func: Any, args: Any, kwargs: Mapping[str, Any], out: Any, inputs: list[Tensor]) -> float:
    if name.rstrip("_") in PRODUCTS:
        rows, inner = inputs[-2].shape[-2:]
        return 2.0 * math.prod(inputs[-1].shape[:-2]) * rows * inner * inputs[-1].shape[-1]
    if name in _DECOMPOSITIONS:
        *stack, rows, cols = inputs[0].shape
        return 4.0 * math.prod(stack) * rows * cols * min(rows, cols)
    formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))


def kinds_of(work: Work) -> Iterator[tuple[Kind, Amount]]:
    """All kinds at all places."""
    for kinds in work.places.values():
        yield from kinds.items()
