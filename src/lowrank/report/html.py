"""Pictures and the one page of a report: loss curves with matplotlib, HTML by jinja2 that needs nothing but itself."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lowrank.infra.extras import import_extra
from lowrank.infra.files import write_text_atomically
from lowrank.infra.pages import filled
from lowrank.infra.text import one_line
from lowrank.report.memory import draw, peaks
from lowrank.report.table import (
    Result,
    Row,
    Table,
    apart,
    best_rates,
    cells,
    differences,
    groups,
    markdown_table,
    rows,
    said,
)

# Okabe and Ito's colours, which people with colour blindness tell apart; beyond eight methods the dashes change.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
_DASHES = ("-", "--", ":", "-.")
PEAKS = "Peaks of memory by kind of step, predicted / measured:"
_POINTS = 2000  # of a curve; more cannot be seen

Series: TypeAlias = Sequence[tuple[int, float]]


def write(results: Sequence[Result], out: Path) -> None:
    """Write `report.md`, `report.html`, `curves.png` and, of runs that measured it, `memory.png` into a folder;
    pictures more for each further group.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = groups(results)
    sections, markdown = [], [apart(found)] if len(found) > 1 else []
    for number, group in enumerate(found, start=1):
        every = rows(group.results)
        chosen = best_rates(every)
        picture = out / ("curves.png" if number == 1 else f"curves_{number}.png")
        draw_curves(chosen, picture)
        tried = cells(every) if len(every) > len(chosen) else None
        memory, sheets = peaks(chosen)
        bars = out / picture.name.replace("curves", "memory")
        if sheets:
            draw(sheets, bars)
        sections.append(_section(group.title, chosen, tried, picture) | _memory(memory, bars))
        markdown += [f"## {one_line(group.title)}"] if group.title else []
        markdown += [markdown_table(*cells(chosen)), f"![loss curves]({picture.name})"]
        if memory:
            markdown += [PEAKS, markdown_table(*memory), f"![memory of a step]({bars.name})"]
        markdown += ["Every learning rate tried:", markdown_table(*tried)] if tried else []
    write_text_atomically(out / "report.md", "\n\n".join(markdown) + "\n")
    write_text_atomically(out / "report.html", _page(results, sections, apart(found)))


def draw_curves(chosen: Sequence[Row], path: Path) -> None:
    """Training loss (smoothed) and validation loss by step: one colour a row, its seeds' range as a band.

    Raises:
        ImportError: matplotlib is missing.
    """
    matplotlib = import_extra("matplotlib", "report")
    Figure = import_extra("matplotlib.figure", "report").Figure
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
        figure = Figure(figsize=(12, 5.2), layout="constrained")
        training, validation = figure.subplots(1, 2)
        handles: dict[str, Any] = {}
        for index, row in enumerate(chosen):
            dashes = _DASHES[index // len(_COLOURS) % len(_DASHES)]
            look = {"color": _COLOURS[index % len(_COLOURS)], "linestyle": dashes}
            seen = _curve(validation, [_series(each, "val_loss") for each in row.results], look | {"marker": "o"})
            line = _curve(training, [_smooth(_series(each, "loss")) for each in row.results], look) or seen
            handles |= {one_line(row.label): line} if line else {}
        for axes, title in ((training, "training loss, smoothed"), (validation, "validation loss")):
            axes.set_title(title, loc="left", fontsize=13)
            axes.set_xlabel("optimizer step", fontsize=12)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylabel(f"loss ({_unit(chosen)})", fontsize=12)
            axes.grid(color="#d8dee4", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=11)
        if handles:
            columns = max(1, min(5, len(handles), 120 // (6 + max(map(len, handles)))))
            place = {"loc": "outside lower center", "ncols": columns, "fontsize": 11, "frameon": False}
            figure.legend(list(handles.values()), list(handles), **place)
        figure.savefig(path, dpi=150)


def _series(result: Result, name: str) -> Series:
    """(step, value) of the records that have the figure, thinned out where there are very many."""
    points = [(record["step"], record[name]) for record in result.log if record.get(name) is not None]
    return points[:: max(1, len(points) // _POINTS)]


def _smooth(series: Series) -> Series:
    """An exponential mean over about a fiftieth of the run, started from the first value."""
    keep = 1 - 1 / max(1, len(series) // 50)
    smoothed: list[tuple[int, float]] = []
    for step, value in series:
        smoothed.append((step, keep * smoothed[-1][1] + (1 - keep) * value if smoothed else value))
    return smoothed


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


def _unit(chosen: Sequence[Row]) -> str:
    """What the loss is a mean over."""
    settings = [each.settings for row in chosen for each in row.results]
    if any(each["task"] != "text" for each in settings):
        return "nats per example"
    names = {"bytes": "nats per byte", "chars": "nats per character"}
    units = {names.get(str(each.get("data.tokenizer")), "nats per token") for each in settings}
    return units.pop() if len(units) == 1 else "nats per token"


def _page(results: Sequence[Result], sections: Sequence[Mapping[str, Any]], apart: str) -> str:
    """The page ``report.html.jinja``, filled."""
    shared, differ = differences(results)
    return filled(
        Path(__file__).with_name("report.html.jinja"),
        recipes=", ".join(dict.fromkeys(str(each.settings["recipe"]) for each in results)),
        methods=len({line[0] for section in sections for line in section["table"][1]}),
        apart=apart,
        sections=sections,
        differ={name: " · ".join(map(said, values)) for name, values in differ.items()},
        shared={name: said(value) for name, value in shared.items()},
        runs=_runs(results),
    )


def _memory(peaks: Table | None, bars: Path) -> dict[str, Any]:
    """What the page shows of the runs' memory, where they have it measured."""
    return {"peaks": peaks, "bars": base64.b64encode(bars.read_bytes()).decode() if peaks else None, "about": PEAKS}


def _section(title: str, chosen: Sequence[Row], tried: Table | None, picture: Path) -> dict[str, Any]:
    """What the page shows of one group of runs."""
    ranks = [row.rank for row in chosen]
    best = ranks.index(min(ranks)) if min(ranks) < math.inf else None
    image = base64.b64encode(picture.read_bytes()).decode()
    return {"title": title, "table": cells(chosen), "best": best, "tried": tried, "picture": image}


def _runs(results: Sequence[Result]) -> Table:
    header = ["folder", "method", "lr", "seed", "steps", "val loss", "best val loss"]
    body = []
    for each in results:
        losses = (each.summary.get(name) for name in ("val_loss", "best_val_loss"))
        shown = [f"{loss:.4f}" if isinstance(loss, float) else "–" for loss in losses]
        lr, seed, steps = f"{each.settings['lr']:.3g}", str(each.settings["seed"]), str(each.summary.get("steps", "–"))
        body.append([each.folder.name, each.method, lr, seed, steps, *shown])
    return header, body
