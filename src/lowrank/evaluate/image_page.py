"""The report on images as one page of HTML, its pictures inside (jinja2)."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.infra.files import write_text_atomically
from lowrank.infra.pages import filled

PICTURES = {
    "confusion": "Which answers the images of each class got",
    "roc": "Sensitivity against false alarms, by threshold",
    "calibration": "How often answers of a confidence are right",
    "mistakes": "The surest wrong answers",
    "overlays": "The best, the median and the worst image by Dice",
}


def write_page(
    folder: Path, figures: Mapping[str, Any], overall: Mapping[str, str], table: Sequence[Sequence[str]]
) -> None:
    """Write ``report.html`` into the report's folder; pictures that are not there are left out.

    Args:
        folder: with the pictures.
        figures: the content of ``metrics.json``.
        overall: figures over all classes, as text.
        table: a header, and a row a class, as text.
    """
    there = {name: folder / f"{name}.png" for name in PICTURES}
    pictures = {
        PICTURES[name]: base64.b64encode(file.read_bytes()).decode() for name, file in there.items() if file.is_file()
    }
    template = Path(__file__).with_name("clinic.html.jinja")
    page = filled(template, figures=figures, overall=overall, header=table[0], rows=table[1:], pictures=pictures)
    write_text_atomically(folder / "report.html", page)
