"""Experiments executed: what is missing is run, and everything that was run becomes one table of results.

    while something is missing:  tune every contender as far as its finished trials reach  →  run what that lacks
    then                         rows, one per method, horizon and seed, and the file of results

Nothing is remembered but the folders of the runs: the same call again, after whatever stopped it, goes on where it was.
A run's folder is named after what it is, so that it is found without a list. The reported figure is read once, from a
finished run's last checkpoint, and kept in ``test.json`` beside it.
"""

from __future__ import annotations

import functools
import hashlib
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowrank.evaluate.export import export
from lowrank.evaluate.score import score
from lowrank.infra import checkpoint
from lowrank.infra.environment import environment
from lowrank.infra.files import read_facts, read_json, write_json
from lowrank.infra.log import read_log
from lowrank.report.comparison import REFRESHED, SPECTRA
from lowrank.report.results import Results, Row, Trial
from lowrank.report.runs import FAILED, is_finished
from lowrank.run.experiment import (
    Attempt,
    Contender,
    Experiment,
    Tuned,
    Value,
    incomparable,
    refuse_spaces,
    reported,
    tune,
)
from lowrank.run.memory_estimate import estimate
from lowrank.run.overrides import catalogue, fingerprint, override, told_to_learn
from lowrank.run.run import Run, flat
from lowrank.run.session import open_session, task_of
from lowrank.run.validation import validate
from lowrank.train.changed_data import ChangedDataError
from lowrank.train.loop import train
from lowrank.train.memory import MEMORY
from lowrank.train.step_time import measured

Say = Callable[[str], None]
TEST, BUDGET = "test.json", "budget.json"
_mark = functools.lru_cache(maxsize=4096)(fingerprint)
_PLAIN = "exported"
_POINTS = 40  # of a curve in the file of results
_BATCHES = (4, 3, 2, 1.5, 1.25)  # times the baseline's, tried for methods that leave memory


def run_experiment(
    experiment: Experiment, out: Path, *, command: str, jobs: int = 1, quiet: bool = True, say: Say = print
) -> Results:
    """Run what is missing of an experiment under ``out``, and write and return its results.

    Args:
        experiment: what to run.
        out: gets ``runs/`` with a folder a run, and ``results.json``.
        command: the command line that is asked for the same again.
        jobs: processes at a time.
        quiet: no progress line of single runs.
        say: is told what happens.

    Raises:
        ValueError: the methods could not be compared with each other, a run could not do what it says, or the data has
            changed under finished runs.
        KeyboardInterrupt: it was stopped; the same call goes on.
    """
    if reasons := incomparable(experiment):
        lines = [f"{name}: {reason}" for name, reason in reasons.items()]
        raise ValueError(f"{experiment.name} would compare what cannot be compared:\n" + "\n".join(lines))
    for each in experiment.contenders:
        validate(each.run)
    refuse_spaces(experiment)
    folder = out / "runs"
    experiment = _equalised(experiment, out)
    say(f"{experiment.name} ({experiment.size}): {_forecast(experiment, folder)}")
    failed: dict[Path, str] = {}
    while missing := _missing(experiment, folder, failed):
        failed |= _execute(missing, folder, jobs=jobs, quiet=quiet, test_batches=experiment.test_batches, say=say)
    _contents(folder)
    results = _results(experiment, folder, failed, command)
    results.write(out)
    return results


# --- what there is, and what is missing ------------------------------------------------------------------------------


def folder_of(root: Path, contender: Contender, run: Run) -> Path:
    """Where a run of a contender lies: its name, and a digest of everything that determines it."""
    marks = [_mark(run)] + ([] if contender.start is None else [_mark(contender.start)])
    slug = re.sub(r"[^\w.=-]+", "_", f"{contender.name}_{run.steps}_seed_{run.seed}").strip("_")
    return root / f"{slug[:60]}-{hashlib.sha256(' '.join(marks).encode()).hexdigest()[:12]}"


def _contents(root: Path) -> dict[tuple[object, ...], str]:
    """What finished runs have learnt from, by what they are told to; of one table it is one content of the data.

    Raises:
        ChangedDataError: it has changed between two of them.
    """
    found: dict[tuple[object, ...], tuple[str, Path]] = {}
    for place in sorted(each.parent for each in root.glob("*/summary.json") if is_finished(each.parent)):
        run = Run.read(place / "run.json")
        now = run.data.fingerprint  # which runs of before have not
        content, other = found.setdefault(told_to_learn(run), (now, place)) if now else ("", place)
        if content != now:
            raise ChangedDataError(
                f"the content of {run.data.args.get('source')} has changed between {other} and {place}, which cannot "
                "stand in one table: give --out NEW, or put the data back and remove what was trained on the other"
            )
    return {told: content for told, (content, _) in found.items()}


