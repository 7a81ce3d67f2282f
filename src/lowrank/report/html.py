"""The page of a report: one file that needs nothing but itself, made by jinja2, of runs or of an experiment's results.

write(results, out)            a folder: report.html, report.md, curves.png, each figure as SVG and CSV, table.tex
write_page(sections, file)     one file; ``run_sections`` and ``experiment_sections`` make what it shows
"""

from __future__ import annotations

import base64
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowrank.infra.files import write_text_atomically
from lowrank.infra.pages import filled
from lowrank.infra.progress import short_bytes
from lowrank.infra.text import one_line
from lowrank.report import figures
from lowrank.report.figures import Line, Picture, Series
from lowrank.report.memory import draw, peaks
from lowrank.report.results import Results
from lowrank.report.results_table import findings, results_cells
from lowrank.report.statistics import plus_minus
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
    verdicts,
)

PEAKS = "Peaks of memory by kind of step, predicted / measured:"
_POINTS = 300  # of a curve on the page; more cannot be seen


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the page shows of one question.

    Attributes:
        title: what it is of; the question, where there is one.
        answers: sentences.
        table: methods, best first where that is known; ``best`` is the row in bold.
        pictures: with their numbers.
        tables: further ones, by their titles.
        settings: name -> value, by title.
        caveat: what this can and cannot say.
    """

    title: str
    answers: Sequence[str]
    table: Table
    best: int | None = None
    pictures: Sequence[Picture] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    caveat: str = ""
    bars: str | None = None  # a PNG of memory by method, in base64


def write(results: Sequence[Result], out: Path) -> None:
    """Write `report.md`, `report.html`, `curves.png` and, of runs that measured it, `memory.png` into a folder;
    pictures more for each further group; and every figure as SVG and CSV, the table as LaTeX.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    found, sections, markdown = groups(results), [], []
    markdown += [apart(found)] if len(found) > 1 else []
    for number, group in enumerate(found, start=1):
        mark = "" if number == 1 else f"_{number}"
        bars = out / f"memory{mark}.png"
        section = _of_runs(group.results, group.title, bars)
        sections.append(section)
        section.pictures[0].figure.savefig(out / f"curves{mark}.png", dpi=150)
        for picture in section.pictures:
            write_text_atomically(out / f"{picture.name}{mark}.svg", picture.svg().replace("var(--line)", "#d8dee4"))
            write_text_atomically(out / f"{picture.name}{mark}.csv", picture.table())
        write_text_atomically(out / f"table{mark}.tex", latex(*section.table))
        markdown += [f"## {one_line(group.title)}"] if group.title else []
        markdown += [markdown_table(*section.table), *section.answers, f"![loss curves](curves{mark}.png)"]
        for title, table in section.tables.items():
            drawn = [f"![memory of a step]({bars.name})"] if title == PEAKS else []
            markdown += [title if title.endswith(":") else f"{title}:", markdown_table(*table), *drawn]
    write_text_atomically(out / "report.md", "\n\n".join(markdown) + "\n")
    write_page(sections, out / "report.html", title=_title(results), note=apart(found), more=_shared(results))


def run_sections(results: Sequence[Result]) -> list[Section]:
    """A section a group of runs that can be ranked with each other."""
    return [_of_runs(group.results, group.title, None) for group in groups(results)]


def write_runs(results: Sequence[Result], file: Path, *, refresh: int | None = None) -> None:
    """The page of finished runs as one file."""
    more = _shared(results)
    write_page(
        run_sections(results), file, title=_title(results), note=apart(groups(results)), more=more, refresh=refresh
    )


def write_experiments(found: Sequence[Results], file: Path, *, refresh: int | None = None) -> None:
    """The page of experiments' results as one file."""
    names = ", ".join(dict.fromkeys(each.experiment for each in found))
    write_page([_of_experiment(each) for each in found], file, title=names, refresh=refresh)


def write_page(
    sections: Sequence[Section],
    file: Path,
    *,
    title: str,
    note: str = "",
    more: Mapping[str, Table | Mapping[str, str]] | None = None,
    refresh: int | None = None,
) -> None:
    """Fill ``report.html.jinja`` and write it.

    Args:
        sections: what it shows, in order.
        file: where.
        title: of the page.
        note: what must be known before it is read.
        more: tables and settings after the sections, by title.
        refresh: seconds after which a browser reads it again.
    """
    shown = [
        {
            "title": section.title,
            "answers": section.answers,
            "table": section.table,
            "best": section.best,
            "pictures": [
                {
                    "title": p.title,
                    "svg": p.svg().replace(f"{p.name}-", f"{p.name}-{n}-"),
                    "csv": _link("text/csv", p.table()),
                    "name": p.name,
                }
                for p in section.pictures
            ],
            "bars": section.bars,
            "tables": section.tables,
            "settings": section.settings,
            "caveat": section.caveat,
            "latex": latex(*section.table),
        }
        for n, section in enumerate(sections)
    ]
    template = Path(__file__).with_name("report.html.jinja")
    page = filled(template, title=title, note=note, sections=shown, more=more or {}, refresh=refresh)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(file, page)


