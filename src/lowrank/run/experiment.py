"""An experiment as data: which methods are tuned over which spaces and then compared, and what may be compared at all.

    Experiment   question, contenders, baseline, seeds, trials
    Contender    a method under its name, the settings that are its own, and the space in which the others are sought
    tune         what a contender's finished trials say: the next trials that are missing, or the settings that won

Tuning is seeded successive halving (Jamieson and Talwalkar, arXiv 1502.07943): ``trials`` points at ``1/shrink`` of the
steps, the best ``trials/shrink`` of them at all steps, every run under a schedule of its own that decays to 0. Points
are a Latin hypercube: each value of each option occurs as often as any other. Where the best value lies at the edge of
a numeric option's space, the space is extended by the same ratio, at most twice; what is still at an edge is flagged.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from lowrank.infra.convert import Setting, nearest
from lowrank.run.overrides import override, resolve
from lowrank.run.run import Run, flat

Equal = Literal["tokens", "seconds", "memory"]
Space: TypeAlias = Mapping[str, Sequence[Setting]]
_EXTENSIONS = 2
_ALIKE = ("task", "model", "data", "steps", "epochs", "batch_size", "grad_accum", "eval_batches")
_MAY_DIFFER = {"tokens": (), "seconds": ("steps",), "memory": ("batch_size",)}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method in a comparison.

    Attributes:
        name: in tables.
        run: with all settings that are not tuned.
        space: option -> its values, in order; empty where nothing is tuned.
        start: a run whose merged weights this one starts from.
    """

    name: str
    run: Run
    space: Space = field(default_factory=dict)
    start: Run | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that an experiment is.

    Attributes:
        name, size, preset: how it is asked for.
        question: what it asks; one sentence.
        caveat: what this size can and cannot say.
        contenders: the methods.
        baseline: the one with which the others are compared.
        metric: the figure that is reported, on the split ``test``; ``lower``: whether less of it is better; ``unit``.
        seeds: of the reported runs.  tuning_seed: of the trials, none of these.
        trials, shrink: of the tuning, as in the module's words.
        horizons: shares of the steps at which the tuned settings are reported, the last 1.
        test_batches: of the reported figure; None: the whole split.
    """

    name: str
    question: str
    caveat: str
    contenders: Sequence[Contender]
    baseline: str
    size: str = "small"
    preset: str = "as-meant"
    metric: str = "test_loss"
    lower: bool = True
    unit: str = "nats a byte"
    equal: Equal = "tokens"
    seeds: Sequence[int] = (1, 2, 3)
    tuning_seed: int = 1001
    trials: int = 8
    shrink: int = 4
    horizons: Sequence[float] = (1.0,)
    test_batches: int | None = None

    def __post_init__(self) -> None:
        names = [each.name for each in self.contenders]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: two contenders have one name, of {', '.join(names)}")
        if self.baseline not in names:
            raise ValueError(f"{self.name}: the baseline {self.baseline!r} is none of {', '.join(names)}")
        if self.tuning_seed in self.seeds:
            raise ValueError(f"seed {self.tuning_seed} tunes, so it cannot report: choose other --seeds")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError(f"--seeds {','.join(map(str, self.seeds))}: give at least one, and each once")
        if self.trials < 1 or self.shrink < 2:
            raise ValueError(f"--trials {self.trials}: at least 1 is needed (and shrink of at least 2)")

    @property
    def judged_by(self) -> str:
        """The figure by which trials are chosen: the reported one's, on the validation split."""
        return self.metric.replace("test_", "val_")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A run that an experiment needs. ``rung`` counts a tuning's; a reported run has None."""

    contender: Contender
    run: Run
    settings: Mapping[str, Setting]
    rung: int | None = None

    @property
    def steps(self) -> int:
        return self.run.steps or 0


