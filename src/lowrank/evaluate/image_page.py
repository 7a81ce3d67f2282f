"""The report on images as one page of HTML, its pictures inside (jinja2), and in Markdown."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.infra.files import write_text_atomically
from lowrank.infra.html_page import filled
from lowrank.report.table import Table, markdown_table

PICTURES = {
    "confusion": "Which answers the images of each class got",
    "roc": "Sensitivity against false alarms, by threshold",
    "calibration": "How often answers of a confidence are right",
    "mistakes": "The surest wrong answers",
    "overlays": "The best, the median and the worst image by Dice",
}


def figure_text(figure: Mapping[str, Any]) -> str:
    """A figure and its interval to three digits; a dash where it is undefined."""
    if figure["value"] is None:
        return "–"
    between = "" if figure["low"] is None else f" ({figure['low']:.3f}–{figure['high']:.3f})"
    return f"{figure['value']:.3f}{between}"


def class_table(figures: Mapping[str, Any], shown: Mapping[str, str]) -> Table:
    """A header, and a row a class; ``shown``: the figures, and what a reader calls them."""
    rows = [
        [name, f"{row['images']:,}", *(figure_text(row[key]) for key in shown)]
        for name, row in figures["classes"].items()
    ]
    return ["class", "images", *shown.values()], rows


def write_markdown(folder: Path, figures: Mapping[str, Any], overall: Mapping[str, str], table: Table) -> None:
    """Write ``report.md``; arguments as of ``write_page``."""
    parts = [f"# {figures['images']:,} images, {figures['kind']}"]
    parts += [f"**{sentence}**" for sentence in figures["findings"]]
    parts += ["\n".join(f"* {name}: {text}" for name, text in overall.items()), markdown_table(*table)]
    if figures["resamples"]:
        of = f"{figures['resamples']:,} resamples of the {figures['resampled']}"
        parts.append(f"In brackets the 95 % bootstrap interval over {of}.")
    write_text_atomically(folder / "report.md", "\n\n".join(parts) + "\n")


def write_page(folder: Path, figures: Mapping[str, Any], overall: Mapping[str, str], table: Table) -> None:
    """Write ``report.html`` into the report's folder; pictures that are not there are left out.

    Args:
        folder: with the pictures.
        figures: the content of ``metrics.json``.
        overall: figures over all classes, as text.
        table: of ``class_table``.
    """
    there = {name: folder / f"{name}.png" for name in PICTURES}
    pictures = {
        PICTURES[name]: base64.b64encode(file.read_bytes()).decode() for name, file in there.items() if file.is_file()
    }
    template = Path(__file__).with_name("clinic.html.jinja")
    page = filled(template, figures=figures, overall=overall, header=table[0], rows=table[1], pictures=pictures)
    write_text_atomically(folder / "report.html", page)
