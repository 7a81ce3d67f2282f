"""``lowrank plan --calibrate``: how fast this machine is, measured inside real steps of small models (``plan.speed``).

Every operation of a few steps of each kind is timed where it runs, with the caches and the allocator as they are there;
whole steps, timed without that, tell what Python and autograd take around them. Runs are taken one after the other
until a minute is over: first what every plan needs, then wider matrices, then bfloat16. Before them sums of all sizes
tell how fast memory is, and products of all shapes how fast those are.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from lowrank.plan.flops import BACKWARD, FORWARD, FRESH, LARGEST, SMALL, STEP, Amount, Kind, Work
from lowrank.plan.live_bytes import LiveBytes, undisturbed
from lowrank.plan.speed import Machine, Speed, Timing, fitted, with_around
from lowrank.plan.trace import Setup, Steps
from lowrank.recipes import find
from lowrank.run.memory_estimate import real_setup
from lowrank.run.overrides import override, resolve
from lowrank.run.run import Run

SECONDS = 45.0  # after which no other run is begun
_GPT = _LLAMA = {"model.n_layer": 2, "data.context": 128}
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gpt-mini", {**_GPT, "method": "full", "model.n_embd": 64, "batch_size": 4}),
    ("gpt-mini", {**_GPT, "method": "full", "model.n_embd": 256, "batch_size": 8}),
    ("llama-mini", {**_LLAMA, "method": "galore", "model.hidden": 64, "method.rank": 16, "batch_size": 4}),
    ("llama-mini", {**_LLAMA, "method": "galore_8bit", "model.hidden": 256, "method.rank": 32, "batch_size": 8}),
    ("gpt-mini", {**_GPT, "method": "lte", "model.n_embd": 64, "batch_size": 8}),
    ("vit-mini", {"method": "full", "model.depth": 2, "batch_size": 16}),
    ("gpt-mini", {**_GPT, "method": "lora", "model.n_embd": 192, "batch_size": 16}),
    ("llama-mini", {**_LLAMA, "method": "apollo", "model.hidden": 128, "method.rank": 16, "batch_size": 4}),
    ("gpt-mini", {**_GPT, "method": "full", "model.n_embd": 768, "model.vocab_size": 16384, "batch_size": 4}),
    ("vit-mini", {"method": "lora", "model.depth": 2, "model.width": 384, "model.heads": 6, "batch_size": 4}),
    ("llama-mini", {**_LLAMA, "method": "fira", "model.hidden": 256, "method.rank": 32, "batch_size": 4}),
    ("gpt-mini", {**_GPT, "method": "full", "model.n_embd": 128, "batch_size": 4, "precision": "bf16"}),
    ("llama-mini", {**_LLAMA, "method": "full", "model.hidden": 128, "batch_size": 4, "precision": "bf16-weights"}),
)
WIDE = (1, 4, 8, 16, 32, 64, 128, 256, 512)  # shortest sides of products


Now = Callable[[], float]
What = tuple[Kind, float, float, float]  # an operation: its kind, bytes, operations, new bytes


class _Timed(LiveBytes):
    """Times every operation that is called within, beside what it does."""

    def __init__(self, now: Now):
        super().__init__()
        self.works, self.now, self.seconds = True, now, 0.0
        self.found: dict[What, list[float]] = defaultdict(list)

    def call(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        began = self.now()
        out = func(*args, **kwargs)
        self.seconds = self.now() - began
        return out

    def did(self, kind: Kind, amount: Amount) -> None:
        super().did(kind, amount)
        self.found[kind, amount.bytes, amount.flops, amount.fresh].append(self.seconds)


def calibrated(
    device: torch.device, note: Callable[[str], None] = lambda text: None, now: Now = time.perf_counter
) -> Speed:
    """Measure this machine, for at most about a minute.

    Args:
        device: what is measured.
        note: told which run is at work.
        now: a clock; a thread's own does not see what else a machine does.
    """
    timed: dict[What, list[float]] = defaultdict(list)
    steps: list[tuple[str, Work, dict[str, float]]] = []
    clock = partial(_when_done, device) if device.type == "cuda" else now
    began = clock()
    (memory, fresh), products = _memory(device, clock), _Timed(clock)
    _products(device, products)
    for name, changes in RUNS:
        if clock() - began > SECONDS:
            break
        run = resolve(override(find(name), {**changes, "device": device.type}))
        note(f"{name}, {run.method.name}, {run.precision}")
        with undisturbed():
            _time(run, clock, timed, steps)
    seen = {(kind.name, kind.dtype, kind.size) for kind, *_ in timed}
    for what, seconds in products.found.items():  # those that no step had: within one they go faster or slower
        if (what[0].name, what[0].dtype, what[0].size) not in seen:
            timed[what] += seconds
    timings = [Timing(*what, statistics.median(seconds)) for what, seconds in timed.items()]
    return with_around(fitted(Machine.here(device), memory, fresh, timings), steps)


def _when_done(device: torch.device) -> float:
    """The time when a GPU has done all that it was given."""
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _memory(device: torch.device, now: Now) -> tuple[dict[int, float], float]:
    """(seconds for each byte that a sum of two tensors moves, by class of size; what a new byte takes more)."""

    def seconds(run: Callable[[], object], times: int) -> float:
        found = []
        for _ in range(4):
            began = now()
            for _ in range(times):
                run()
            found.append((now() - began) / times)
        return min(found[1:])

    memory = {}
    for size in range(LARGEST + 1):
        count = min(2 * SMALL * 4**size, 8 * FRESH) // 12  # in the middle of the class
        one, other, out = (torch.ones(count, device=device) for _ in range(3))
        run = partial(torch.add, one, other, out=out)
        memory[size] = seconds(run, max(1, (1 << 22) // count)) / (12 * count)
    new = seconds(lambda: one + other, 1) / (12 * count)
    return memory, max(0.0, 3 * (new - memory[LARGEST]))


def _products(device: torch.device, live: _Timed) -> None:
    """Products of all shortest sides, summed over the shortest one or not, in float32; a few in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        for short in WIDE if dtype is torch.float32 else WIDE[2::2]:
            long = 1024 if dtype is torch.float32 else 256
            for rows, inner, columns in ((long, short, 512), (long, 512, short), (short, long, 512)):
                one = torch.ones(rows, inner, dtype=dtype, device=device)
                other = torch.ones(columns, inner, dtype=dtype, device=device)
                with live:
                    for _ in range(3):
                        torch.mm(one, other.t())


def _time(
    run: Run,
    now: Now,
    timed: dict[What, list[float]],
    steps: list[tuple[str, Work, dict[str, float]]],
) -> None:
    """Time the operations of a run's steps of each kind, and a few ordinary steps as a whole."""
    setup = real_setup(run)
    for repeat in range(2):  # of which the first warms up
        live = _Timed(now)
        with live:
            Steps(live, setup).all()
        if repeat:
            for what, seconds in live.found.items():
                timed[what] += seconds
    ordinary = "ordinary" if live.counts.work.at("ordinary", FORWARD) else "first"
    whole = [_whole_step(setup, now) for _ in range(4)]
    steps.append(
        (ordinary, live.counts.work, {part: statistics.median(each[part] for each in whole) for part in whole[0]})
    )


def _whole_step(setup: Setup, now: Now) -> dict[str, float]:
    """Seconds of each part of one step, with nothing around its operations."""
    marks = [now()]
    with setup.autocast():
        loss = setup.loss()
    marks.append(now())
    loss.backward()
    marks.append(now())
    setup.finish()
    marks.append(now())
    forward, backward, step = (after - before for before, after in pairwise(marks))
    return {FORWARD: forward, BACKWARD: backward, STEP: step}
