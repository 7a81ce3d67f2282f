"""Schedules: their shape at the ends, where they meet, and what they refuse."""

import doctest

import pytest

from lowrank.methods import schedule
from lowrank.methods.schedule import Constant, Envelope, Rewarm, constant


def test_examples_in_the_docstrings():
    assert doctest.testmod(schedule).failed == 0


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_envelope_rises_to_one_then_falls_to_the_ratio_in_the_last_step(shape):
    envelope = Envelope(steps=100, warmup=10, min_ratio=0.1, shape=shape)
    values = [envelope(step) for step in range(100)]
    assert values[0] == pytest.approx(1 / 11)
    assert values[10] == max(values) == 1.0
    assert values[99] == pytest.approx(0.1)
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert len(set(values[:11])) == 11
    assert envelope(100) == envelope(10_000) == pytest.approx(0.1)


def test_cosine_is_halfway_in_the_middle():
    assert Envelope(steps=101, min_ratio=0.2)(50) == pytest.approx(0.6)


def test_constant_shape_stays_at_one_after_the_warm_up():
    envelope = Envelope(steps=10, warmup=4, min_ratio=0.1, shape="constant")
    assert [envelope(step) for step in (4, 9, 50)] == [1.0, 1.0, 1.0]
    assert envelope(0) == pytest.approx(0.2)


def test_a_single_step_is_taken_at_the_peak():
    assert Envelope(steps=1, min_ratio=0.1)(0) == 1.0


def test_a_run_that_only_warms_up_never_divides_by_zero():
    envelope = Envelope(steps=5, warmup=5)
    assert [envelope(step) for step in range(5)] == [pytest.approx((step + 1) / 6) for step in range(5)]


def test_rewarm_leaves_the_first_stretch_alone_and_ramps_after_each_merge():
    rewarm = Rewarm(every=10, warmup=3)
    assert [rewarm(step) for step in range(10)] == [1.0] * 10
    for restart in (10, 20, 50):
        assert [rewarm(restart + k) for k in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_rewarm_without_warm_up_is_constant():
    assert {Rewarm(every=4, warmup=0)(step) for step in range(20)} == {1.0}


def test_schedules_are_values():
    assert Rewarm(every=10, warmup=3) == Rewarm(every=10, warmup=3) != Rewarm(every=10, warmup=4)
    assert hash(Envelope(steps=3)) == hash(Envelope(steps=3))
    assert constant == Constant()
    assert repr(constant) == "Constant()"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Envelope(steps=0), "at least 1 step"),
        (lambda: Envelope(steps=5, warmup=6), "between 0 and the run's 5 steps"),
        (lambda: Envelope(steps=5, min_ratio=1.5), "min_ratio=1.5"),
        (lambda: Envelope(steps=5, shape="step"), "cosine, linear, constant"),
        (lambda: Rewarm(every=0, warmup=0), "at least 1 step"),
        (lambda: Rewarm(every=5, warmup=5), "must end before the next restart"),
    ],
)
def test_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
