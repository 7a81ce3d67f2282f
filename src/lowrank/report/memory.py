"""Methods side by side in memory: one picture of stacked bars (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lowrank.infra.extras import import_extra
from lowrank.plan.live_bytes import KINDS
from lowrank.plan.sheet import CARDS, CUDA_CONTEXT, Sheet

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
_GIB = 1 << 30


def draw(sheets: Mapping[str, Sheet], path: Path) -> None:
    """A bar a method, by kinds of bytes at its peak, with the sizes of cards as lines; a PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    Figure = import_extra("matplotlib.figure", "report").Figure
    figure = Figure(figsize=(max(6.0, 1.3 * len(sheets) + 3), 5.2), layout="constrained")
    axes = figure.subplots()
    names, below = list(sheets), [0.0] * len(sheets)
    for kind, colour in zip(KINDS, _COLOURS, strict=True):
        sizes = [sheet.peak.parts.get(kind, 0) / _GIB for sheet in sheets.values()]
        if any(sizes):
            axes.bar(names, sizes, bottom=below, color=colour, label=kind, width=0.65)
            below = [a + b for a, b in zip(below, sizes, strict=True)]
    axes.bar(names, [CUDA_CONTEXT / _GIB] * len(names), bottom=below, color="#dddddd", label="CUDA context", width=0.65)
    top = max(sheet.total for sheet in sheets.values()) / _GIB * 1.08
    for card in CARDS:
        if card <= top:
            axes.axhline(card, color="#444444", linewidth=0.8, linestyle="--")
            axes.annotate(f"{card} GB", (1.005, card), xycoords=("axes fraction", "data"), fontsize=9, va="center")
    axes.set_ylim(0, top)
    axes.set_ylabel("GiB at the peak")
    axes.set_title("memory of a training step", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
