"""What a page shows of one comparison, whether it is a group of runs or an experiment's results.

Comparison   what was asked and found: sentences, table, the methods, every rate tried
Entry        a method in it, with a `Seen` for each seed: its figure, its peak, its curves
"""

from __future__ import annotations

import math
import shlex
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from lowrank.infra.files import read_facts
from lowrank.infra.progress import short_bytes, short_count
from lowrank.infra.text import one_line
from lowrank.report.memory import MEMORY
from lowrank.report.results import Results, find_experiments
from lowrank.report.results import Row as ResultsRow
from lowrank.report.results_table import findings, results_cells
from lowrank.report.runs import Result, Unfinished, find_results, find_unfinished
from lowrank.report.statistics import within
from lowrank.report.table import (
    HIGHER,
    Group,
    Row,
    Table,
    apart,
    best_rates,
    cells,
    differences,
    fitted_table,
    groups,
    judged_by,
    loss_unit,
    repeat,
    rows,
    said,
    verdict,
)

Series: TypeAlias = Sequence[tuple[float, float]]
Get: TypeAlias = "Callable[[Seen], float | None]"
_SAYS = "what it can and cannot say"
SPECTRA = "spectra.json"  # in a run's folder: what was changed in its layers
REFRESHED = ("basis_energy", "basis_overlap")  # in the log of a run, at steps that refresh a basis


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A run as pictures need it; a series is of (step, figure).

    Attributes:
        value: the figure that is compared; None where there is none yet.
        size: tokens or images of a step.  step_seconds: of one.
        refreshed: series by the names in ``REFRESHED``.
        layers: group of layers -> figures of what was changed there (``lowrank.train.spectra``).
    """

    seed: str
    value: float | None
    peak_bytes: float | None
    size: float | None
    step_seconds: float | None
    train: Series
    val: Series
    refreshed: Mapping[str, Series] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method, as it is called in the table, and its seeds."""

    label: str
    seeds: Sequence[Seen]

    def values(self, get: Get) -> list[float]:
        """A figure of every seed that has it."""
        return [value for each in self.seeds if (value := get(each)) is not None and math.isfinite(value)]

    def mean(self, get: Get) -> float | None:
        values = self.values(get)
        return statistics.fmean(values) if values else None


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A learning rate that was tried and what came of it; ``short``: over fewer steps than the others."""

    label: str
    lr: float
    value: float
    short: bool = False


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that a page says of runs that stand in one table.

    Attributes:
        title: in what they differ from those of the other comparisons; empty where there is one.
        question, answer: what was asked, and the sentences that answer it.
        metric: by which methods are compared, with its unit; ``lower``: whether less is better.
        loss, unit: the figure of validation curves with its unit, a loss or another (``is_loss``); what batches are
            counted in.
        table, best: the methods, and the row of the best one.
        rates, tried: every learning rate, where there were several.
        about: hardware, versions, commit, command.
        shared, differ: settings of all its runs, and those that some have otherwise.
        runs: the single runs.
        measured: rows of which memory may have been measured.
    """

    title: str
    question: str
    answer: Sequence[str]
    metric: str
    lower: bool
    loss: str
    unit: str
    table: Table
    best: int | None
    entries: Sequence[Entry]
    rates: Sequence[Tried]
    tried: Table | None
    about: Mapping[str, str]
    shared: Mapping[str, str]
    differ: Mapping[str, str]
    runs: Table
    is_loss: bool = True
    measured: Sequence[Row] = ()