def latex(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table for LaTeX with booktabs."""
    lines = [" & ".join(map(_tex, line)) + r" \\" for line in (header, *body)]
    middle = [lines[0], r"\midrule", *lines[1:]]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            *middle,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _tex(text: str) -> str:
    names = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "–": "--",
        "−": "$-$",
    }
    return re.sub(
        r"[\\&%$#_{}~^±–−<>|]", lambda m: names.get(m[0], f"${m[0]}$" if m[0] in "<>|" else f"\\{m[0]}"), one_line(text)
    )


# --- of finished runs ------------------------------------------------------------------------------------------------


def _of_runs(results: Sequence[Result], title: str, bars: Path | None) -> Section:
    every = rows(results)
    chosen = best_rates(every)
    ranks = [row.rank for row in chosen]
    auc = all(row.values("best_val_auc") for row in chosen)
    unit, lines = _unit(chosen), [_line(row, auc) for row in chosen]
    tried = cells(every) if len(every) > len(chosen) else None
    seen = "images" if any(row.values("images_per_second") for row in chosen) else "tokens"
    pictures = [figures.curves(lines, unit), figures.costs(lines, unit, seen)]
    pictures.append(figures.front(lines, "best validation AUC" if auc else f"validation loss ({unit})", lower=not auc))
    points = [(row, row.mean("val_loss")) for row in every]
    by_label = {row.label: [(r.lr, v) for r, v in points if r.label == row.label and v is not None] for row in chosen}
    pictures.append(figures.rates(by_label, f"validation loss ({unit})"))
    tables: dict[str, Table] = {}
    memory, sheets = peaks(chosen) if bars is not None else (None, {})
    if memory and bars is not None and sheets:
        draw(sheets, bars)
        tables[PEAKS] = memory
    if tried:
        tables["Every learning rate tried"] = tried
    return Section(
        title=title,
        answers=verdicts(results),
        table=cells(chosen),
        best=ranks.index(min(ranks)) if min(ranks) < math.inf else None,
        pictures=[picture for picture in pictures if picture],
        tables=tables,
        bars=base64.b64encode(bars.read_bytes()).decode() if memory and bars else None,
        caveat="Figures are means over the seeds, ± the sample standard deviation; state is the optimizer's.",
    )


def _line(row: Row, auc: bool) -> Line:
    settings = row.results[0].settings
    context = settings.get("data.context")
    sizes = [settings.get("batch_size"), settings.get("grad_accum", 1), context if settings["task"] == "text" else 1]
    return Line(
        label=row.label,
        training=[_series(each, "loss") for each in row.results],
        validation=[_series(each, "val_loss") for each in row.results],
        size=math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None,
        step_seconds=row.mean("step_seconds"),
        peak=row.mean("peak_bytes"),
        quality=row.values("best_val_auc" if auc else "val_loss"),
    )


def _series(result: Result, name: str) -> Series:
    """(step, value) of the records that have the figure, thinned out where there are very many."""
    points = [(record["step"], record[name]) for record in result.log if record.get(name) is not None]
    return points[:: max(1, -(-len(points) // _POINTS))]


def _unit(chosen: Sequence[Row]) -> str:
    """What the loss is a mean over."""
    settings = [each.settings for row in chosen for each in row.results]
    if any(each["task"] != "text" for each in settings):
        return "nats per example"
    names = {"bytes": "nats per byte", "chars": "nats per character"}
    units = {names.get(str(each.get("data.tokenizer")), "nats per token") for each in settings}
    return units.pop() if len(units) == 1 else "nats per token"


def _title(results: Sequence[Result]) -> str:
    recipes = ", ".join(dict.fromkeys(str(each.settings["recipe"]) for each in results))
    methods = len({row.label for group in groups(results) for row in rows(group.results)})
    plural = [
        f"{count} {word}{'' if count == 1 else 's'}" for count, word in ((methods, "method"), (len(results), "run"))
    ]
    return f"{recipes}: {', '.join(plural)}"


def _shared(results: Sequence[Result]) -> dict[str, Table | Mapping[str, str]]:
    shared, differ = differences(results)
    return {
        "Settings in which the runs differ": {name: " · ".join(map(said, values)) for name, values in differ.items()},
        "Settings that all runs share": {name: said(value) for name, value in shared.items()},
        "Runs": _runs(results),
    }


def _runs(results: Sequence[Result]) -> Table:
    header = ["folder", "method", "lr", "seed", "steps", "val loss", "best val loss"]
    body = []
    for each in results:
        losses = (each.summary.get(name) for name in ("val_loss", "best_val_loss"))
        shown = [f"{loss:.4f}" if isinstance(loss, float) else "–" for loss in losses]
        lr, seed, steps = f"{each.settings['lr']:.3g}", str(each.settings["seed"]), str(each.summary.get("steps", "–"))
        body.append([each.folder.name, each.method, lr, seed, steps, *shown])
    return header, body


# --- of an experiment ------------------------------------------------------------------------------------------------


def _of_experiment(found: Results) -> Section:
    header, body = results_cells(found)
    header, body = _with_costs(found, header, body)
    main, unit = found.at(), found.unit
    lines = []
    for method in (row[0] for row in body):
        own = [row for row in main if row.method == method and row.error is None]
        if own:
            size = next(
                (
                    own[0].budget[name] / own[0].steps
                    for name in ("tokens", "images", "sequences")
                    if name in own[0].budget
                ),
                None,
            )
            lines.append(
                Line(
                    label=method,
                    training=[row.curve.get("train", ()) for row in own],
                    validation=[row.curve.get("val", ()) for row in own],
                    size=size,
                    step_seconds=sorted(row.step_seconds or 0 for row in own)[len(own) // 2],
                    peak=own[0].peak_bytes,
                    quality=[value for row in own if (value := row.figures.get(found.metric)) is not None],
                )
            )
    tried = {
        method: [
            (t.settings["lr"], t.value)
            for t in found.trials
            if t.method == method and "lr" in t.settings and t.value is not None
        ]
        for method in found.methods
    }
    name, seen = (
        found.metric.replace("_", " "),
        next((n for row in main for n in row.budget if n != "batch_size"), "tokens"),
    )
    pictures = [
        figures.curves(lines, unit),
        figures.costs(lines, unit, seen),
        figures.front(lines, f"{name} ({unit})", lower=found.lower),
        figures.rates(tried, f"{name.replace('test', 'val')} in tuning"),
    ]
    where = found.environment
    about = {
        "command": found.command,
        "hardware": str(where.get("hardware", "")),
        "date": str(where.get("date", "")),
        "commit": str(where.get("commit", "")),
        "versions": ", ".join(f"{n} {v}" for n, v in where.get("versions", {}).items()),
        "time in all": f"{found.seconds / 60:.0f} minutes, tuning included",
        "seeds": f"{', '.join(map(str, found.seeds))}; tuned on {', '.join(map(str, found.tuning_seeds))}",
        "equal": found.equal,
    }
    space = {
        method: "; ".join(f"{n}: {said(list(v))}" for n, v in options.items())
        for method, options in found.space.items()
        if options
    }
    return Section(
        title=found.question,
        answers=findings(found),
        table=(header, body),
        best=0 if body and body[0][1] != "–" else None,
        pictures=[picture for picture in pictures if picture],
        settings={
            "How it was made": about,
            "What was searched": space,
            "Settings that all runs share": {n: said(v) for n, v in found.settings.items()},
        },
        caveat=found.caveat,
    )


def _with_costs(found: Results, header: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    """The table with bytes a parameter, seconds of training and bytes on the wire."""
    at, made = {row.method: row for row in found.at() if row.error is None}, []
    sends = any(row.wire_bytes for row in at.values())
    for line in body:
        row = at.get(line[0])
        extra = ["–"] * (2 + sends)
        if row is not None:
            state = f"{row.state_bytes / row.total:.2g}" if row.state_bytes is not None and row.total else "–"
            seconds = [r.seconds for r in found.at() if r.method == line[0] and r.seconds]
            spread = statistics.stdev(seconds) if len(seconds) > 1 else None
            extra = [state, plus_minus(statistics.fmean(seconds), spread) if seconds else "–"]
            extra += [short_bytes(row.wire_bytes) if row.wire_bytes else "–"] if sends else []
        made.append([*line[:-2], *extra, *line[-2:]])
    names = ["state bytes/parameter", "seconds", *(["sent"] if sends else [])]
    return [*header[:-2], *names, *header[-2:]], made


def _link(kind: str, text: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"