def _attempts(experiment: Experiment, root: Path, failed: Mapping[Path, str]) -> Iterator[tuple[Contender, Tuned]]:
    def known(attempt: Attempt) -> tuple[bool, Value]:
        place = folder_of(root, attempt.contender, attempt.run)
        if _failure(place, failed):
            return True, None
        if not is_finished(place):
            return False, None
        return True, read_json(place / "summary.json").get(experiment.judged_by)

    for contender in experiment.contenders:
        yield contender, tune(contender, experiment, known)


def _missing(experiment: Experiment, root: Path, failed: Mapping[Path, str]) -> list[Attempt]:
    """What can be run now: the next trials of contenders that are being tuned, the reported runs of the others."""
    found: list[Attempt] = []
    for contender, tuned in _attempts(experiment, root, failed):
        found += tuned.missing
        if tuned.best is not None and not tuned.missing:
            for each in reported(contender, experiment, tuned.best):
                place = folder_of(root, contender, each.run)
                if not (_failure(place, failed) or (is_finished(place) and (place / TEST).is_file())):
                    found.append(each)
    return found


def _failure(place: Path, failed: Mapping[Path, str]) -> str | None:
    """Why a run has no figures: it diverged, then or now, or went wrong in this call; other faults are tried again."""
    if place in failed:
        return failed[place]
    return str(read_json(place / FAILED)["error"]) if (place / FAILED).is_file() else None


# --- running ---------------------------------------------------------------------------------------------------------


def _execute(
    attempts: Sequence[Attempt], root: Path, *, jobs: int, quiet: bool, test_batches: int | None, say: Say
) -> dict[Path, str]:
    """Run them; what failed, by folder, with the reason."""
    failed: dict[Path, str] = {}
    for start in dict.fromkeys(each.contender.start for each in attempts if each.contender.start is not None):
        _started(start, root, quiet)
    contents, calls = _contents(root), []
    for each in attempts:
        data = replace(each.run.data, fingerprint=contents.get(told_to_learn(each.run), ""))
        place = folder_of(root, each.contender, each.run)
        batches = test_batches if each.rung is None else False
        calls.append((replace(each.run, data=data), place, each.contender.start, root, quiet, batches))
    if jobs > 1:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                errors = list(pool.map(_one, *zip(*calls, strict=True)))
            except BrokenProcessPool as broken:
                raise ChildProcessError(
                    f"one of {jobs} processes that train runs was killed from outside, by the system if memory ran "
                    "out: what is finished is kept, and the same command with fewer --jobs goes on"
                ) from broken
    else:
        errors = []
        for number, (each, call) in enumerate(zip(attempts, calls, strict=True), start=1):
            kind = "reported" if each.rung is None else f"trial, round {each.rung + 1}"
            settings = " ".join(f"{name}={value}" for name, value in each.settings.items())
            say(f"[{number}/{len(attempts)}] {each.contender.name} {settings} seed {each.run.seed}, {kind}")
            errors.append(_one(*call))
    for (_, place, *_), why in zip(calls, errors, strict=True):
        if why is not None:
            failed[place] = why
            say(f"failed: {place.name}: {why}")
    return failed


def _one(
    run: Run, place: Path, start: Run | None, root: Path, quiet: bool, test_batches: int | bool | None
) -> str | None:
    """Train a run, going on with what there is of it, and read its reported figure where it is one of those; an error's
    text, which belongs to this run alone.

    Raises:
        KeyboardInterrupt: it was stopped from outside.
        ChangedDataError: the data is not what finished runs have learnt from.
    """
    try:
        if not is_finished(place):
            resume = bool(checkpoint.saved(place / "checkpoints"))
            origin = None if start is None else _place_of(start, root)
            if origin is not None and _takes_weights(run):
                run, origin = override(run, {"model.weights": str((origin / _PLAIN).absolute())}), None
            began = time.perf_counter()
            how: dict[str, Any] = {"beside": True, "judge": False, "quiet": quiet}
            if train(run, place, resume=resume, init_from=origin, **how).get("interrupted"):
                raise KeyboardInterrupt
            write_json(place / "wall.json", {"seconds": time.perf_counter() - began})
        if test_batches is not False and not (place / TEST).is_file():
            last: dict[str, Any] = {"checkpoint": "latest", "batch_size": max(run.batch_size, 32)}
            write_json(place / TEST, score(str(place), split="test", batches=test_batches, **last))
    except ChangedDataError:
        raise
    except (ArithmeticError, ValueError) as error:
        if isinstance(error, ArithmeticError):  # it diverged, and would again
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / FAILED, {"error": f"{type(error).__name__}: {error}"})
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _started(start: Run, root: Path, quiet: bool) -> None:
    """The run that others start from, once; also as a plain model, where models take weights and have a head."""
    place = _place_of(start, root)
    if not is_finished(place):
        error = _one(start, place, None, root, quiet, False)
        if error is not None:
            raise ValueError(f"the run that others start from failed ({place}): {error}")
    if _takes_weights(start) and not (place / _PLAIN).is_dir():
        export(place, place / _PLAIN, which="latest")


