"""Runs to a table, a picture of the loss curves and one self-contained page.

A row of the table is a method with its settings and learning rate; its seeds are averaged, and `±` is their sample
standard deviation. Runs of one method are told apart by the settings in which they differ. Where several learning
rates were tried the table keeps the best by validation loss, and a second table lists them all.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.infra.log import read_log
from lowrank.infra.progress import short_bytes, short_count
from lowrank.run.run import flat, names_that

# Settings that neither name a row nor are shared by its runs, or that only say what is written.
_SENT = {"sent/step": "bytes_sent_per_step", "between": "bytes_sent_between_per_step", "DDP's": "ddp_bytes_per_step"}


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


def find_results(paths: Iterable[Path]) -> list[Result]:
    """The finished runs in the folders given, or in the folders right below them in the order in which they began.

    Raises:
        FileNotFoundError: a folder holds none.
    """
    results = []
    for path in paths:
        files = sorted(path.glob("*/run.json"), key=lambda file: (file.stat().st_mtime_ns, file))
        folders = [path] if (path / "run.json").is_file() else [file.parent for file in files]
        finished = [folder for folder in folders if is_finished(folder)]
        if not finished:
            begun = f"; {len(folders)} unfinished" if folders else ""
            raise FileNotFoundError(f"there is no finished run (run.json with summary.json) in {path}{begun}")
        results += [_read(folder) for folder in finished]
    return results


def is_finished(folder: Path) -> bool:
    """Whether a run has ended by itself: it has a summary, and nobody stopped it."""
    summary = folder / "summary.json"
    return summary.is_file() and not json.loads(summary.read_text(encoding="utf-8")).get("interrupted", False)


def rows(results: Sequence[Result]) -> list[Row]:
    """The runs grouped by settings and learning rate, in the order in which they come."""
    groups: dict[tuple[str, float], list[Result]] = {}
    labels = _labels(results)
    for result, label in zip(results, labels, strict=True):
        groups.setdefault((label, result.settings["lr"]), []).append(result)
    return [Row(label=label, lr=lr, results=tuple(group)) for (label, lr), group in groups.items()]


def best_rates(every: Sequence[Row]) -> list[Row]:
    """For each label the row with the best validation: the lowest mean loss, or the highest AUC where runs have one."""
    best: dict[str, Row] = {}
    for row in every:
        if row.label not in best or _loss(row) < _loss(best[row.label]):
            best[row.label] = row
    return list(best.values())


def cells(chosen: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table, as text. Other validation figures of the runs (accuracy, …) get columns too, and of
    several ranks the bytes that each sent in a step, those of it to other workers, and what DDP would have sent."""
    fixed = ("val_loss", "val_tokens", "val_published_convention", "val_images", "test_images", "test_loss")
    extra = sorted({name for row in chosen for each in row.results for name in each.summary if _is_metric(name)})
    extra = [name for name in extra if name not in fixed and any(row.values(name) for row in chosen)]
    units = [unit for unit in ("tokens", "images") if any(row.values(f"{unit}_per_second") for row in chosen)]
    rates = [f"{unit}/s" for unit in units]
    sent = {title: name for title, name in _SENT.items() if any(row.values(name) for row in chosen)}
    header = ["method", "lr", "seeds", "val loss", *extra, "trained", "state", "s/step", *rates, "peak", *sent]
    body = [
        [
            row.label,
            f"{row.lr:.3g}",
            str(len({each.settings["seed"] for each in row.results})),
            _with_spread(row, "val_loss"),
            *(_with_spread(row, name) for name in extra),
            _shown(row.mean("parameters_trained"), short_count),
            _shown(row.mean("state_bytes"), short_bytes),
            _shown(row.mean("step_seconds"), "{:.3g}".format),
            *(_shown(row.mean(f"{unit}_per_second"), short_count) for unit in units),
            _shown(row.mean("peak_bytes"), short_bytes),
            *(_shown(row.mean(name), short_bytes) for name in sent.values()),
        ]
        for row in chosen
    ]
    return header, body


def printable(text: str) -> str:
    """The text with characters that cannot be seen, or that would steer a terminal, as their escapes.

    >>> print(printable("a\\x1b[31mb"))
    a\\x1b[31mb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def text_table(header: Sequence[str], body: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Aligned columns: those in `left` to the left, figures to the right."""
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
    """GitHub's tables; a bar inside a cell is escaped."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def differences(results: Sequence[Result]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Settings that all runs share, and those in which they differ with the values that occur."""
    names = list(dict.fromkeys(name for result in results for name in result.settings))
    values = {name: [each.settings[name] for each in results if name in each.settings] for name in names}
    distinct = {
        name: [value for i, value in enumerate(found) if value not in found[:i]] for name, found in values.items()
    }
    shared = {n: v[0] for n, v in distinct.items() if len(v) == 1 and len(values[n]) == len(results)}
    return shared, {name: found for name, found in distinct.items() if name not in shared}


def _read(folder: Path) -> Result:
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    settings = flat(run)
    log = read_log(folder / "log.jsonl") if (folder / "log.jsonl").is_file() else []
    return Result(folder=folder, settings=settings, summary=summary, log=log)


def _labels(results: Sequence[Result]) -> list[str]:
    """Each run's method, with the settings in which runs of that method differ."""
    by_method: dict[str, list[Result]] = {}
    for result in results:
        by_method.setdefault(result.method, []).append(result)
    telling, unnamed = {}, names_that("labels", False)
    for method, same in by_method.items():
        _, differ = differences(same)
        telling[method] = [name for name in differ if name not in unnamed]
    recipes = len({result.settings["recipe"] for result in results}) > 1
    labels = []
    for result in results:
        parts = [f"{name.removeprefix('method.')}={result.settings.get(name)}" for name in telling[result.method]]
        lead = f"{result.settings['recipe']} {result.method}" if recipes else result.method
        labels.append(" ".join([lead, *parts]))
    return labels


def _is_metric(name: str) -> bool:
    return name.startswith(("val_", "test_"))


def _loss(row: Row) -> float:
    loss, auc = row.mean("val_loss"), row.mean("best_val_auc")
    if auc is not None:
        return 1.0 - auc
    return math.inf if loss is None else loss


def _with_spread(row: Row, name: str) -> str:
    mean, spread = row.mean(name), row.spread(name)
    if mean is None:
        return "–"
    return f"{mean:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _shown(value: float | None, show: Any) -> str:
    return "–" if value is None else str(show(value))
