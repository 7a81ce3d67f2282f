"""A run's memory: predicted where it might not fit, and measured in the first step of each kind.

On a CPU bytes are those that torch counts (``plan.live_bytes``), in one step of each kind alone, so that the loop stays
as fast as it is; on a GPU they are the highest that its allocator has seen until then. Ranks of several, compiled and
sharded models are not measured on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lowrank.infra.files import read_facts, write_json
from lowrank.optim.optimizer import Optimizer
from lowrank.optim.refresh_clock import is_due
from lowrank.optim.rules import State
from lowrank.optim.state import leaves
from lowrank.plan.live_bytes import LiveBytes
from lowrank.plan.memory_sheet import Sheet, gib
from lowrank.plan.trace import hold_static
from lowrank.report.memory import MEMORY
from lowrank.run.memory_estimate import estimate
from lowrank.run.session import Session

SHARE = 8  # a run whose weights, gradients and state take less than this part of the memory is not predicted


class RunMemory:
    """What a run needs, as predicted (``predicted``, None where there is room enough), and as measured by kind."""

    def __init__(self, session: Session, optimizer: Optimizer, *, alone: bool):
        self.session, self.optimizer = session, optimizer
        self.measured: dict[str, int] = {}
        self._clocks: list[State] | None = None
        self._counts = alone and not session.run.compile and not session.plan.shards
        self.predicted = self._prediction() if alone else None

    def _prediction(self) -> Sheet | None:
        room = memory_of(self.session.device)
        if room is None or self.session.plan.ledger.total * SHARE < room:
            return None
        return estimate(self.session.run, on_card=self.session.device.type == "cuda")

    def notes(self) -> list[str]:
        """What is to be said before the run starts: that it is predicted not to fit."""
        room = memory_of(self.session.device)
        if self.predicted is None or room is None or self.predicted.total <= room:
            return []
        return [
            f"this run is predicted not to fit: it {self.predicted.answer().partition(';')[0]}, and the device has "
            f"{gib(room)}; lowrank plan {self.session.run.recipe} --fit {gib(room).replace(' ', '')} says what would"
        ]

    def kind_of_step(self, done: int) -> str:
        """Of the step after ``done`` steps."""
        if done == 0:
            return "first"
        merge = self.session.plan.method.merge
        if merge is not None and merge.due(done + 1):
            return "merge"
        return "refresh" if self._refreshes() else "ordinary"

    def _refreshes(self) -> bool:
        """Whether a basis is refreshed in the coming step; not asked once such a step is measured."""
        if "refresh" in self.measured or not self._counts:
            return False
        if self._clocks is None:
            states = [dict(leaves(state)) for state in self.optimizer.state.values()]
            due = [(state, path) for state in states for path in state if path.rpartition(".")[2] == "due"]
            self._clocks = [
                {"due": state[path], "step": state[path.removesuffix("due") + "step"]} for state, path in due
            ]
        return any(map(is_due, self._clocks))

    @contextmanager
    def watching(self, kind: str) -> Iterator[None]:
        """Measure what happens within, where it is the first of its kind."""
        if kind in self.measured or not self._counts:
            yield
        elif self.session.device.type == "cuda":
            yield
            self.measured[kind] = torch.cuda.max_memory_allocated(self.session.device)
        else:
            live = LiveBytes()
            hold_static(live, self.session.model, self.optimizer)
            with live:
                yield
            self.measured[kind] = live.peak

    def write(self, folder: Path) -> None:
        """``memory.json``: by kind of step what was measured, the kinds of earlier starts of the run included, and what
        was predicted."""
        file = folder / MEMORY
        before = read_facts(file).get("measured_peak_bytes", {})
        predicted = None if self.predicted is None else self.predicted.to_json()
        write_json(file, {"measured_peak_bytes": {**before, **self.measured}, "predicted": predicted})


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that a device has; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