def _place_of(start: Run, root: Path) -> Path:
    return folder_of(root, Contender(name="start", run=start), start)


def _takes_weights(run: Run) -> bool:
    return "weights" in catalogue().signature("model", run.model.name).kinds


# --- equal what, and how long ----------------------------------------------------------------------------------------


def _equalised(experiment: Experiment, out: Path) -> Experiment:
    """With steps or batches such that all take the baseline's seconds or its peak of memory; decided once a folder."""
    if experiment.equal == "tokens":
        return experiment
    file, base = out / BUDGET, _contender(experiment, experiment.baseline)
    kept: dict[str, int] = read_json(file).get(experiment.equal, {}) if file.is_file() else {}
    if missing := [each for each in experiment.contenders if each.name not in kept]:
        size = _seconds if experiment.equal == "seconds" else _bytes
        limit = size(base.run)
        for each in missing:
            if experiment.equal == "seconds":
                kept[each.name] = max(1, round((base.run.steps or 1) * limit / size(each.run)))
            else:
                batches = [int(base.run.batch_size * times) for times in _BATCHES]
                fits = (n for n in batches if each is not base and size(replace(each.run, batch_size=n)) <= limit)
                kept[each.name] = next(fits, base.run.batch_size)
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, {experiment.equal: kept})
    name = "steps" if experiment.equal == "seconds" else "batch_size"
    runs = [replace(each, run=override(each.run, {name: kept[each.name]})) for each in experiment.contenders]
    return replace(experiment, contenders=runs)


def _seconds(run: Run) -> float:
    """Of a whole run, compiling (in the first step) included, by steps timed here."""
    session = open_session(run)
    began = time.perf_counter()
    measured(session, 1)
    first = time.perf_counter() - began if run.compile else 0.0
    return first / max(1, run.steps or 1) + measured(session, 5)


def _bytes(run: Run) -> float:
    return float(estimate(run, on_card=run.device != "cpu" and torch.cuda.is_available()).total)