Value: TypeAlias = float | None  # of a finished run; None: it failed
Known: TypeAlias = Callable[[Attempt], "tuple[bool, Value]"]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What tuning a contender has come to.

    ``missing``: trials without which it cannot go on; empty at its end.  ``done``: those that were made.  ``best``: the
    settings that won, None where every trial failed.  ``edge``: options of them at the edge of their space.
    """

    missing: Sequence[Attempt] = ()
    done: Sequence[Attempt] = ()
    best: Mapping[str, Setting] | None = None
    edge: Sequence[str] = field(default_factory=list)


def tune(contender: Contender, experiment: Experiment, known: Known) -> Tuned:
    """Go through the tuning of a contender as far as its finished trials (``known``: made?, and its value) reach."""
    points = sample(contender.space, experiment.trials, experiment.tuning_seed)
    if len(points) == 1:
        return Tuned(best=points[0])
    done: list[Attempt] = []
    rungs = [(0, 1 / experiment.shrink, len(points)), (1, 1.0, max(1, len(points) // experiment.shrink))]
    ranked = points
    for rung, share, count in rungs:
        trials = [trial(contender, experiment, point, share, rung) for point in ranked[:count]]
        if missing := [each for each in trials if not known(each)[0]]:
            return Tuned(missing=missing, done=done)
        done += trials
        found = {id(each.settings): known(each)[1] for each in trials}
        ranked = sorted(ranked[:count], key=lambda point: _rank(found[id(point)], experiment.lower))
        if found[id(ranked[0])] is None:
            return Tuned(done=done)
    return _extended(contender, experiment, known, done, ranked[0])


def _extended(
    contender: Contender, experiment: Experiment, known: Known, done: list[Attempt], best: Mapping[str, Setting]
) -> Tuned:
    """Beyond the edges of the space, as long as it becomes better there."""
    value = known(trial(contender, experiment, best, 1.0, 1))[1]
    for _ in range(_EXTENSIONS):
        beyond = {**best, **_outside(contender.space, best)}
        if beyond == best:
            break
        attempt = trial(contender, experiment, beyond, 1.0, 2)
        made, new = known(attempt)
        if not made:
            return Tuned(missing=[attempt], done=done)
        done.append(attempt)
        if _rank(new, experiment.lower) >= _rank(value, experiment.lower):
            return Tuned(done=done, best=best)
        best, value = beyond, new
    return Tuned(done=done, best=best, edge=list(_outside(contender.space, best)))


def trial(
    contender: Contender, experiment: Experiment, settings: Mapping[str, Setting], share: float, rung: int
) -> Attempt:
    """A tuning run over a share of the steps, evaluated at its end alone."""
    run = with_settings(contender.run, settings, share=share, seed=experiment.tuning_seed)
    return Attempt(contender=contender, run=replace(run, eval_every=run.steps), settings=settings, rung=rung)


def reported(contender: Contender, experiment: Experiment, settings: Mapping[str, Setting]) -> list[Attempt]:
    """The runs of a tuned contender: every horizon under every seed."""
    runs = [
        with_settings(contender.run, settings, share=share, seed=seed)
        for share in experiment.horizons
        for seed in experiment.seeds
    ]
    return [Attempt(contender=contender, run=run, settings=settings) for run in runs]


def with_settings(run: Run, settings: Mapping[str, Setting], *, share: float, seed: int) -> Run:
    """The run with tuned settings, over a share of its steps (at least until its first merge), decaying to 0."""
    return _with_settings(run, tuple(settings.items()), share, seed)


@functools.lru_cache(maxsize=4096)  # asked for again after every batch of runs
def _with_settings(run: Run, given: tuple[tuple[str, Setting], ...], share: float, seed: int) -> Run:
    settings = dict(given)
    merge_every = run.method.args.get("merge_every") or settings.get("method.merge_every") or 1
    steps = max(round((run.steps or 0) * share), 1)
    if isinstance(merge_every, int):
        steps = min(max(steps, merge_every), run.steps or steps)
    fixed = {"steps": steps, "seed": seed, "min_lr_ratio": 0.0}
    return resolve(override(run, {**settings, **fixed}))


def sample(space: Space, trials: int, seed: int) -> list[dict[str, Setting]]:
    """``trials`` different points, each value of an option as often as any other; all of a space that has no more.

    >>> [point["lr"] for point in sample({"lr": (1, 2, 3)}, 8, 0)]
    [1, 2, 3]
    >>> len(sample({"lr": (1, 2, 3, 4), "weight_decay": (0.0, 0.1)}, 4, 0))
    4
    """
    total = math.prod(len(values) for values in space.values())
    if total <= trials:
        return [dict(zip(space, row, strict=True)) for row in itertools.product(*space.values())]
    generator = random.Random(seed)
    while True:
        columns = []
        for number, values in enumerate(space.values()):
            spread = [values[(2 * k + 1) * len(values) // (2 * trials)] for k in range(trials)]
            column = spread if len(values) >= trials else [values[k % len(values)] for k in range(trials)]
            if number:
                generator.shuffle(column)
            columns.append(column)
        rows = list(zip(*columns, strict=True))
        if len(set(rows)) == trials:
            return [dict(zip(space, row, strict=True)) for row in rows]


def incomparable(experiment: Experiment) -> dict[str, str]:
    """Contenders that cannot stand in one table with the baseline, each with the reason."""
    flats = {each.name: flat(resolve(each.run).to_json()) for each in experiment.contenders}
    base, free = flats[experiment.baseline], _MAY_DIFFER[experiment.equal]
    found = {}
    for name, own in flats.items():
        names = [n for n in {**base, **own} if n in _ALIKE or n.partition(".")[0] in ("data", "model")]
        differ = [n for n in names if n not in free and base.get(n) != own.get(n)]
        if differ:
            said = ", ".join(f"{n}={own.get(n)} (the baseline: {base.get(n)})" for n in differ)
            found[name] = f"other {said}"
    return found


def refuse_spaces(experiment: Experiment) -> None:
    """Refuse a space with values that its contender cannot take in its model: each would be a trial that is wasted.

    The least and the greatest values of all options are tried together, without weights, data or a step.

    Raises:
        ValueError: naming the contender, the settings and why not.
    """
    from lowrank.plan.live_bytes import FakeLiveBytes, undisturbed  # torch, which an experiment as data does without
    from lowrank.run.memory_estimate import fake_session

    for each in experiment.contenders:
        for end in (0, -1) if each.space else ():
            settings = {name: values[end] for name, values in each.space.items()}
            run = with_settings(each.run, settings, share=1.0, seed=experiment.tuning_seed)
            try:
                with undisturbed(), FakeLiveBytes(), suppress(RuntimeError, NotImplementedError, TypeError):
                    fake_session(run, blocks=2)  # what cannot be made without numbers is seen when it is run
            except ValueError as error:
                said = " ".join(f"{name}={value}" for name, value in settings.items())
                raise ValueError(f"{experiment.name}, {each.name}, of the values to tune {said}: {error}") from error


def chosen(
    experiment: Experiment,
    *,
    changes: Mapping[str, Any],
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    trials: int | None = None,
    equal: str | None = None,
) -> Experiment:
    """The experiment as it was asked for: some of its contenders, other seeds, trials or settings of all its runs.

    Raises:
        ValueError: an unknown contender or setting, a setting that is tuned, or a choice that makes no experiment.
    """
    tuned = {name for each in experiment.contenders for name in each.space}
    for name in changes:
        if name.replace("-", "_") in tuned or name in ("method", "epochs", "seed"):
            raise ValueError(f"--{name} is chosen by {experiment.name} itself: leave it out")
    names = [each.name for each in experiment.contenders]
    for name in methods:
        if name not in names:
            raise ValueError(f"{experiment.name} has no {name!r}{nearest(name, names)}; it has {', '.join(names)}")
    if equal not in (None, "tokens", "seconds", "memory"):
        raise ValueError(f"--equal {equal}: it is tokens, seconds or memory")
    others: dict[str, Any] = {"seeds": seeds, "trials": trials, "equal": equal}
    size = [f"{name.replace('_', '-')} {value}" for name, value in changes.items() if name not in ("data", "device")]
    if size:  # the caveat is of the declared size
        others["caveat"] = f"{experiment.caveat} But here: {', '.join(size)}."
    others["contenders"] = [
        replace(
            each,
            run=override(each.run, changes),
            start=None if each.start is None else override(each.start, _of_starts(changes)),
        )
        for each in experiment.contenders
        if not methods or each.name in methods or each.name == experiment.baseline
    ]
    return replace(experiment, **{name: value for name, value in others.items() if value not in (None, ())})


def _of_starts(changes: Mapping[str, Any]) -> dict[str, Any]:
    """A start has data and steps of its own."""
    return {name: v for name, v in changes.items() if name.partition(".")[0] in ("model", "device", "precision")}


def _rank(value: Value, lower: bool) -> float:
    return math.inf if value is None or not math.isfinite(value) else value if lower else -value


def _outside(space: Space, best: Mapping[str, Setting]) -> dict[str, Setting]:
    """For options of at least three positive numbers whose best value is the least or the greatest: the next beyond."""
    found: dict[str, Setting] = {}
    for name, values in space.items():
        numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0]
        value = best[name]
        if len(numbers) < 3 or len(numbers) < len(values) or not isinstance(value, (int, float)):
            continue
        ordered = sorted(numbers)
        if value >= ordered[-1]:
            found[name] = float(f"{value * ordered[-1] / ordered[-2]:.3g}")
        elif value <= ordered[0]:
            found[name] = float(f"{value * ordered[0] / ordered[1]:.3g}")
    return found
