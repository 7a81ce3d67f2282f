"""Memory of methods side by side: one picture of stacked bars (matplotlib), and peaks as predicted and as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.infra.extras import import_extra
from lowrank.infra.files import read_json
from lowrank.plan.live_bytes import KINDS
from lowrank.plan.memory_sheet import CARDS, CUDA_CONTEXT, Sheet, gib
from lowrank.report.table import Row, Table
from lowrank.run.memory_estimate import estimate, on_card
from lowrank.run.own_files import is_own
from lowrank.run.run import Run

_COLOURS = (
    "#0072B2",
    "#56B4E9",
    "#8C6D1F",
    "#009E73",
    "#66C2A5",
    "#B3DE69",
    "#D55E00",
    "#E69F00",
    "#CC79A7",
    "#999999",
    "#F0E442",
    "#882255",
)
MEMORY = "memory.json"  # in a run's folder, of what its training measured
_KINDS_OF_STEP = ("first", "ordinary", "refresh", "merge", "evaluation")


def peaks(chosen: Sequence[Row]) -> tuple[Table | None, dict[str, Sheet]]:
    """(peaks of torch's bytes by kind of step, predicted / measured; the predictions by name) of the first run of each
    row that was measured. What cannot be predicted without its data or somebody's file is left out."""
    body, sheets = [], {}
    for row in chosen:
        folder = row.results[0].folder
        if not (folder / MEMORY).is_file():
            continue
        measured = read_json(folder / MEMORY).get("measured_peak_bytes", {})
        try:
            run = Run.read(folder / "run.json")
            if any(map(is_own, (run.task, run.model.name, run.data.name, run.method.name))):
                continue
            sheets[row.label] = sheet = estimate(run, on_card=on_card(run))
        except (ValueError, RuntimeError, ImportError, OSError):
            continue
        predicted = sheet.by_step()
        cells = [
            f"{gib(predicted[k]) if k in predicted else '–'} / {gib(measured[k])}" if k in measured else "–"
            for k in _KINDS_OF_STEP
        ]
        body.append([row.label, *cells])
    return ((["method", *_KINDS_OF_STEP], body) if body else None), sheets


def draw(sheets: Mapping[str, Sheet], path: Path) -> None:
    """``bars`` as a PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    bars(sheets).savefig(path, dpi=120, format="png")


def bars(sheets: Mapping[str, Sheet], *, size: tuple[float, float] | None = None, font: float = 9) -> Any:
    """A figure of matplotlib: a bar a method, by kinds of bytes at its peak, with the sizes of cards as lines.

    Args:
        sheets: the predictions by name.
        size: in inches; by default large enough to stand alone.
        font: of the legend, in points.

    Raises:
        ImportError: matplotlib is missing.
    """
    Figure = import_extra("matplotlib.figure", "report").Figure
    figure = Figure(figsize=size or (max(6.0, 1.3 * len(sheets) + 3), 5.2), layout="constrained")
    axes = figure.subplots()
    names, below = list(sheets), [0.0] * len(sheets)
    most = max(sheet.total for sheet in sheets.values())
    unit, scale = ("GiB", 1 << 30) if most >= 1 << 30 else ("MiB", 1 << 20)
    for kind, colour in zip(KINDS, _COLOURS, strict=True):
        sizes = [sheet.peak.parts.get(kind, 0) / scale for sheet in sheets.values()]
        if any(sizes):
            axes.bar(names, sizes, bottom=below, color=colour, label=kind, width=0.65)
            below = [a + b for a, b in zip(below, sizes, strict=True)]
    context = [CUDA_CONTEXT / scale * sheet.on_card for sheet in sheets.values()]
    if any(context):
        axes.bar(names, context, bottom=below, color="#dddddd", label="CUDA context", width=0.65)
    top = most / scale * 1.08
    for card in CARDS:
        if card << 30 <= top * scale:
            axes.axhline((card << 30) / scale, color="#888888", linewidth=0.8, linestyle="--")
            axes.annotate(
                f"{card} GB", (1.005, (card << 30) / scale), xycoords=("axes fraction", "data"), fontsize=9, va="center"
            )
    axes.set_ylim(0, top)
    axes.set_ylabel(f"{unit} at the peak")
    axes.tick_params(axis="x", labelrotation=30 if max(map(len, names)) > 9 else 0)
    axes.set_title("memory of a training step", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=font)
    return figure
