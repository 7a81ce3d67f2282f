"""How fast a machine is, and what a step then takes.

    an operation    a + bytes · m(size) + bytes · p: a call, memory by the size of what is moved (caches), its own;
                    of large new blocks also what the system takes to map them
    a faster one    s · (a + bytes · m(size)), with s < 1
    with a formula  a + flops · c, memory included; of products c goes by dtype and shortest side
    a part          its operations + calls · o, with o for what Python and autograd take around each

The numbers are fitted to operations that were timed inside real steps (``train.calibration``), where caches and the
allocator are as they are in a run. Without them nothing is said about time: a machine is its device, its number of
threads and torch's version.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowrank.data.cache import cache_root
from lowrank.infra.environment import processor
from lowrank.infra.files import read_json, write_json
from lowrank.plan.flops import JOINED, LARGEST, PARTS, SMALL, Amount, Kind, Work, kinds_of, size_class

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Machine:
    """What a calibration holds for."""

    device: str
    threads: int
    version: str

    @staticmethod
    def here(device: torch.device) -> Machine:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        return Machine(name, torch.get_num_threads(), torch.__version__)

    def __str__(self) -> str:
        return f"{self.device} with {self.threads} thread{'s' if self.threads > 1 else ''} and torch {self.version}"

    @property
    def path(self) -> Path:
        """Where its calibration is kept."""
        words = "".join(c if c.isalnum() else "-" for c in f"{self.device}-{self.threads}").lower()
        return cache_root() / "calibration" / f"{words}.json"

    def others(self) -> list[str]:
        """The machines that are calibrated here."""
        return [str(Machine(**read_json(path)["machine"])) for path in sorted(self.path.parent.glob("*.json"))]


@dataclass(frozen=True)
class Timing:
    """One operation as it was timed: seconds of one call."""

    kind: Kind
    bytes: float
    flops: float
    fresh: float
    seconds: float


@dataclass(frozen=True)
class Speed:
    """A calibration (module docstring).

    Attributes:
        machine: what it holds for.
        call: seconds of a call that moves nothing.
        memory: seconds a byte, by class of size.
        fresh: seconds more for a byte of a large block that is new, which the system maps and fills with zeros.
        own: of each operation its p or, where it has a formula, its c; of products by shortest side too.
        faster: s of those that take less than memory alone would.
        around: o, by part of a step.
    """

    machine: Machine
    call: float
    memory: Mapping[str, float]
    fresh: float
    own: Mapping[str, float]
    faster: Mapping[str, float]
    around: Mapping[str, float]

    @staticmethod
    def read(machine: Machine) -> Speed | None:
        """The calibration of a machine; None where there is none, or one of another version of torch."""
        if not machine.path.is_file():
            return None
        found = read_json(machine.path)
        return Speed(machine, **found) if found.pop("machine") == asdict(machine) else None

    def write(self) -> Path:
        self.machine.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.machine.path, asdict(self))
        return self.machine.path

    def unknown(self, work: Work) -> list[str]:
        """Products and the like that were not timed in their dtype."""
        found = {
            f"{kind.name} in {kind.dtype}"
            for kind, amount in kinds_of(work)
            if amount.flops and self._own(kind) is None
        }
        return sorted(found)

    def seconds(self, kinds: Mapping[Kind, Amount], part: str) -> float:
        """What the operations of a part of a step take."""
        return sum(self._of(kind, amount) + amount.calls * self.around.get(part, 0.0) for kind, amount in kinds.items())

    def _of(self, kind: Kind, amount: Amount) -> float:
        base = self.base(kind, amount)
        own = self._own(kind)
        if own is None:
            return base * self.faster.get(_name(kind), 1.0)
        return base + own * (amount.flops or amount.bytes)

    def base(self, kind: Kind, amount: Amount) -> float:
        """Calls and memory alone."""
        calls = amount.calls * self.call + amount.fresh * self.fresh
        if amount.flops:
            return calls
        size = size_class(amount.bytes / amount.calls) if kind.size == JOINED and amount.calls else max(0, kind.size)
        return calls + amount.bytes * self.memory[str(size)]

    def _own(self, kind: Kind) -> float | None:
        """The operation's own; of a product the nearest shortest side that was timed."""
        if not kind.is_product:
            return self.own.get(_name(kind))
        sizes = sorted(range(LARGEST + 1), key=lambda size: abs(size - kind.size))
        for name in dict.fromkeys((kind.name, kind.name.replace("bmm", "mm"))):
            for size in sizes:
                if (found := self.own.get(_name(replace(kind, name=name, size=size)))) is not None:
                    return found
        return None


