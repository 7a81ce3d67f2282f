"""Runs to tables: for a terminal, for Markdown, and as header and rows for a page.

A row is a method with its settings and learning rate; its seeds are averaged, and `±` is their sample standard
deviation. Runs of one method are told apart by the settings in which they differ. Where several learning rates were
tried the table keeps the best by validation. Runs of other lengths, or on other data, are not ranked with each other:
each such group has a table of its own.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lowrank.infra.log import read_log
from lowrank.infra.progress import short_bytes, short_count
from lowrank.infra.text import one_line
from lowrank.report.statistics import compare, sentence
from lowrank.run.run import flat, names_that

Table: TypeAlias = tuple[list[str], list[list[str]]]  # header and rows

# Settings of which runs in one table are alike, beside their length and all of their data's.
_ALIKE = ("task", "data", "eval_batches")
_FOLD = "data.fold"
_CONTENT = "data.fingerprint"  # of what a run was trained on, whatever it is called

_SENT = {"sent/step": "bytes_sent_per_step", "between": "bytes_sent_between_per_step", "DDP's": "ddp_bytes_per_step"}
_FIXED = ("val_loss", "val_tokens", "val_published_convention", "val_images", "test_images", "test_loss")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run: its settings (dotted names), its summary and its log."""

    folder: Path
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]

    @property
    def method(self) -> str:
        return str(self.settings["method"])

    @property
    def length(self) -> str:
        """How long the run was, in the unit in which it was asked for."""
        if self.settings.get("steps") is None and self.settings.get("stop_at") is None:
            return f"{self.settings.get('epochs')} epochs"
        return f"{self.summary.get('steps')} steps"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs that differ by seed only."""

    label: str
    lr: float
    results: tuple[Result, ...]

    def values(self, name: str) -> list[float]:
        """A figure of every run that has it."""
        found = (each.summary.get(name) for each in self.results)
        return [value for value in found if isinstance(value, (int, float)) and math.isfinite(value)]

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return statistics.fmean(values) if values else None

    def spread(self, name: str) -> float | None:
        """Sample standard deviation over the seeds; None with a single one."""
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def rank(self) -> float:
        """Lower is better: the mean validation loss, or 1 − AUC where runs have one; infinite where they have none."""
        loss, auc = self.mean("val_loss"), self.mean("best_val_auc")
        if auc is not None:
            return 1.0 - auc
        return math.inf if loss is None else loss


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that may be ranked in one table; ``title`` says in what they differ from those of the other groups."""

    title: str
    results: tuple[Result, ...]


# --- finding runs ----------------------------------------------------------------------------------------------------


def to_stderr(text: str) -> None:
    print(one_line(text), file=sys.stderr)


def find_results(paths: Iterable[Path], *, say: Callable[[str], None] = to_stderr) -> list[Result]:
    """The finished runs in the folders given, or in the folders right below them in the order in which they began.

    Runs whose files are damaged are left out, and ``say`` is told the file.

    Raises:
        FileNotFoundError: a folder holds none.
    """
    results = []
    for path in paths:
        files = sorted(path.glob("*/run.json"), key=lambda file: (file.stat().st_mtime_ns, file))
        folders = [path] if (path / "run.json").is_file() else [file.parent for file in files]
        found = []
        for folder in folders:
            try:
                result = _read(folder)
            except ValueError as error:
                say(f"left out: {error}")
                continue
            found += [result] if result else []
        if not found:
            begun = f"; {len(folders)} unfinished or damaged" if folders else ""
            raise FileNotFoundError(f"there is no finished run (run.json with summary.json) in {path}{begun}")
        results += found
    return results


def is_finished(folder: Path, *, say: Callable[[str], None] = to_stderr) -> bool:
    """Whether a run has come to the end that its run.json asks for: it has a sound summary, and nobody stopped it.

    ``say`` is told of a damaged file.
    """
    try:
        return _read(folder) is not None
    except ValueError as error:
        say(f"not taken for finished: {error}")
        return False


