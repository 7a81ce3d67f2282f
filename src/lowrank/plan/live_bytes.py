"""Counts what torch holds: the bytes of every storage that is alive, by kind, and their peak at each place of a step.

A mode of torch's dispatcher sees each operation and asks its results for their storage; a finalizer tells when a
storage is gone. On real tensors that is what torch itself counts (its profiler's memory events), but for scratch space
inside of single kernels. On fake tensors, which have shapes and no numbers, the very same step costs nothing and counts
the same: :class:`FakeLiveBytes` makes all that is created within it fake, but for scalars and small ranges, whose
values decide what a step does (whether a basis is due); a value that nobody has is answered as in an ordinary step.

Kinds are words of ``KINDS``. A place is (the kind of step, where in it), such as ("first", "backward of layer 0").
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lowrank.distributed.shards import is_sharded, to_local
from lowrank.plan.flops import AGAIN, BACKWARD, FORWARD, STEP, Amount, Kind, Work, described

WEIGHTS, FACTORS, KEPT = "weights", "factors", "kept copies"
MOMENTS, BASIS, OTHER_STATE = "moments", "basis", "other state"
GRADIENTS, ACTIVATIONS, LOSS, WORKSPACE = "gradients", "activations", "logits and loss", "workspace"
GATHERED, MESSAGES = "gathered weights", "messages"  # of several ranks: whole weights of a block, what is on its way
KINDS = (
    WEIGHTS, FACTORS, KEPT, MOMENTS, BASIS, OTHER_STATE, GRADIENTS, ACTIVATIONS, LOSS, WORKSPACE, GATHERED, MESSAGES,
)  # fmt: skip
STATIC = KINDS[:6]
BLOCK = 512  # bytes to which CUDA's allocator rounds what is asked for up

Place = tuple[str, str]


@dataclass(frozen=True)
class Peak:
    """The most that was held at one place: bytes, by kind, and what a GPU's allocator adds by rounding."""

    total: int
    parts: Mapping[str, int]
    rounding: int = 0


@dataclass
class _Held:
    kind: str
    size: int


@dataclass
class Counts:
    """What a mode has seen."""

    now: int = 0
    rounding: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    peaks: dict[Place, Peak] = field(default_factory=dict)
    work: Work = field(default_factory=Work)


