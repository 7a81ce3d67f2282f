"""The one page of a report, by jinja2: it needs nothing but itself. And the folder that has its parts as files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank import __version__
from lowrank.infra.extras import import_extra
from lowrank.infra.files import write_text_atomically
from lowrank.infra.html_page import filled
from lowrank.infra.text import one_line
from lowrank.plan.memory_sheet import Sheet
from lowrank.report.comparison import Comparison
from lowrank.report.memory import draw, peaks
from lowrank.report.pictures import DASHES, Picture, draw_curves, looks_of, memory_picture, pictures
from lowrank.report.table import Table, latex_table, markdown_table, table_csv

PEAKS = "Peaks of memory by kind of step, predicted / measured:"
_DRAWN = 6  # comparisons of a page with pictures: the largest
_PREDICTED, _MANY = 8, 100  # methods of a page whose memory is predicted, a third of a second each; fewer of many runs
_PAGE_POINTS = 12_000  # of the curves of all runs together
_LARGEST = 5_000_000  # bytes of a page; a larger one leaves the pictures' files to the folder


def write(found: Sequence[Comparison], out: Path, *, why: str = "", refresh: int | None = None) -> None:
    """Write the page into the file ``out``, where that is called ``….html``.

    Args:
        found: what is compared; at least one.
        out: the file, which is replaced at once.
        why: there are several comparisons.
        refresh: seconds after which a browser that shows the page reads it again.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out, _page(found, _drawn(found), why, refresh))


def write_folder(found: Sequence[Comparison], out: Path, *, why: str = "") -> None:
    """Write into a folder ``report.html`` and ``report.md``, and of each comparison ``curves.png``, of runs that
    measured it ``memory.png``, and in ``figures/`` each picture as SVG with its CSV, and ``table.tex``; numbered from
    the second on.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    (out / "figures").mkdir(parents=True, exist_ok=True)
    drawn = _drawn(found)
    markdown = [why] if why else []
    for number, each in enumerate(found, start=1):
        end = "" if number == 1 else f"_{number}"
        curves, bars = out / f"curves{end}.png", out / f"memory{end}.png"
        if number in drawn:
            draw_curves(each, curves)
        write_text_atomically(out / "figures" / f"table{end}.tex", latex_table(*each.table))
        shown, memory, sheets = drawn.get(number, ([], None, {}))
        for picture in shown:
            write_text_atomically(out / "figures" / f"{picture.name}{end}.svg", picture.file)
            if picture.data:
                write_text_atomically(out / "figures" / f"{picture.name}{end}.csv", picture.data)
        markdown += [f"## {one_line(each.title)}"] if each.title else []
        markdown += [*map(one_line, each.answer), markdown_table(*each.table)]
        markdown += [f"![loss curves]({curves.name})"] if number in drawn else []
        if memory:
            draw(sheets, bars)
            markdown += [PEAKS, markdown_table(*memory), f"![memory of a step]({bars.name})"]
        markdown += ["Every learning rate tried:", markdown_table(*each.tried)] if each.tried else []
    write_text_atomically(out / "report.md", "\n\n".join(markdown) + "\n")
    write_text_atomically(out / "report.html", _page(found, drawn, why, None))


def _drawn(found: Sequence[Comparison]) -> dict[int, tuple[list[Picture], Table | None, dict[str, Sheet]]]:
    """Number of a comparison, from 1 -> (pictures, table of peaks, predictions), of the largest ones."""
    runs = sum(len(entry.seeds) for each in found for entry in each.entries)
    points = max(20, min(200, _PAGE_POINTS // max(1, runs)))
    predicted = _PREDICTED if runs <= _MANY else _PREDICTED // 2
    sizes = {n: sum(len(entry.seeds) for entry in each.entries) for n, each in enumerate(found, start=1)}
    largest = sorted(sizes, key=lambda n: -sizes[n])[:_DRAWN]
    drawn = {}
    for number in sorted(largest):
        each = found[number - 1]
        shown = pictures(each, prefix=f"c{number}-", points=points)
        memory, sheets = peaks(each.measured[:predicted])
        predicted -= len(sheets)
        if sheets:
            shown.append(memory_picture(sheets, prefix=f"c{number}-memory-"))
        drawn[number] = (shown, memory, sheets)
    return drawn


def _page(found: Sequence[Comparison], drawn: Mapping[int, Any], why: str, refresh: int | None) -> str:
    """The page ``report.html.jinja``, filled; the pictures' files are links in it, where there is room."""
    page = _filled(found, drawn, why, refresh, files=True)
    return page if len(page.encode()) <= _LARGEST else _filled(found, drawn, why, refresh, files=False)


def _filled(
    found: Sequence[Comparison], drawn: Mapping[int, Any], why: str, refresh: int | None, *, files: bool
) -> str:
    markup = import_extra("markupsafe", "report").Markup
    sections = []
    for number, each in enumerate(found, start=1):
        shown, memory, _ = drawn.get(number, ([], None, {}))
        figures = [
            {
                "title": picture.title,
                "svg": markup(picture.page),
                "links": {
                    name: _data(kind, text)
                    for name, kind, text in (
                        (f"{picture.name}.svg", "image/svg+xml", picture.file),
                        (f"{picture.name}.csv", "text/csv", picture.data),
                    )
                    if text and files
                },
            }
            for picture in shown
        ]
        section = {name: getattr(each, name) for name in vars(each)}
        section |= {"figures": figures, "legend": _legend(each), "peaks": memory, "number": number}
        section["latex"] = _data("text/x-tex", latex_table(*each.table))
        section["csv"] = _data("text/csv", table_csv(*each.table))
        section["drawn"] = number in drawn
        sections.append(section)
    titles = [each.title for each in found if each.title]
    return filled(
        Path(__file__).with_name("report.html.jinja"),
        title=titles[0] if len(titles) == 1 else found[0].question.partition(":")[0] if not titles else "Comparisons",
        version=__version__,
        sections=sections,
        why=why,
        about_peaks=PEAKS,
        refresh=refresh,
        files=files,
    )


def _legend(each: Comparison) -> list[dict[str, Any]]:
    """A sample of each method's line."""
    spaces = dict(zip(DASHES, ("", "6 3", "2 2", "6 2 2 2"), strict=True))
    return [
        {"label": label, "colour": look["color"], "dash": spaces[look["linestyle"]]}
        for label, look in looks_of(each.entries).items()
    ]


def _data(kind: str, text: str) -> str:
    """A link that holds what it leads to."""
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"
