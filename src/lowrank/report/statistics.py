"""Whether a difference between methods is real: paired t intervals over seeds, corrected for how many are compared.

    gain_i = figure of the baseline − figure of the method, seed i     (the other way round where more is better)
    t      = mean(gain) / (std(gain) / √n),  n − 1 degrees of freedom, two-sided

Runs of one seed share weights, data order and noise, so differences are taken seed by seed (Student 1908, "paired").
Over m comparisons with the baseline p-values are Holm's (Scandinavian Journal of Statistics 6, 1979):
p₍ᵢ₎·(m − i + 1), made monotone. The interval shown belongs to the same test, so that it leaves out 0 exactly where a
difference is claimed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowrank.infra.extras import import_extra

FEWEST = 3  # seeds for a test

Verdict = Literal["better", "worse", "undecided", "no test"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method's figure beside the baseline's.

    Attributes:
        method, baseline: their names.
        seeds: how many both have.
        gain: mean over the seeds, above 0 where the method is better; NaN without a seed in common.
        half_width: of the interval about ``gain``, at the level that Holm's procedure gives it; None without a test.
        p: Holm's p-value; None without a test.
        verdict: "better" and "worse" are claims; "undecided" is the absence of one, not equality.
    """

    method: str
    baseline: str
    seeds: int
    gain: float
    half_width: float | None
    p: float | None
    verdict: Verdict


def paired_test(gains: Sequence[float]) -> float:
    """The two-sided p-value of Student's t on paired differences (``scipy.stats.ttest_rel``).

    Raises:
        ValueError: fewer than two differences.
        ImportError: scipy is missing.
    """
    if len(gains) < 2:
        raise ValueError(f"a paired test needs at least 2 differences, got {len(gains)}")
    mean, error = statistics.fmean(gains), _standard_error(gains)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * import_extra("scipy.stats", "report").t.sf(abs(mean) / error, len(gains) - 1))


def half_width(gains: Sequence[float], alpha: float) -> float:
    """Of the interval about the mean of paired differences that covers the true one with probability 1 − alpha."""
    quantile = float(import_extra("scipy.stats", "report").t.isf(alpha / 2, len(gains) - 1))
    return quantile * _standard_error(gains)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's p-values, in the order given: at most alpha exactly where his procedure rejects.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted


def compare(
    figures: Mapping[str, Mapping[Any, float]], baseline: str, *, lower: bool = True, alpha: float = 0.05
) -> list[Difference]:
    """Every method beside the baseline, over the seeds that both have.

    Args:
        figures: method -> seed (or whatever tells repeats apart) -> figure; what is not finite does not count.
        baseline: one of the methods.
        lower: whether less is better.
        alpha: how often at most any claim may be false, over all comparisons together.

    Raises:
        KeyError: the baseline is not among the methods.
    """
    sign = 1.0 if lower else -1.0
    base = {seed: value for seed, value in figures[baseline].items() if math.isfinite(value)}
    gains = {
        method: [sign * (base[seed] - value) for seed, value in own.items() if seed in base and math.isfinite(value)]
        for method, own in figures.items()
        if method != baseline
    }
    tested = [method for method, own in gains.items() if len(own) >= FEWEST]
    raw = [paired_test(gains[method]) for method in tested]
    p_values = dict(zip(tested, holm(raw), strict=True))
    levels = dict(zip(tested, _levels(raw, alpha), strict=True))
    found = []
    for method, own in gains.items():
        gain, p = statistics.fmean(own) if own else math.nan, p_values.get(method)
        verdict: Verdict = "no test"
        if p is not None:
            verdict = "undecided" if p > alpha else "better" if gain > 0 else "worse"
        width = None if p is None else half_width(own, levels[method])
        about: Any = {"method": method, "baseline": baseline, "seeds": len(own)}
        found.append(Difference(**about, gain=gain, half_width=width, p=p, verdict=verdict))
    return found


def sentence(differences: Sequence[Difference], repeats: str = "seeds") -> str:
    """What the comparisons say, claims first; ``repeats`` is what the runs of a method differ by.

    >>> test = {"gain": 0.1234, "half_width": 0.021, "p": 0.003, "verdict": "better"}
    >>> sentence([Difference(method="muon", baseline="full", seeds=5, **test)])
    'muon is better than full by 0.12 ± 0.02 (p = 0.003).'
    """
    if not differences:
        return "There is nothing to compare: one method ran."
    claims = [each for each in differences if each.verdict in ("better", "worse")]
    claims.sort(key=lambda each: -each.gain)
    parts = [
        f"{each.method} is {each.verdict} than {each.baseline} by {plus_minus(abs(each.gain), each.half_width)} "
        f"(p {_p(each.p)})"
        for each in claims
    ]
    for seeds in sorted({each.seeds for each in differences if each.verdict == "undecided"}):
        names = [each.method for each in differences if each.verdict == "undecided" and each.seeds == seeds]
        names.append(differences[0].baseline)
        parts.append(f"{', '.join(names[:-1])} and {names[-1]} cannot be told apart with {seeds} {repeats}")
    if untested := [each.method for each in differences if each.verdict == "no test"]:
        parts.append(f"no test of {', '.join(untested)}: fewer than {FEWEST} {repeats} in common with the baseline")
    return "; ".join(parts) + "."


def plus_minus(value: float, spread: float | None) -> str:
    """A figure with no more digits than its spread allows: one of the spread, two where it begins with a 1.

    >>> plus_minus(0.12345, 0.0213), plus_minus(2.5, 0.0144), plus_minus(2.54321, None), plus_minus(123.4, 20)
    ('0.12 ± 0.02', '2.500 ± 0.014', '2.543', '120 ± 20')
    """
    if spread is None or not math.isfinite(spread) or spread <= 1e-12 * abs(value):  # none, or of rounding alone
        return f"{value:#.4g}".removesuffix(".")
    exponent = math.floor(math.log10(spread))
    decimals = -exponent + (spread / 10**exponent < 1.95)
    shown = max(0, decimals)
    return f"{round(value, decimals):.{shown}f} ± {round(spread, decimals):.{shown}f}"


def within(values: Sequence[float]) -> str:
    """The mean of some figures with no more digits than their spread allows, three where there is none.

    >>> within([0.1931, 0.2044]), within([0.1931]), within([])
    ('0.199', '0.193', '–')
    """
    if not values:
        return "–"
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return plus_minus(mean, spread).partition(" ")[0] if spread > abs(mean) / 500 else f"{mean:.3g}"


def _levels(values: Sequence[float], alpha: float) -> list[float]:
    """The level at which Holm's procedure looks at each p-value; from the first it does not reject on, that one's."""
    levels, count, stopped = [0.0] * len(values), len(values), None
    for rank, index in enumerate(sorted(range(count), key=lambda index: values[index])):
        levels[index] = stopped or alpha / (count - rank)
        if stopped is None and values[index] > levels[index]:
            stopped = levels[index]
    return levels


def _standard_error(gains: Sequence[float]) -> float:
    return statistics.stdev(gains) / math.sqrt(len(gains))


def _p(p: float | None) -> str:
    assert p is not None, "a claim has a p-value"
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"
