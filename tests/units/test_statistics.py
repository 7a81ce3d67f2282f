"""Paired intervals, Holm's correction and the sentence, against scipy and by their definitions."""

import math

import numpy as np
import pytest
from scipy import stats

from lowrank.report.statistics import Difference, compare, half_width, holm, paired_test, plus_minus, sentence


@pytest.fixture
def drawn():
    generator = np.random.default_rng(0)
    figures = {"full": 2.0, "muon": 1.9, "galore": 1.999, "scale": 2.2, "lora": 1.97}
    seeds = {seed: generator.normal(0, 0.2) for seed in range(6)}  # what a seed does to all methods
    return {m: {s: mean + seeds[s] + generator.normal(0, 0.01) for s in seeds} for m, mean in figures.items()}


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_test_and_its_interval_are_scipy_s(count):
    a, b = np.random.default_rng(count).normal(size=(2, count))
    gains = list(a - b)
    assert paired_test(gains) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.9)
    assert half_width(gains, 0.1) == pytest.approx((high - low) / 2)


def test_holm_rejects_step_by_step():
    """His procedure as he writes it: from the smallest p-value on, until one is above alpha / (comparisons left)."""
    generator = np.random.default_rng(1)
    for _ in range(200):
        values = list(generator.uniform(0, 0.1, size=5))
        rejected, left = set(), 5
        for index in np.argsort(values):
            if values[index] > 0.05 / left:
                break
            rejected.add(int(index))
            left -= 1
        assert {i for i, p in enumerate(holm(values)) if p <= 0.05} == rejected


def test_intervals_leave_out_0_exactly_where_a_difference_is_claimed():
    generator = np.random.default_rng(2)
    claims = 0
    for _ in range(100):
        figures = {m: dict(enumerate(generator.normal(0.02 * i, 0.02, size=4))) for i, m in enumerate("abcdef")}
        for each in compare(figures, "a"):
            claimed = each.verdict in ("better", "worse")
            assert claimed == (abs(each.gain) > each.half_width) == (each.p <= 0.05)
            claims += claimed
    assert 50 < claims < 450


def test_pairing_sees_what_the_seeds_hide(drawn):
    found = {each.method: each for each in compare(drawn, "full")}
    assert {m: each.verdict for m, each in found.items()} == {
        "muon": "better",
        "galore": "undecided",
        "scale": "worse",
        "lora": "better",
    }
    assert stats.ttest_ind(list(drawn["lora"].values()), list(drawn["full"].values())).pvalue > 0.05
    assert found["muon"].p >= paired_test([drawn["full"][s] - drawn["muon"][s] for s in range(6)])
    higher = {m: {s: -v for s, v in own.items()} for m, own in drawn.items()}
    assert compare(higher, "full", lower=False) == list(found.values())


def test_the_sentence_says_what_is_claimed_and_what_is_not(drawn):
    drawn["dion"] = {0: 1.9, 1: math.nan, 2: 1.8}
    said = sentence(compare(drawn, "full"))
    assert said.index("muon is better than full by ") < said.index("scale is worse than full by ")
    assert "galore and full cannot be told apart with 6 seeds" in said
    assert said.endswith("no test of dion: fewer than 3 seeds in common with the baseline.")
    assert sentence([]) == "There is nothing to compare: one method ran."


def test_two_seeds_are_no_test():
    (one,) = compare({"full": {1: 2.0, 2: 2.1}, "muon": {1: 1.0, 2: 1.1}}, "full")
    assert one == Difference(
        method="muon", baseline="full", seeds=2, gain=1.0, half_width=None, p=None, verdict="no test"
    )
    with pytest.raises(ValueError, match="at least 2 differences, got 1"):
        paired_test([1.0])


def test_equal_figures_are_no_difference():
    same = {1: 2.0, 2: 2.1, 3: 2.2}
    (one,) = compare({"full": same, "again": dict(same)}, "full")
    assert (one.gain, one.p, one.verdict) == (0.0, 1.0, "undecided")


def test_no_more_digits_than_the_spread_allows():
    assert plus_minus(2.123456, 0.0987) == "2.12 ± 0.10"
    assert plus_minus(2.123456, 0.00096) == "2.1235 ± 0.0010"
    assert plus_minus(0.5, math.nan) == plus_minus(0.5, 1e-17) == "0.5000"
