"""Runs to tables: for a terminal, for Markdown, and as header and rows for a page.

A row is a method with its settings and learning rate; its seeds are averaged, and `±` is their sample standard
deviation. Runs of one method are told apart by the settings in which they differ. Where several learning rates were
tried the table keeps the best by validation. Runs of other lengths, or on other data, are not ranked with each other:
each such group has a table of its own.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lowrank.infra.progress import short_bytes, short_count
from lowrank.infra.text import one_line
from lowrank.report.runs import CONTENT, Result
from lowrank.report.statistics import compare, plus_minus, sentence, within
from lowrank.run.run import names_that

Table: TypeAlias = tuple[list[str], list[list[str]]]  # header and rows

# Settings of which runs in one table are alike, beside their length and all of their data's and their model's.
_ALIKE = ("task", "data", "model", "batch_size", "grad_accum", "eval_batches")
_FOLD = "data.fold"
_SENT = {"sent/step": "bytes_sent_per_step", "between": "bytes_sent_between_per_step", "DDP's": "ddp_bytes_per_step"}
HIGHER = {"auc": "AUC", "dice": "Dice"}  # figures of runs of which more is better, in the words of a reader
_FIXED = ("val_loss", "val_tokens", "val_published_convention", "val_images", "test_images", "test_loss")


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
        """Lower is better: the mean validation loss, or 1 − AUC (Dice) where runs have one; infinite where they have
        none."""
        for figure in HIGHER:
            if (value := self.mean(f"best_val_{figure}")) is not None:
                return 1.0 - value
        loss = self.mean("val_loss")
        return math.inf if loss is None else loss


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that may be ranked in one table; ``title`` says in what they differ from those of the other groups."""

    title: str
    results: tuple[Result, ...]


# --- runs that belong together ---------------------------------------------------------------------------------------


def groups(results: Sequence[Result]) -> list[Group]:
    """The runs by what makes their losses comparable: length, batch, data, how much of it evaluates, and the model."""
    names = [
        name
        for name in dict.fromkeys(name for each in results for name in each.settings)
        if (name in _ALIKE or name.startswith(("data.", "model.")))
        and name != _FOLD
        and (name != CONTENT or all(name in each.settings for each in results))
    ]
    if len({r.settings.get(_FOLD) for r in results}) == len(
        {(r.settings.get(_FOLD), r.settings.get(CONTENT)) for r in results}
    ):
        names = [name for name in names if name != CONTENT]  # each fold has content of its own, and always the same
    keys = [{"": each.length} | {name: said(each.settings.get(name)) for name in names} for each in results]
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
    return (
        "Runs of different lengths, of other models or batches or on different data are not ranked with each other: "
        "each group has its table."
    )


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
    telling, unnamed = {}, names_that("labels", False) | {CONTENT, _FOLD}
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


def loss_unit(results: Sequence[Result]) -> str:
    """What the loss is a mean over."""
    settings = [each.settings for each in results]
    if any(each["task"] != "text" for each in settings):
        return "nats per example"
    names = {"bytes": "nats per byte", "chars": "nats per character"}
    units = {names.get(str(each.get("data.tokenizer")), "nats per token") for each in settings}
    return units.pop() if len(units) == 1 else "nats per token"


# --- tables ----------------------------------------------------------------------------------------------------------


def cells(chosen: Sequence[Row], extra: Mapping[str, Callable[[Row], str]] | None = None) -> Table:
    """Header and body of the table, as text. Other validation figures of the runs (accuracy, …) get columns too, and of
    several ranks the bytes that each sent in a step, those of it to other workers, and what DDP would have sent; before
    these come ``extra`` columns."""
    names = sorted({name for row in chosen for each in row.results for name in each.summary} - set(_FIXED))
    others = [name for name in names if name.startswith(("val_", "test_")) and any(row.values(name) for row in chosen)]
    rates = [unit for unit in ("tokens", "images") if any(row.values(f"{unit}_per_second") for row in chosen)]
    sent = {title: name for title, name in _SENT.items() if any(row.values(name) for row in chosen)}
    repeats = "folds" if any(each.settings.get(_FOLD) for row in chosen for each in row.results) else "seeds"
    shown: dict[str, Callable[[Row], str]] = {
        "method": lambda row: row.label,
        "lr": lambda row: f"{row.lr:.3g}",
        repeats: lambda row: str(len({repeat(each) for each in row.results})),
        "val loss": _column("val_loss"),
        **{name: _column(name) for name in others},
        "trained": _column("parameters_trained", short_count),
        "state": _column("state_bytes", short_bytes),
        "s/step": lambda row: within(row.values("step_seconds")),
        **{f"{unit}/s": _column(f"{unit}_per_second", short_count) for unit in rates},
        "peak": _column("peak_bytes", short_bytes),
        **(extra or {}),
        **{title: _column(name, short_bytes) for title, name in sent.items()},
    }
    return list(shown), [[show(row) for show in shown.values()] for row in chosen]


def verdict(every: Sequence[Row]) -> str:
    """What the seeds of one group's rows allow to be said of them, the first being the baseline."""
    if len(best_rates(every)) < len(every):
        return "No test: several rates were tried on the split that is reported (an experiment does not)."
    name = judged_by(every)
    figures = {
        row.label: {
            repeat(each): float(each.summary[name])
            for each in row.results
            if isinstance(each.summary.get(name), (int, float))
        }
        for row in every
    }
    repeats = "folds" if name.startswith("test") else "seeds"
    return sentence(compare(figures, every[0].label, lower=name.endswith("loss")), repeats)


def judged_by(every: Sequence[Row]) -> str:
    """The figure by which methods are compared: the AUC, or Dice, where all have one, else the loss; of folds the
    test's."""
    split = "test" if any(each.settings.get(_FOLD) for row in every for each in row.results) else "val"
    having = (figure for figure in HIGHER if every and all(row.values(f"val_{figure}") for row in every))
    return f"{split}_{next(having, 'loss')}"


def repeat(result: Result) -> tuple[int, int]:
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


def latex_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A ``tabular`` without packages; what LaTeX would read as commands is escaped."""
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    named |= {"±": r"$\pm$", "−": "$-$", "×": r"$\times$", "–": "--", "|": "$|$"}
    named |= {sign: f"\\{sign}" for sign in "&%$#_{}"}

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(named.get(c, c) for c in one_line(cell)) for cell in cells) + r" \\"

    form = "l" + "r" * (len(header) - 1)
    lines = [rf"\begin{{tabular}}{{{form}}}", r"\hline", line(header), r"\hline", *map(line, body), r"\hline"]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def table_csv(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """As CSV; what a spreadsheet would take for a formula is text."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for name, *others in lines:
        name = one_line(name)
        writer.writerow([f"'{name}" if name[:1] in tuple("=+-@") else name, *others])
    return buffer.getvalue()


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
        return plus_minus(mean, spread)

    return shown