def find_comparisons(paths: Sequence[Path], *, growing: bool = False) -> tuple[list[Comparison], str]:
    """What there is in files and folders to compare, and why it is in several tables, if it is.

    An experiment's results count for the runs that they were made of.

    Args:
        paths: folders of runs, of an experiment or of several, or files of results.
        growing: runs that have not come to their end count too, as far as they are.

    Raises:
        FileNotFoundError: a path has neither finished runs nor results.
        ValueError: a file of results is damaged.
    """
    found: list[Comparison] = []
    results: list[Result] = []
    unfinished: list[Unfinished] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}: name a folder of finished runs, or a results.json")
        experiments = find_experiments([path])
        found += map(of_results, experiments.values())
        if growing and not experiments and (path / "runs").is_dir():
            path = path / "runs"  # of an experiment at work
        begun = find_unfinished([path], growing=growing) if path.is_dir() else []
        try:
            results += find_results([path])
        except FileNotFoundError:
            if not experiments and not (growing and begun):
                raise
        unfinished += begun
    found += of_runs(results, unfinished)
    why = apart(groups([*results, *(each.result for each in unfinished)])) if results or unfinished else ""
    if len(found) > 1 and not why:
        why = "Each experiment has a table of its own: its methods had the same data, evaluator, budget and size."
    return found, why


def printed(found: Sequence[Comparison], width: int, why: str = "") -> str:
    """Questions, tables and sentences, for a terminal of so many columns."""

    def folded(*texts: str) -> list[str]:
        return [textwrap.fill(one_line(text), width, break_on_hyphens=False) for text in texts if text]

    parts = folded(why)
    for each in found:
        parts += folded(f"{each.title}:" if each.title else "", each.question)
        parts += [fitted_table(*each.table, width), *folded(*each.answer, each.about.get(_SAYS, ""))]
    return "\n\n".join(parts)


# --- of runs ---------------------------------------------------------------------------------------------------------


def of_runs(results: Sequence[Result], unfinished: Sequence[Unfinished] = ()) -> list[Comparison]:
    """Of runs that may be ranked with each other one comparison; those that have not ended are rows with a reason."""
    every = [*results, *(each.result for each in unfinished)]
    whys = {each.result.folder: each.why for each in unfinished}
    return [_of_group(group, whys) for group in groups(every)] if every else []


def _of_group(group: Group, whys: Mapping[Path, str]) -> Comparison:
    begun = rows(group.results)
    every = [
        Row(label=row.label, lr=row.lr, results=done)
        for row in begun
        if (done := tuple(each for each in row.results if each.folder not in whys))
    ]
    chosen = best_rates(every)
    several = len(every) > len(chosen)
    header, body = cells(chosen, _COSTS)
    for row in begun:
        for each in row.results:
            if each.folder in whys:
                seed = _repeated(each)
                body.append([row.label, f"{row.lr:.3g}", f"({seed})", whys[each.folder], *[""] * (len(header) - 4)])
    ranks = [row.rank for row in chosen]
    shared, differ = differences(group.results)
    names = list(dict.fromkeys(row.label for row in begun))
    recipes = ", ".join(dict.fromkeys(str(each.settings["recipe"]) for each in group.results))
    name = judged_by(every)
    split, _, figure = name.partition("_")
    split, figure = "validation" if split == "val" else split, HIGHER.get(figure, "")
    loss = loss_unit(group.results)
    if len(names) > 1:
        words = f"highest {figure}" if figure else "lowest loss"
        which = ", ".join(names) if len(names) <= 8 else f"{len(names)} methods and settings"
        question = f"{recipes}: which of {which} has the {words} on the {split} split?"
    else:
        question = f"{recipes}: what does {names[0]} come to?"
    return Comparison(
        title=group.title,
        question=question,
        answer=[verdict(every) if every else "No run has come to its end yet."],
        metric=f"{split} {figure}" if figure else f"{split} loss ({loss})",
        lower=name.endswith("loss"),
        loss=f"loss ({loss})",
        unit=next((u for u in _UNITS if any(f"{u}_per_second" in each.summary for each in group.results)), "tokens"),
        table=(header, body),
        best=ranks.index(min(ranks)) if ranks and min(ranks) < math.inf else None,
        entries=[
            Entry(label=row.label, seeds=[_seen(each, name) for each in row.results])
            for row in {row.label: row for row in (*begun, *chosen)}.values()
        ],
        rates=[Tried(label=r.label, lr=r.lr, value=v) for r in every if several and (v := r.mean(name)) is not None],
        tried=cells(every) if several else None,
        about=_about(group.results),
        shared={key: said(value) for key, value in shared.items()},
        differ={key: " · ".join(map(said, values)) for key, values in differ.items()},
        runs=_runs(group.results, whys),
        measured=chosen,
    )