def _forecast(experiment: Experiment, root: Path) -> str:
    """How many runs are missing at most and how long they take: by earlier runs here, else by timed steps."""
    runs, steps = 0, 0.0
    for each in experiment.contenders:
        points = min(experiment.trials, math.prod(len(values) for values in each.space.values()))
        tuning = (points, max(1, points // experiment.shrink)) if points > 1 else (0, 0)
        runs += sum(tuning) + len(experiment.horizons) * len(experiment.seeds)
        share = tuning[0] / experiment.shrink + tuning[1] + sum(experiment.horizons) * len(experiment.seeds)
        steps += share * (each.run.steps or 0)
    made = [
        (read_json(file)["seconds"], done)
        for file in root.glob("*/wall.json")
        if (done := read_json(file.with_name("summary.json")).get("steps"))
    ]
    if made:
        seconds, how = sum(s for s, _ in made) / sum(n for _, n in made), f"by {len(made)} earlier runs"
    else:
        seconds, how = measured(open_session(_contender(experiment, experiment.baseline).run)), "by timed steps"
    left = max(0.0, steps - sum(n for _, n in made))
    minutes = math.ceil(left * seconds / 60)
    return f"{runs} runs, {len(made)} made; about {minutes} minute{'s' * (minutes != 1)} more ({how})"


def _contender(experiment: Experiment, name: str) -> Contender:
    return next(each for each in experiment.contenders if each.name == name)


# --- results ---------------------------------------------------------------------------------------------------------


def _results(experiment: Experiment, root: Path, failed: Mapping[Path, str], command: str) -> Results:
    rows: list[Row] = []
    trials: list[Trial] = []
    for contender, tuned in _attempts(experiment, root, failed):
        trials += [_trial(each, experiment, root, failed) for each in tuned.done]
        if tuned.best is None:
            why = next((each.error for each in trials if each.method == contender.name and each.error), "")
            steps = contender.run.steps or 0
            failing = f"every trial failed: {why}"
            rows += [Row(method=contender.name, seed=s, steps=steps, error=failing) for s in experiment.seeds]
            continue
        for each in reported(contender, experiment, tuned.best):
            rows.append(_row(each, tuned.edge, experiment, root, failed))
    shared = [flat(each.run.to_json()) for each in experiment.contenders]
    return Results(
        experiment=experiment.name,
        size=experiment.size,
        preset=experiment.preset,
        question=experiment.question,
        caveat=experiment.caveat,
        command=command,
        baseline=experiment.baseline,
        metric=experiment.metric,
        lower=experiment.lower,
        unit=experiment.unit,
        equal=experiment.equal,
        seeds=list(experiment.seeds),
        tuning_seeds=[experiment.tuning_seed],
        environment=_where(),
        settings={n: _portable(n, v) for n, v in shared[0].items() if all(o.get(n) == v for o in shared)},
        seconds=sum(read_json(file)["seconds"] for file in root.glob("*/wall.json")),
        space={each.name: {n: list(values) for n, values in each.space.items()} for each in experiment.contenders},
        trials=trials,
        rows=_with_steps_to_baseline(rows, experiment),
    )


def _trial(each: Attempt, experiment: Experiment, root: Path, failed: Mapping[Path, str]) -> Trial:
    place = folder_of(root, each.contender, each.run)
    about: Any = {"method": each.contender.name, "rung": each.rung, "steps": each.steps, "seed": each.run.seed}
    about |= {"settings": dict(each.settings)}
    if error := _failure(place, failed):
        return Trial(**about, error=error)
    summary = read_json(place / "summary.json")
    return Trial(**about, value=summary.get(experiment.judged_by), seconds=summary.get("seconds"))


def _row(each: Attempt, edge: Sequence[str], experiment: Experiment, root: Path, failed: Mapping[Path, str]) -> Row:
    place, run = folder_of(root, each.contender, each.run), each.run
    about: Any = {"method": each.contender.name, "seed": run.seed, "steps": each.steps, "call": run.method.to_json()}
    about |= {"settings": dict(each.settings), "edge": list(edge)}
    if error := _failure(place, failed):
        return Row(**about, error=error)
    summary, test, log = read_json(place / "summary.json"), read_json(place / TEST), read_log(place / "log.jsonl")
    unit, context = task_of(run).unit, run.data.args.get("context")
    size = run.batch_size * run.grad_accum * (context if unit == "tokens" and isinstance(context, int) else 1)
    peaks = read_facts(place / MEMORY).get("measured_peak_bytes", {})
    sent = summary.get("bytes_sent_per_step")
    return Row(
        **about,
        budget={unit: size * each.steps, "batch_size": run.batch_size},
        figures={n: v for n, v in summary.items() if n.startswith("val_")} | {f"test_{n}": v for n, v in test.items()},
        peak_bytes=max(peaks.values(), default=summary.get("peak_bytes")),
        state_bytes=summary.get("state_bytes"),
        seconds=summary.get("seconds"),
        step_seconds=summary.get("step_seconds"),
        wire_bytes=None if sent is None else int(sent * each.steps),
        trained=summary.get("parameters_trained"),
        total=summary.get("parameters_total"),
        curve={"train": _thin(log, "loss"), "val": _thin(log, experiment.judged_by)}
        | {name: series for name in REFRESHED if (series := _thin(log, name))},
        layers=read_facts(place / SPECTRA).get("layers", {}),
    )


def _thin(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, mean of the records since the point before) at no more than so many steps."""
    points = [(record["step"], record[name]) for record in log if record.get(name) is not None]
    width = max(1, math.ceil(len(points) / _POINTS))
    chunks = [points[at : at + width] for at in range(0, len(points), width)]
    return [(chunk[-1][0], round(statistics.fmean(value for _, value in chunk), 5)) for chunk in chunks]


def _with_steps_to_baseline(rows: Sequence[Row], experiment: Experiment) -> list[Row]:
    """With the first step at which a run is as good as the baseline's at its end, by validation, same seed and place
    among the horizons."""
    sign = 1 if experiment.lower else -1
    horizons = {m: sorted({r.steps for r in rows if r.method == m}) for m in {row.method for row in rows}}
    goal = {
        (row.seed, horizons[row.method].index(row.steps)): sign * row.curve["val"][-1][1]
        for row in rows
        if row.method == experiment.baseline and row.curve.get("val")
    }
    found = []
    for row in rows:
        wanted = goal.get((row.seed, horizons[row.method].index(row.steps)))
        reached = [step for step, value in row.curve.get("val", ()) if wanted is not None and sign * value <= wanted]
        found.append(replace(row, steps_to_baseline=reached[0] if reached else None))
    return found


def _portable(name: str, value: Any) -> Any:
    """A file of data by its name: where it lies is nobody's business."""
    return Path(value).name if name in ("data.source", "data.labels") and isinstance(value, str) else value


def _where() -> dict[str, Any]:
    """Of the environment what a reader of results needs."""
    found = environment()
    devices = [each["name"] for each in found["devices"]]
    hardware = " + ".join(devices) or f"{found['cores']} cores of {found['processor']}"
    return {
        "hardware": hardware,
        "threads": found["threads"],
        "date": found["time"][:10],
        "commit": found["commit"],
        "versions": {"python": found["python"], **found["packages"]},
    }