def _read(folder: Path) -> Result | None:
    """A run's result; None where it has not finished.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    summary_file, log_file = folder / "summary.json", folder / "log.jsonl"
    if not summary_file.is_file():
        return None
    settings, summary = _settings(folder / "run.json"), _object(summary_file)
    done, asked = summary.get("steps"), [settings[name] for name in ("steps", "stop_at") if settings.get(name)]
    if not isinstance(done, int):
        raise ValueError(f"{summary_file} is damaged: it does not say how many steps were made")
    if summary.get("interrupted", False) or (asked and done < min(asked)):
        return None
    log = read_log(log_file) if log_file.is_file() else []
    if not all(isinstance(record, dict) and "step" in record for record in log):
        raise ValueError(f"{log_file} is damaged: a record has no step")
    return Result(folder=folder, settings=settings, summary=summary, log=log)


def _settings(file: Path) -> dict[str, Any]:
    """What a run.json sets, flat."""
    try:
        content = _object(file)
        settings = flat(content)
        if "fingerprint" in content["data"]:
            settings[_CONTENT] = content["data"]["fingerprint"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no run: {type(error).__name__} {error}") from error
    if missing := {"recipe", "task", "seed", "lr", "data", "method"} - settings.keys():
        raise ValueError(f"{file} holds no run: it has no {', '.join(sorted(missing))}")
    return settings


def _object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    return content


# --- runs that belong together ---------------------------------------------------------------------------------------


def groups(results: Sequence[Result]) -> list[Group]:
    """The runs by what makes their losses comparable: length, data, and how much of it evaluates."""
    names = [
        name
        for name in results[0].settings
        if (name in _ALIKE or (name.startswith("data.") and name != _FOLD)) and all(name in r.settings for r in results)
    ]
    if len({r.settings.get(_FOLD) for r in results}) == len(
        {(r.settings.get(_FOLD), r.settings.get(_CONTENT)) for r in results}
    ):
        names = [name for name in names if name != _CONTENT]  # each fold has content of its own, and always the same
    keys = [{"": each.length} | {name: said(each.settings[name]) for name in names} for each in results]
    distinct = [key for number, key in enumerate(keys) if key not in keys[:number]]
    differ = [name for name in ("", *names) if len({key[name] for key in distinct}) > 1]
    return [
        Group(
            title=", ".join(f"{name}={key[name]}" if name else key[name] for name in differ),
            results=tuple(each for each, own in zip(results, keys, strict=True) if own == key),
        )
        for key in distinct
    ]


def apart(found: Sequence[Group]) -> str:
    """Why there are several tables; empty where there is one."""
    if len(found) == 1:
        return ""
    return "Runs of different lengths or on different data are not ranked with each other: each group has its table."


def rows(results: Sequence[Result]) -> list[Row]:
    """The runs grouped by settings and learning rate, in the order in which they come."""
    found: dict[tuple[str, float], list[Result]] = {}
    for result, label in zip(results, _labels(results), strict=True):
        found.setdefault((label, result.settings["lr"]), []).append(result)
    return [Row(label=label, lr=lr, results=tuple(same)) for (label, lr), same in found.items()]


def best_rates(every: Sequence[Row]) -> list[Row]:
    """For each label the row with the best validation: the lowest mean loss, or the highest AUC where runs have one."""
    best: dict[str, Row] = {}
    for row in every:
        if row.label not in best or row.rank < best[row.label].rank:
            best[row.label] = row
    return list(best.values())


def differences(results: Sequence[Result]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Settings that all runs share, and those in which they differ with the values that occur."""
    names = list(dict.fromkeys(name for result in results for name in result.settings))
    values = {name: [each.settings[name] for each in results if name in each.settings] for name in names}
    distinct = {
        name: [value for i, value in enumerate(found) if value not in found[:i]] for name, found in values.items()
    }
    shared = {n: v[0] for n, v in distinct.items() if len(v) == 1 and len(values[n]) == len(results)}
    return shared, {name: found for name, found in distinct.items() if name not in shared}


def _labels(results: Sequence[Result]) -> list[str]:
    """Each run's method, with the settings in which runs of that method differ."""
    telling, unnamed = {}, names_that("labels", False) | {_CONTENT, _FOLD}
    for method in {result.method for result in results}:
        _, differ = differences([result for result in results if result.method == method])
        telling[method] = [name for name in differ if name not in unnamed]
    recipes = len({result.settings["recipe"] for result in results}) > 1
    labels = []
    for result in results:
        lead = f"{result.settings['recipe']} {result.method}" if recipes else result.method
        parts = [f"{name.removeprefix('method.')}={said(result.settings.get(name))}" for name in telling[result.method]]
        labels.append(" ".join([lead, *parts]))
    return labels


# --- tables ----------------------------------------------------------------------------------------------------------