def fitted(machine: Machine, memory: Mapping[int, float], fresh: float, timings: Sequence[Timing]) -> Speed:
    """The calibration that explains the timings, given seconds a byte by class of size, and those that a new one takes
    more; what is around calls is added by ``with_around``."""
    small = [t.seconds for t in timings if t.bytes < 1 << 14 and not t.flops]
    speed = Speed(machine, statistics.median(small), {str(s): m for s, m in memory.items()}, fresh, {}, {}, {})
    own, faster, computed = {}, {}, {_name(t.kind) for t in timings if t.flops}
    named: dict[str, list[tuple[float, float, float]]] = {}
    for t in timings:
        without = speed.base(t.kind, Amount(1, t.bytes, t.flops, t.fresh))
        named.setdefault(_name(t.kind), []).append((t.seconds, without, t.flops or t.bytes))
    for name, rows in named.items():
        seconds, base, size = np.array(rows).T
        large = size >= SMALL  # of few bytes a call is most
        if name in computed:
            own[name] = max(0.0, _middle((seconds - base) / size, size))  # of small ones a call is most
        elif seconds[large].sum() > base[large].sum():
            own[name] = max(0.0, float(np.median((seconds - base)[large] / size[large])))
        else:
            faster[name] = _middle(seconds / base, seconds)
    return replace(speed, own=own, faster=faster)


def with_around(speed: Speed, steps: Iterable[tuple[str, Work, Mapping[str, float]]]) -> Speed:
    """Add what calls cost around themselves, from whole steps: (kind of step, its work, seconds of each part)."""
    around, steps = {}, list(steps)
    for part in PARTS:
        weights, missing = [], []
        for step, work, seconds in steps:
            if part in seconds and (calls := work.total(step, part).calls):
                weights.append(calls / seconds[part])
                missing.append(1 - speed.seconds(work.at(step, part), part) / seconds[part])
        if weights:
            around[part] = float(np.dot(weights, missing) / np.dot(weights, weights))
    return replace(speed, around=around)


def _middle(values: Array, weights: Array) -> float:
    """The median of values that weigh differently, so that single timings do not decide."""
    order = np.argsort(values)
    weight = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(weight, weight[-1] / 2)])


def _name(kind: Kind) -> str:
    where = f"{kind.size}" if kind.is_product else "optimizer" if kind.size == JOINED else "model"
    return f"{kind.name} {kind.dtype} {where}"


# --- what a step takes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a step takes, in seconds: forward and backward passes of all micro-batches (``again``: what checkpointing
    computes once more), the optimizer, and in the mean over the steps refreshes and merges; apart, one batch of an
    evaluation."""

    forward: float
    backward: float
    again: float
    step: float
    refresh: float
    merge: float
    evaluation: float

    @property
    def total(self) -> float:
        """A step, in the mean."""
        return self.forward + self.backward + self.again + self.step + self.refresh + self.merge


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """How often what happens: micro-batches in a step, those that were traced, and steps between refreshes and
    merges (0: never), in the mean between those of one fragment and the next."""

    micro_batches: int
    traced: int
    refresh_every: int = 0
    merge_every: float = 0


def parts_of(work: Work, rhythm: Rhythm, weigh: Any) -> dict[str, Any]:
    """The parts of a mean step by ``weigh(operations of a place, part)``, a number or an ``Amount``-like thing that can
    be subtracted and multiplied: seconds, operations, bytes."""
    ordinary = "ordinary" if work.at("ordinary", "forward") else "first"
    times = rhythm.micro_batches / rhythm.traced
    found = {part: weigh(work.at(ordinary, part), part) * (1.0 if part == "step" else times) for part in PARTS}
    found["refresh"] = found["merge"] = 0.0
    if rhythm.refresh_every and work.at("refresh", "step"):
        more = weigh(work.at("refresh", "step"), "step") - found["step"]
        found["refresh"] = max(0.0, more) / rhythm.refresh_every
    if rhythm.merge_every:
        found["merge"] = weigh(work.at("merge", "step"), "step") / rhythm.merge_every
    found["evaluation"] = weigh(work.at("evaluation", "forward"), "forward")
    return found


def pace(work: Work, rhythm: Rhythm, speed: Speed) -> Pace:
    """What a step takes on the machine of ``speed``."""
    return Pace(**parts_of(work, rhythm, speed.seconds))
