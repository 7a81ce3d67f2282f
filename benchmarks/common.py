"""What every benchmark shares: interleaved timing, live memory, hardware, result files.

Machines are shared and noisy, so alternatives are timed in turns within one run and compared by the median of their
ratios, round by round; absolute times are only for orientation. A result file is named after what was measured, the
hardware and the day.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lowrank.infra.environment import environment

RESULTS = Path(__file__).parent / "results"


def in_turns(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every alternative in every round, one after the other in each round, by ``clock``."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over the rounds of ``name``'s time divided by ``base``'s."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def hardware() -> str:
    """A short name of this machine: the GPU's, or cores and processor."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{os.cpu_count()}core {environment()['processor']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Write a result beside its environment; the command line and folders of this machine are left out."""
    RESULTS.mkdir(exist_ok=True)
    told = {key: value for key, value in environment().items() if key not in ("command", "commit")}
    path = RESULTS / f"{name}_{hardware()}_{datetime.now(timezone.utc):%Y-%m-%d}.json"
    path.write_text(json.dumps({"environment": told, **result}, indent=2) + "\n")
    return path


def newest(name: str) -> dict[str, Any]:
    """The latest result of that name from this hardware."""
    found = sorted(RESULTS.glob(f"{name}_{hardware()}_*.json"))
    if not found:
        raise SystemExit(f"no result of {name} from {hardware()} yet: measure all of it first")
    result: dict[str, Any] = json.loads(found[-1].read_text())
    return result