def cells(chosen: Sequence[Row]) -> Table:
    """Header and body of the table, as text. Other validation figures of the runs (accuracy, …) get columns too, and of
    several ranks the bytes that each sent in a step, those of it to other workers, and what DDP would have sent."""
    names = sorted({name for row in chosen for each in row.results for name in each.summary} - set(_FIXED))
    extra = [name for name in names if name.startswith(("val_", "test_")) and any(row.values(name) for row in chosen)]
    rates = [unit for unit in ("tokens", "images") if any(row.values(f"{unit}_per_second") for row in chosen)]
    sent = {title: name for title, name in _SENT.items() if any(row.values(name) for row in chosen)}
    repeats = "folds" if any(each.settings.get(_FOLD) for row in chosen for each in row.results) else "seeds"
    shown: dict[str, Callable[[Row], str]] = {
        "method": lambda row: row.label,
        "lr": lambda row: f"{row.lr:.3g}",
        repeats: lambda row: str(len({_repeat(each) for each in row.results})),
        "val loss": _column("val_loss"),
        **{name: _column(name) for name in extra},
        "trained": _column("parameters_trained", short_count),
        "state": _column("state_bytes", short_bytes),
        "s/step": _column("step_seconds", "{:.3g}".format),
        **{f"{unit}/s": _column(f"{unit}_per_second", short_count) for unit in rates},
        "peak": _column("peak_bytes", short_bytes),
        **{title: _column(name, short_bytes) for title, name in sent.items()},
    }
    return list(shown), [[show(row) for show in shown.values()] for row in chosen]


def printed(results: Sequence[Result], width: int) -> str:
    """The tables of the best learning rates, for a terminal of so many columns."""
    found = groups(results)
    parts = [apart(found)] if len(found) > 1 else []
    for group in found:
        parts += [f"{one_line(group.title)}:"] if group.title else []
        header, body = cells(best_rates(rows(group.results)))
        parts.append(fitted_table(header, body, width))
    return "\n\n".join(parts)


def verdicts(results: Sequence[Result]) -> list[str]:
    """Of each group what its seeds allow to be said of the methods beside the first, in a sentence.

    Nothing where rates were chosen by the very figures that would be tested.
    """
    told = []
    for group in groups(results):
        every = rows(group.results)
        if len(every) < 2:
            continue
        lead = f"{one_line(group.title)}: " if group.title else ""
        if len(best_rates(every)) < len(every):
            told.append(
                f"{lead}No test: several rates were tried on the split that is reported (an experiment does not)."
            )
            continue
        folded = any(each.settings.get(_FOLD) for row in every for each in row.results)
        auc, split = all(row.values("val_auc") for row in every), "test" if folded else "val"
        name = f"{split}_auc" if auc else f"{split}_loss"
        figures = {
            row.label: {
                _repeat(each): float(each.summary[name])
                for each in row.results
                if isinstance(each.summary.get(name), (int, float))
            }
            for row in every
        }
        text = sentence(compare(figures, every[0].label, lower=not auc))
        told.append(lead + (text.replace(" seeds", " folds") if folded else text))
    return told


def _repeat(result: Result) -> tuple[int, int]:
    """What runs of one row differ by: the seed, and the fold that was tested."""
    return result.settings["seed"], result.settings.get(_FOLD) or 0


def fitted_table(header: Sequence[str], body: Sequence[Sequence[str]], width: int) -> str:
    """A table of at most ``width`` columns: names are folded, and what does not fit beside them goes below."""
    fold = textwrap.TextWrapper(max(20, width // 3), subsequent_indent="  ", break_on_hyphens=False).wrap
    names = [fold(one_line(line[0])) for line in body]
    sizes = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    left = max(len(header[0]), *(len(part) for name in names for part in name))
    blocks: list[list[int]] = [[]]
    for column in range(1, len(header)):
        if blocks[-1] and left + sum(sizes[at] + 2 for at in [*blocks[-1], column]) > width:
            blocks.append([])
        blocks[-1].append(column)
    texts = []
    for block in blocks:
        lines = []
        for name, line in zip(names, body, strict=True):
            lines.append([name[0], *(line[at] for at in block)])
            lines += [[part, *("" for _ in block)] for part in name[1:]]
        texts.append(text_table([header[0], *(header[at] for at in block)], lines))
    return "\n\n".join(texts)


def text_table(header: Sequence[str], body: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Aligned columns: those in `left` to the left, figures to the right."""
    body = [[one_line(cell) for cell in line] for line in body]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [header, ["─" * width for width in widths], *body]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """GitHub's tables; what would be markup inside a cell is escaped."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [[re.sub(r"([\\`*<|$]|(?<=\])\()", r"\\\1", one_line(cell)) for cell in line] for line in body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def said(value: Any) -> str:
    """A setting's value as it would be typed."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(said, value))
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _column(name: str, show: Callable[[float], str] | None = None) -> Callable[[Row], str]:
    """What a column shows of a row: its mean, with the spread over its seeds where ``show`` is None."""

    def shown(row: Row) -> str:
        mean, spread = row.mean(name), row.spread(name)
        if mean is None:
            return "–"
        if show is not None:
            return show(mean)
        return f"{mean:.4f}" + ("" if spread is None else f" ± {spread:.4f}")

    return shown
