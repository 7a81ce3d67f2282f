"""What a rank of several takes, counted on real tensors by those that train, and as planned by one process alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.ranks.claims import Case
from tests.ranks.courses import of_gpt

from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.simulated import simulated
from lowrank.plan.live_bytes import STATIC, FakeLiveBytes, LiveBytes, undisturbed
from lowrank.plan.trace import Steps
from lowrank.run.memory_estimate import _made
from lowrank.run.overrides import override, resolve

RUNS: dict[str, dict[str, Any]] = {
    "full-ddp": {"method": "full", "engine": "ddp"},
    "galore-fsdp": {"method": "galore_8bit", "method.rank": 4, "engine": "fsdp", "checkpoint-activations": True},
    "lte": {"method.heads": 4, "method.exchange": "2bit", "method.rest": "local"},
    "lte-mesh": {"method.heads": 4, "engine": "fsdp", "workers": 2},
}


def counted(ranks: ProcessGroup, folder: Path | None, *, names: Sequence[str], real: bool = True) -> dict[str, Any]:
    """For each of ``RUNS`` the bytes of its static parts, the peak of each kind of step, and what its steps sent.

    Real ranks let go of what they have sent sooner or later, as the other happens to be: of several times the least.
    """
    found = {}
    for name in names:
        first, *others = [_once(ranks, name, real=real) for _ in range(3 if real else 1)]
        least = {step: min(each["peaks"][step] for each in (first, *others)) for step in first["peaks"]}
        found[name] = {**first, "peaks": least}
    return found


def _once(ranks: ProcessGroup, name: str, *, real: bool) -> dict[str, Any]:
    changes = {"model.n_layer": 3, "max-grad-norm": "none", "batch-size": 8, **RUNS[name]}
    run = resolve(override(of_gpt(), changes))
    with undisturbed():
        live, _, _, setup = _made(run, LiveBytes if real else FakeLiveBytes, ranks=ranks)
        static, before = {kind: live.counts.parts[kind] for kind in STATIC}, ranks.traffic.sent
        with live:
            Steps(live, setup).all()
    peaks: dict[str, int] = {}
    for (step, _), peak in live.counts.peaks.items():
        peaks[step] = max(peaks.get(step, 0), peak.total)
    del peaks["start"]
    return {"static": static, "peaks": peaks, "sent": ranks.traffic.sent - before}


def is_planned_by_one_process(case: Case) -> None:
    """Which sees no other rank. Static parts and what is sent are exact; peaks but for what real ranks let go of a
    little later."""
    rank = len(case.ranks) // 2
    with simulated(len(case.ranks), rank) as ranks:
        for name, mine in counted(ranks, None, names=tuple(case.ranks[rank]), real=False).items():
            theirs = case.ranks[rank][name]
            assert mine["static"] == theirs["static"]
            assert mine["sent"] == theirs["sent"]
            assert mine["peaks"] == pytest.approx(theirs["peaks"], rel=0.01)