def _peaks(row: Row) -> list[float]:
    return [peak for each in row.results if (peak := _peak(each)) is not None]


def _state(row: Row) -> str:
    state, total = row.mean("state_bytes"), row.mean("parameters_total")
    return "–" if state is None or not total else f"{state / total:.3g}"


_COSTS: Mapping[str, Callable[[Row], str]] = {
    "state B/param": _state,
    "seconds": lambda row: within(row.values("seconds")),
    "peak": lambda row: short_bytes(statistics.fmean(found)) if (found := _peaks(row)) else "–",
}


_UNITS = ("images", "sequences", "tokens")  # what throughput is counted in


def _seen(result: Result, name: str) -> Seen:
    timed = [r for r in result.log if isinstance(r.get("step_seconds"), (int, float))]
    sizes = [r["step_seconds"] * r[rate] for r in timed for unit in _UNITS if (rate := f"{unit}_per_second") in r]
    seconds = [r["step_seconds"] for r in timed]
    value = result.summary.get(name)
    return Seen(
        seed=_repeated(result),
        value=float(value) if isinstance(value, (int, float)) else None,
        peak_bytes=_peak(result),
        size=statistics.median(sizes) if sizes else None,
        step_seconds=statistics.fmean(seconds) if seconds else None,
        train=_series(result, "loss"),
        val=_series(result, "val_loss"),
        refreshed={each: series for each in REFRESHED if (series := _series(result, each))},
        layers=read_facts(result.folder / SPECTRA).get("layers", {}),
    )


def _repeated(result: Result) -> str:
    seed, fold = repeat(result)
    return f"{seed} fold {fold}" if fold else str(seed)


def _peak(result: Result) -> float | None:
    """What was measured by kind of step; else the highest that the log has."""
    measured = read_facts(result.folder / MEMORY).get("measured_peak_bytes", {})
    return max(measured.values(), default=result.summary.get("peak_bytes"))


def _series(result: Result, name: str) -> Series:
    return [(r["step"], float(r[name])) for r in result.log if isinstance(r.get(name), (int, float))]


def _about(results: Sequence[Result]) -> dict[str, str]:
    """Where the runs ran, each answer that occurs once."""
    found: dict[str, list[str]] = {"hardware": [], "date": [], "versions": [], "commit": [], "command": []}
    for each in results:
        env = read_facts(each.folder / "env.json")
        devices = [str(d.get("name")) for d in env.get("devices") or []]
        cores = f"{env['cores']} cores of {env.get('processor')}" if env.get("cores") else ""
        versions = {"python": env.get("python"), **env.get("packages", {})}
        command = [str(word) for word in env.get("command") or []]
        told = {
            "hardware": " + ".join(devices) or cores,
            "date": str(env.get("time", ""))[:10],
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
            "commit": str(env.get("commit") or ""),
            "command": shlex.join(["lowrank", *command[1:]]) if command else "",
        }
        for name, text in told.items():
            if text and text not in found[name]:
                found[name].append(text)
    return {name: "; ".join(texts[:5]) + ("; …" if texts[5:] else "") for name, texts in found.items() if texts}


def _runs(results: Sequence[Result], whys: Mapping[Path, str]) -> Table:
    header = ["folder", "method", "lr", "seed", "steps", "val loss", "best val loss", "ended"]
    body = []
    for each in results:
        losses = (each.summary.get(name) for name in ("val_loss", "best_val_loss"))
        shown = [f"{loss:#.4g}" if isinstance(loss, float) else "–" for loss in losses]
        lr, seed, steps = f"{each.settings['lr']:.3g}", _repeated(each), str(each.summary.get("steps", "–"))
        body.append([each.folder.name, each.method, lr, seed, steps, *shown, whys.get(each.folder, "yes")])
    return header, body


# --- of an experiment ------------------------------------------------------------------------------------------------


