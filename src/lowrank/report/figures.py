"""The pictures of a report with the numbers behind each: loss against steps, tokens, seconds; quality against memory;
every rate that was tried.

Drawn with matplotlib; ``svg`` gives a picture that takes the colours of the page around it, ``table`` its numbers.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lowrank.infra.extras import import_extra
from lowrank.infra.text import one_line

# Okabe and Ito's colours, which people with colour blindness tell apart; beyond eight methods the dashes change.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C6D1F")
_DASHES = ("-", "--", ":", "-.")
_INK, _GRID = "#010203", "#d8dee4"  # the page's own text colour and lines stand for these in an SVG

Series: TypeAlias = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A method in pictures.

    Attributes:
        label: its name.
        training, validation: a curve a seed, (step, loss).
        size: tokens or images a step; None: not known.
        step_seconds: the median.
        peak: bytes; None: not measured.
        quality: the reported figure of each seed.
    """

    label: str
    training: Sequence[Series] = ()
    validation: Sequence[Series] = ()
    size: float | None = None
    step_seconds: float | None = None
    peak: float | None = None
    quality: Sequence[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of matplotlib with its file's name, its title, and the numbers behind it."""

    name: str
    title: str
    figure: Any
    header: Sequence[str]
    body: Sequence[Sequence[object]]

    def svg(self) -> str:
        """The picture as it can stand within a page; no name in it occurs in another picture."""
        target = io.StringIO()
        with _plain():
            self.figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = target.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{self.name}-", text)
        width = f"max-width: {self.figure.get_size_inches()[0] * 82:.0f}px"
        text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
        text = text.replace("<svg", f'<svg role="img" aria-label="{self.title}" style="{width}"', 1)
        return text.replace(_INK, "currentColor").replace(_GRID, "var(--line)")

    def table(self) -> str:
        """The numbers as CSV."""
        target = io.StringIO()
        rows = [[_cell(value) for value in row] for row in (self.header, *self.body)]
        csv.writer(target, lineterminator="\n").writerows(rows)
        return target.getvalue()


def curves(lines: Sequence[Line], unit: str) -> Picture:
    """Training loss (smoothed) and validation loss by step: one colour a line, its seeds' range as a band."""
    figure, (training, validation) = _figure(2)
    handles: dict[str, Any] = {}
    for line, look in _looks(lines):
        seen = _curve(validation, line.validation, look | {"marker": "o"})
        drawn = _curve(training, [_smooth(each) for each in line.training], look) or seen
        handles |= {one_line(line.label): drawn} if drawn else {}
    _label(training, "training loss, smoothed", "optimizer step", f"loss ({unit})")
    _label(validation, "validation loss", "optimizer step", f"loss ({unit})")
    for axes in (training, validation):
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, handles)
    body = [
        [line.label, seed, kind, step, value]
        for line in lines
        for kind, several in (("training", line.training), ("validation", line.validation))
        for seed, series in enumerate(several, start=1)
        for step, value in series
    ]
    header = ["method", "run", "split", "step", "loss"]
    return Picture(name="curves", title="Loss against steps", figure=figure, header=header, body=body)


def costs(lines: Sequence[Line], unit: str, seen: str) -> Picture | None:
    """Validation loss against what was seen (``seen``: tokens, images) and against seconds of training."""
    known = [line for line in lines if line.validation and line.size and line.step_seconds]
    if not known:
        return None
    figure, (by_size, by_time) = _figure(2)
    handles: dict[str, Any] = {}
    body = []
    for line, look in _looks(known):
        handles[one_line(line.label)] = _curve(by_size, _scaled(line.validation, line.size), look)
        _curve(by_time, _scaled(line.validation, line.step_seconds), look)
        for step, value in _mean(line.validation):
            body.append([line.label, step, step * (line.size or 0), step * (line.step_seconds or 0), value])
    _label(by_size, f"against {seen}", seen, f"validation loss ({unit})")
    _label(by_time, "against time", "seconds of training steps", "")
    _legend(figure, {name: each for name, each in handles.items() if each})
    header = ["method", "step", seen, "seconds", "validation loss"]
    return Picture(name="costs", title=f"Loss against {seen} and seconds", figure=figure, header=header, body=body)


def front(lines: Sequence[Line], figure_name: str, *, lower: bool) -> Picture | None:
    """The reported figure against the peak of memory; who is on the front has no other that is better in both."""
    known = [(line, statistics.fmean(line.quality)) for line in lines if line.quality and line.peak]
    if len(known) < 2:
        return None
    costs = {line.label: (line.peak or 0.0, value if lower else -value) for line, value in known}
    best = {
        name
        for name, (peak, loss) in costs.items()
        if not any(p <= peak and v <= loss and (p, v) != (peak, loss) for p, v in costs.values())
    }
    figure, axes = _figure(1)
    scale, name = _bytes(max(line.peak or 0 for line, _ in known))
    for (line, value), (_, look) in zip(known, _looks([line for line, _ in known]), strict=True):
        x, spread = (line.peak or 0) / scale, statistics.stdev(line.quality) if len(line.quality) > 1 else 0
        axes.errorbar(
            x, value, yerr=spread, marker="o", color=look["color"], mfc=look["color"] if line.label in best else "none"
        )
        axes.annotate(one_line(line.label), (x, value), xytext=(6, 4), textcoords="offset points", fontsize=10)
    edge = sorted(((line.peak or 0) / scale, value) for line, value in known if line.label in best)
    axes.step(*zip(*edge, strict=True), where="post", color=_INK, linewidth=0.8, linestyle=":")
    _label(axes, "filled: on the front, none is better in both", f"peak memory ({name})", figure_name)
    body = [[line.label, line.peak, value, line.label in best] for line, value in known]
    header = ["method", "peak bytes", figure_name, "on the front"]
    return Picture(name="front", title="Quality against memory", figure=figure, header=header, body=body)