class LiveBytes(TorchDispatchMode):
    """The mode (module docstring). ``kind`` is what is created now, ``step`` and ``where`` the place; where
    it ``works``, what operations do is counted as well."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self._held = Counts(), dict[int, _Held]()
        self.kind, self.step, self.where = ACTIVATIONS, "first", "forward"
        self.works = False
        self.stepping = False  # inside the optimizer, where that steps in the backward pass

    @property
    def peak(self) -> int:
        """The most bytes that were held at any place."""
        return max(peak.total for peak in self.counts.peaks.values())

    def at(self, where: str, kind: str | None = None, *, step: str | None = None) -> None:
        """From now on this is the place, and what is created is of ``kind``."""
        self.where, self.step, self.kind = where, step or self.step, kind or self.kind
        self._note()

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors that are there already, or that were counted as another kind."""
        for tensor in tensors:
            storage = (to_local(tensor) if is_sharded(tensor) else tensor).untyped_storage()
            held = self._held.get(storage._cdata)
            if held is None:
                self._add(storage, kind)
            else:
                self.counts.parts[held.kind] -= held.size
                self.counts.parts[kind] += held.size
                held.kind = kind
        self._note()

    def hold_gathered(self, tensors: Iterable[Tensor]) -> None:
        """Count as gathered weights what is not known as anything that lasts."""
        whole = [(t, self._held.get(t.untyped_storage()._cdata)) for t in tensors if not is_sharded(t)]
        self.hold([t for t, held in whole if held and held.kind in (ACTIVATIONS, LOSS, WORKSPACE)], GATHERED)

    def __enter__(self) -> Any:
        self._resize = torch.UntypedStorage.resize_
        resize, live = self._resize, self

        def watched(storage: Any, size: int) -> Any:
            """FSDP lets go of gathered weights, and makes room for them again, by their storage's size."""
            found = resize(storage, size)
            live._resized(storage)
            return found

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        held = self._held.get(storage._cdata)
        if held is not None:
            size = storage.nbytes()
            self.counts.now += size - held.size
            self.counts.parts[held.kind] += size - held.size
            self.counts.rounding += -size % BLOCK - -held.size % BLOCK
            held.size = size
            self._note()

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size, counts = storage._cdata, storage.nbytes(), self.counts
        self._held[key] = _Held(kind, size)
        counts.now += size
        counts.parts[kind] += size
        counts.rounding += -size % BLOCK
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self.counts.now -= held.size
            self.counts.parts[held.kind] -= held.size
            self.counts.rounding -= -held.size % BLOCK

    def _note(self) -> None:
        counts, place = self.counts, (self.step, self.where)
        if place not in counts.peaks or counts.now > counts.peaks[place].total:
            counts.peaks[place] = Peak(counts.now, dict(counts.parts), counts.rounding)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler at the first operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "device_mesh") for kind in types):
            return NotImplemented  # a sharded tensor: what it makes of it for its shard comes here again
        out = self.call(func, args, kwargs or {})
        added = False
        for tensor in _tensors((out,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._held:
                self._add(storage, self.kind)
                added = True
        if added:
            self._note()
        if func.namespace == "c10d":
            self.hold(_tensors((args, out)), MESSAGES)
        if self.works and (found := described(func, args, kwargs or {}, out, joined=self.part == STEP)):
            self.did(*found)
        return out

    def call(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)

    @property
    def part(self) -> str:
        """Which part of a step this is (``work.PARTS``)."""
        if self.where.startswith("forward"):
            return FORWARD
        if self.stepping or not self.where.startswith("backward"):
            return STEP
        return AGAIN if torch.is_grad_enabled() else BACKWARD  # what checkpointing computes again has a graph

    def did(self, kind: Kind, amount: Amount) -> None:
        """An operation was done."""
        self.counts.work.add((self.step, self.part), kind, amount)


class FakeLiveBytes(LiveBytes):
    """The same on fake tensors (module docstring).

    Operations go straight to torch's kernels for the meta device, which know shapes alone; torch's own fake mode, which
    takes several times as long, answers where there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def call(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        fakes = [t for t in tensors if isinstance(t, FakeTensor)]
        if tensors and not fakes:
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return _answer(args[0])
        if func.namespace == "c10d":  # gives more than tensors
            with self.fake:
                return func(*args, **kwargs)
        if fakes and _changes_numbers_alone(func):
            return args[0] if func._schema.returns else None
        if len(fakes) < len(tensors):
            args, kwargs = tree_map_only(Tensor, self.without_numbers, (args, kwargs))
        try:
            if func._overloadpacket in _BY_DEVICE:
                raise NotImplementedError
            out = self._shaped(func, args, kwargs, _device(fakes, kwargs))
        except NotImplementedError:
            with self.fake:
                out = func(*args, **kwargs)
        if not tensors and isinstance(out, Tensor) and out.device.type == "cpu":
            small = out.numel() <= 1 or (func._overloadpacket in _RANGES and out.numel() <= _SMALL)
            return func(*args, **kwargs) if small else out
        if func._overloadpacket is torch.ops.aten.all:
            out.is_answer_of_all = True
        return out

    def without_numbers(self, tensor: Tensor) -> FakeTensor:
        """A tensor of the same shape, dtype and device."""
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _shaped(self, func: Any, args: Any, kwargs: Mapping[str, Any], device: torch.device) -> Any:
        """What an operation makes; looked up where it has been seen on tensors like these, and makes new memory."""
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _META}
        known = None
        key: tuple[Any, ...] | None = (func, torch.get_default_dtype(), *_form(args), *_form(kwargs.values()), *kwargs)
        try:
            known = _KNOWN.get(key)
        except TypeError:  # an argument that is no key
            key = None
        with in_kernel_invocation_manager(self.fake):
            if known is not None:
                shape, stride, dtype = known
                out = torch.empty_strided(shape, stride, dtype=dtype, device=_META)
            else:
                out = func(*args, **kwargs)
        if key is not None and known is None and _is_new(out, args):
            _KNOWN[key] = tuple(out.shape), out.stride(), out.dtype
        return self._faked(out, device)

    def _faked(self, out: Any, device: torch.device) -> Any:
        if isinstance(out, (tuple, list)):
            return type(out)(self._faked(one, device) for one in out)
        if not isinstance(out, Tensor) or isinstance(out, FakeTensor):
            return out
        return FakeTensor(self.fake, out, device)


_META = torch.device("meta")
_KNOWN: dict[Any, tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = {}  # results by operation and arguments
_BY_DEVICE = (  # statistics of another dtype on a CPU, which the kernels for the meta device do not know
    torch.ops.aten.native_layer_norm,
    torch.ops.aten.native_group_norm,
    torch.ops.aten.native_batch_norm,
    torch.ops.aten._native_batch_norm_legit,
)
_RANGES, _SMALL = (torch.ops.aten.arange, torch.ops.aten.linspace), 1 << 16


def _answer(scalar: Tensor) -> bool | int | float:
    """What an ordinary step would find: all of a mask is set, no matrix has failed, a count is 0."""
    if scalar.dtype is torch.bool:
        return bool(getattr(scalar, "is_answer_of_all", False))
    return 0.0 if scalar.is_floating_point() else 0


def _form(values: Iterable[Any]) -> Iterator[object]:
    """What of an operation's arguments decides the shape of its result."""
    for value in values:
        if isinstance(value, Tensor):
            yield value.shape, value.stride(), value.dtype
        elif isinstance(value, (tuple, list)):
            yield (*_form(value),)
        else:
            yield type(value), value


def _is_new(out: Any, args: Any) -> bool:
    """Whether the one result of an operation is memory of its own, all of it (``_unsafe_view``'s is not, unsaid)."""
    if not isinstance(out, Tensor) or isinstance(out, FakeTensor):
        return False
    storage = out.untyped_storage()
    whole = storage.nbytes() == out.numel() * out.element_size()
    return whole and all(storage._cdata != t.untyped_storage()._cdata for t in _tensors(args))


@cache
def _changes_numbers_alone(func: Any) -> bool:
    """Whether an operation is in place and makes nothing."""
    return func._overloadpacket.__name__.endswith("_") and torch.Tag.inplace_view not in func.tags


def _device(fakes: Sequence[FakeTensor], kwargs: Mapping[str, Any]) -> torch.device:
    """Where the result of an operation lies."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    devices = (t.fake_device for t in fakes)
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


@contextmanager
def undisturbed() -> Iterator[None]:
    """While steps are traced: without the collector of cycles, which has nothing to do, and warnings of fakes."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        if collecting:
            gc.enable()