def of_results(results: Results) -> Comparison:
    """An experiment's comparison; its rows of the longest horizon."""
    main, env = results.at(), results.environment
    steps = max(results.horizons)
    table = results_cells(results, costs=True)
    rates = [
        Tried(label=each.method, lr=float(each.settings["lr"]), value=each.value, short=each.steps < steps)
        for each in results.trials
        if each.value is not None and isinstance(each.settings.get("lr"), (int, float))
    ]
    versions = ", ".join(f"{name} {version}" for name, version in dict(env.get("versions", {})).items())
    tuned = f"{len(results.trials)} trials under seed {', '.join(map(str, results.tuning_seeds))}"
    about = {
        "hardware": str(env.get("hardware", "")),
        "date": str(env.get("date", "")),
        "versions": versions,
        "commit": str(env.get("commit") or ""),
        "command": results.command,
        "seeds": ", ".join(map(str, results.seeds)) + (f"; tuned by {tuned}" if results.trials else "; not tuned"),
        "searched": _searched(results),
        "equal": results.equal,
        "time": f"{results.seconds / 60:.0f} minutes in all, tuning included",
        _SAYS: results.caveat,
    }
    names = (name for name in ("images", "sequences") if any(name in row.budget for row in main))
    unit = next(names, "tokens")
    return Comparison(
        title=f"{results.experiment} ({results.size}, {results.preset})",
        question=results.question,
        answer=findings(results),
        metric=f"{results.metric.replace('_', ' ')} ({results.unit})",
        lower=results.lower,
        is_loss=results.metric == "test_loss",
        loss=f"loss ({results.unit})"
        if results.metric == "test_loss"
        else results.metric.replace("test_", "validation "),
        unit=unit,
        table=table,
        best=0 if table[1] and results.mean(table[1][0][0]) is not None else None,
        entries=[
            Entry(label=m, seeds=[_seen_row(row, results.metric, unit) for row in main if row.method == m])
            for m in results.methods
        ],
        rates=rates,
        tried=_trials(results) if results.trials else None,
        about={name: text for name, text in about.items() if text},
        shared={name: said(value) for name, value in results.settings.items()},
        differ={},
        runs=_rows(results),
    )


def _searched(results: Results) -> str:
    """Each space that was searched, after the methods that have it."""
    found: dict[str, list[str]] = {}
    for method, space in results.space.items():
        if text := ", ".join(f"{name} of {said(list(values))}" for name, values in space.items()):
            found.setdefault(text, []).append(method)
    return "; ".join(f"{', '.join(methods)}: {text}" for text, methods in found.items())


def _seen_row(row: ResultsRow, metric: str, unit: str) -> Seen:
    size, seconds = row.budget.get(unit), row.seconds
    return Seen(
        seed=str(row.seed),
        value=row.figures.get(metric),
        peak_bytes=row.peak_bytes,
        size=size / row.steps if size and row.steps else None,
        step_seconds=seconds / row.steps if seconds and row.steps else row.step_seconds,
        train=row.curve.get("train", ()),
        val=row.curve.get("val", ()),
        refreshed={name: row.curve[name] for name in REFRESHED if row.curve.get(name)},
        layers=row.layers,
    )


def _trials(results: Results) -> Table:
    names = list(dict.fromkeys(name for each in results.trials for name in each.settings))
    header = ["method", *(name.removeprefix("method.") for name in names), "steps", "validation"]
    body = []
    for each in results.trials:
        value = each.error or ("–" if each.value is None else f"{each.value:#.4g}")
        settings = [said(each.settings[name]) if name in each.settings else "–" for name in names]
        body.append([each.method, *settings, str(each.steps), value])
    return header, body


def _rows(results: Results) -> Table:
    header = ["method", "seed", "steps", results.metric.replace("_", " "), "trained", "seconds", "ended"]
    body = []
    for row in results.rows:
        figure = row.figures.get(results.metric)
        figures = [
            "–" if figure is None else f"{figure:#.4g}",
            "–" if row.trained is None else short_count(row.trained),
        ]
        seconds = "–" if row.seconds is None else f"{row.seconds:.3g}"
        body.append([row.method, str(row.seed), str(row.steps), *figures, seconds, row.error or "yes"])
    return header, body