def rates(tried: Mapping[str, Iterable[tuple[float, float]]], figure_name: str) -> Picture | None:
    """Every learning rate that was tried with what came of it: method -> (rate, figure)."""
    points = {name: sorted(set(several)) for name, several in tried.items()}
    points = {name: several for name, several in points.items() if several}
    if not any(len({rate for rate, _ in several}) > 1 for several in points.values()):
        return None
    figure, axes = _figure(1)
    handles = {}
    for (name, several), (_, look) in zip(points.items(), _looks([Line(label=name) for name in points]), strict=True):
        least: dict[float, float] = {}
        for rate, value in several:
            least[rate] = min(value, least.get(rate, value))
        axes.plot(*zip(*several, strict=True), "o", color=look["color"], markersize=4, alpha=0.5)
        (handles[one_line(name)],) = axes.plot(*zip(*sorted(least.items()), strict=True), linewidth=1.2, **look)
    axes.set_xscale("log")
    values = sorted(value for several in points.values() for _, value in several)
    axes.set_ylim(values[0] - 0.02 * abs(values[0]), values[int(0.9 * (len(values) - 1))] * 1.05)
    _label(axes, "the line joins the best of each rate", "learning rate", figure_name)
    _legend(figure, handles)
    body = [[name, rate, value] for name, several in points.items() for rate, value in several]
    header = ["method", "learning rate", figure_name]
    return Picture(name="rates", title="Every rate tried", figure=figure, header=header, body=body)


def _cell(value: object) -> object:
    """A name on one line that no spreadsheet takes for a formula."""
    return re.sub(r"^(?=[=+@-])", "'", one_line(value)) if isinstance(value, str) else value


# --- how they are drawn ----------------------------------------------------------------------------------------------


def _plain() -> AbstractContextManager[None]:
    """matplotlib's settings: text stays text, a dollar a dollar, a file the same each time."""
    matplotlib = import_extra("matplotlib", "report")
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    how = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "lowrank", **dict.fromkeys(ink, _INK)}
    context: AbstractContextManager[None] = matplotlib.rc_context(how)
    return context


def _figure(panels: int) -> tuple[Any, Any]:
    with _plain():
        figure = import_extra("matplotlib.figure", "report").Figure(
            figsize=(6 * max(panels, 1.3), 4.6), layout="constrained"
        )
        return figure, figure.subplots(1, panels)


def _looks(lines: Sequence[Line]) -> list[tuple[Line, dict[str, Any]]]:
    return [
        (line, {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _DASHES[i // len(_COLOURS) % len(_DASHES)]})
        for i, line in enumerate(lines)
    ]


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, handles: Mapping[str, Any]) -> None:
    if handles:
        columns = max(1, min(5, len(handles), 110 // (6 + max(map(len, handles)))))
        place = {"loc": "outside lower center", "ncols": columns, "fontsize": 10, "frameon": False}
        with _plain():
            figure.legend(list(handles.values()), list(handles), **place)


def _curve(axes: Any, seeds: Sequence[Series], look: Mapping[str, Any]) -> Any:
    """The seeds' mean at each step that all of them have, between their lowest and highest; the line, if any."""
    tables = [dict(series) for series in seeds if series]
    if not tables:
        return None
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    values = [[table[step] for table in tables] for step in steps]
    (line,) = axes.plot(steps, list(map(statistics.fmean, values)), linewidth=1.8, markersize=4, **look)
    if len(tables) > 1:
        axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=look["color"], alpha=0.15, lw=0)
    return line


def _mean(seeds: Sequence[Series]) -> list[tuple[int, float]]:
    tables = [dict(series) for series in seeds if series]
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    return [(step, statistics.fmean(table[step] for table in tables)) for step in steps]


def _scaled(seeds: Sequence[Series], factor: float | None) -> list[Any]:
    return [[(step * (factor or 0), value) for step, value in series] for series in seeds]


def _smooth(series: Series) -> Series:
    """An exponential mean over about a fiftieth of the run, started from the first value."""
    keep = 1 - 1 / max(1, len(series) // 50)
    smoothed: list[tuple[int, float]] = []
    for step, value in series:
        smoothed.append((step, keep * smoothed[-1][1] + (1 - keep) * value if smoothed else value))
    return smoothed


def _bytes(most: float) -> tuple[float, str]:
    return next(
        (size, name)
        for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
        if most >= size or size == 1
    )
