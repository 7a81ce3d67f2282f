"""The clock that says what a step takes."""

from __future__ import annotations

import pytest

from lowrank.infra import step_clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [100.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: time[0])
    return time


def test_a_reading_is_the_mean_of_all_steps_since_the_last(now: list[float]) -> None:
    clock = step_clock.StepClock()
    for seconds, waited in ((1.0, 0.5), (3.0, 0.0)):
        now[0] += seconds
        clock.tick(waited)
    assert clock.read() == (2.0, 0.25)
    now[0] += 5.0
    clock.tick(0.0)
    assert clock.read() == (5.0, 0.0)


def test_time_stands_still_while_paused(now: list[float]) -> None:
    clock = step_clock.StepClock()
    now[0] += 1.0
    clock.tick(0.0)
    with clock.paused():
        now[0] += 60.0
    assert clock.read() == (1.0, 0.0)
