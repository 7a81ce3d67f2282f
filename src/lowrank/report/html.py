"""Pictures and the one page of a report: loss curves with matplotlib, HTML by jinja2 that needs nothing but itself."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lowrank.infra.extras import import_extra
from lowrank.report.table import (
    Result,
    Row,
    best_rates,
    cells,
    differences,
    markdown_table,
    printable,
    rows,
    text_table,
)

# Okabe and Ito's colours, which people with colour blindness tell apart; beyond eight methods the dashes change.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
_DASHES = ("-", "--", ":", "-.")
_POINTS = 2000  # of a curve; more cannot be seen

_NOTE = (
    "Figures are means over the seeds, ± the sample standard deviation; state is the optimizer's. "
    "The lowest validation loss is set in bold."
)

Table: TypeAlias = tuple[list[str], list[list[str]]]


def write(results: Sequence[Result], out: Path) -> str:
    """Write `report.md`, `curves.png` and `report.html` into a folder; return the table for a terminal.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    every = rows(results)
    chosen = best_rates(every)
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(chosen, out / "curves.png")
    table = cells(chosen)
    tried = cells(every) if len(every) > len(chosen) else None
    markdown = [markdown_table(*table), "", "![loss curves](curves.png)"]
    if tried:
        markdown += ["", "Every learning rate tried:", "", markdown_table(*tried)]
    (out / "report.md").write_text("\n".join(markdown) + "\n", encoding="utf-8")
    (out / "report.html").write_text(_page(results, chosen, tried, out / "curves.png"), encoding="utf-8")
    return text_table(*table)


def draw_curves(chosen: Sequence[Row], path: Path) -> None:
    """Training loss (smoothed) and validation loss by step: one colour a row, its seeds' range as a band.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'lowrank-training[report]'") from error

    figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    training, validation = figure.subplots(1, 2)
    for index, row in enumerate(chosen):
        look = {
            "color": _COLOURS[index % len(_COLOURS)],
            "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)],
        }
        _curve(training, [_smooth(_series(each, "loss")) for each in row.results], row.label, look)
        _curve(validation, [_series(each, "val_loss") for each in row.results], row.label, look | {"marker": "o"})
    unit = _unit(chosen)
    for axes, title in ((training, "training loss, smoothed"), (validation, "validation loss")):
        axes.set_title(title, loc="left", fontsize=13)
        axes.set_xlabel("optimizer step", fontsize=12)
        axes.set_ylabel(f"loss ({unit})", fontsize=12)
        axes.grid(color="#d8dee4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=11)
    handles, labels = training.get_legend_handles_labels()
    if not handles:
        handles, labels = validation.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=11, frameon=False
        )
    figure.savefig(path)


Series = Sequence[tuple[int, float]]


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


def _curve(axes: Any, seeds: Sequence[Series], label: str, look: Mapping[str, Any]) -> None:
    """The mean over the seeds at each step that all of them have, between their lowest and highest."""
    tables = [dict(series) for series in seeds if series]
    if not tables:
        return
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    values = [[table[step] for table in tables] for step in steps]
    size = {"markersize": 4} if "marker" in look else {}
    axes.plot(steps, list(map(statistics.fmean, values)), label=label, linewidth=1.8, **look, **size)
    if len(tables) > 1:
        axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=look["color"], alpha=0.15, lw=0)


def _unit(chosen: Sequence[Row]) -> str:
    """What the loss is a mean over."""
    settings = [each.settings for row in chosen for each in row.results]
    if any(each["task"] != "text" for each in settings):
        return "nats per example"
    names = {"bytes": "nats per byte", "chars": "nats per character"}
    units = {names.get(str(each.get("data.tokenizer")), "nats per token") for each in settings}
    return units.pop() if len(units) == 1 else "nats per token"


def _page(results: Sequence[Result], chosen: Sequence[Row], tried: Table | None, picture: Path) -> str:
    """The page ``report.html.jinja``, filled."""
    jinja2 = import_extra("jinja2", "report")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined, finalize=_shown
    )
    losses = [row.mean("val_loss") for row in chosen]
    known = [loss for loss in losses if loss is not None]
    group = {
        "title": "",
        "table": cells(chosen),
        "best": losses.index(min(known)) if known else None,
        "picture": base64.b64encode(picture.read_bytes()).decode(),
        "tried": tried,
    }
    shared, differ = differences(results)
    return environment.get_template("report.html.jinja").render(
        recipes=", ".join(dict.fromkeys(str(each.settings["recipe"]) for each in results)),
        methods=len(chosen),
        apart="",
        groups=[group],
        note=_NOTE,
        differ={name: _listed(values) for name, values in differ.items()},
        shared={name: _listed([value]) for name, value in shared.items()},
        runs=_runs(results),
    )


def _shown(value: Any) -> Any:
    """What the page shows of a value: text without control characters; jinja2's own markup as it is."""
    return printable(value) if type(value) is str else value


def _listed(values: Sequence[Any]) -> str:
    return " · ".join("none" if value is None else str(value) for value in values)


def _runs(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    header = ["folder", "method", "lr", "seed", "steps", "val loss", "best val loss"]
    body = [
        [
            each.folder.name,
            each.method,
            f"{each.settings['lr']:.3g}",
            str(each.settings["seed"]),
            str(each.summary.get("steps", "–")),
            *(
                f"{value:.4f}" if isinstance(value := each.summary.get(n), float) else "–"
                for n in ("val_loss", "best_val_loss")
            ),
        ]
        for each in results
    ]
    return header, body
