"""Pictures of a comparison, drawn by matplotlib as SVG: for a page (its colours the page's, so that light and dark both
work, its legend left to the page) and to keep (white ground, legend below), with the numbers as CSV.

    losses      loss against steps, tokens and seconds           rates     every learning rate tried
    quality     figure against memory, with the Pareto front     layers    what was changed, by group of layers
    refreshes   energy in the basis, overlap with the one before
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lowrank.infra.extras import import_extra
from lowrank.infra.progress import short_count
from lowrank.infra.text import one_line
from lowrank.plan.memory_sheet import Sheet
from lowrank.report.comparison import REFRESHED, Comparison, Entry, Seen, Series
from lowrank.report.memory import bars
from lowrank.report.table import table_csv

# Okabe and Ito's colours, which people with colour blindness tell apart; beyond eight methods the dashes change.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A", "#8C6D1F")
_HATCHES = {"-": "", "--": "////", ":": "....", "-.": "xxxx"}  # of bars, where lines are dashed so
DASHES = tuple(_HATCHES)
_MARKERS = "osD^vP*X"
_INK, _LINES = "#1b1f24", "#d8dee4"  # on a page replaced by its own
_POINTS = 200  # of a curve; more cannot be seen
_MARKS = 8  # about, on a curve
_WIDTH, _HEIGHT = 4.6, 3.3  # inches, of the picture without its legend
_LEGEND_LINE = 0.19


Looks: TypeAlias = Mapping[str, Mapping[str, Any]]  # label -> colour, dashes and marker
Drawn: TypeAlias = tuple[Callable[[Any], None], str]  # what draws into axes, and its numbers as CSV


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture.

    Attributes:
        name: of its files.  title: what it shows.
        page: SVG for a page, without a legend.  file: SVG to keep.
        data: CSV of what it shows; empty where that of the picture before has it.
    """

    name: str
    title: str
    page: str
    file: str
    data: str = ""


def pictures(compared: Comparison, *, prefix: str, points: int = _POINTS) -> list[Picture]:
    """Every picture that the comparison has figures for.

    Args:
        prefix: of the pictures' ids, one of its own on a page.
        points: of a curve, at most.

    Raises:
        ImportError: matplotlib is missing.
    """
    drawn: list[Picture] = []
    looks = looks_of(compared.entries)

    def add(name: str, title: str, draw: Callable[[Any], None], data: str = "") -> None:
        page, file = _svg(draw, looks, f"{prefix}{name}-", title)
        drawn.append(Picture(name=name, title=title, page=page, file=file, data=data))

    axes = {"steps": "optimizer step", compared.unit: f"{compared.unit} seen", "seconds": "seconds of training"}
    table = _curves_table(compared, points)
    seeds = [seen for entry in compared.entries for seen in entry.seeds]
    lines = any(seen.val or (compared.is_loss and seen.train) for seen in seeds)
    for number, (by, label) in enumerate(axes.items() if lines else ()):
        scales = [[_scale(seen, by) for seen in entry.seeds] for entry in compared.entries]
        if not any(s is not None for row in scales for s in row):
            continue
        series = [seen.val for seen in seeds if seen.val]
        shown = [y for each in series for x, y in each if x >= each[-1][0] / 4]
        top = _focus(shown) if compared.is_loss else None

        def losses(ax: Any, scales: Any = scales, label: str = label, top: float | None = top) -> None:
            for entry, row, look in zip(compared.entries, scales, looks.values(), strict=True):
                _loss_lines(ax, entry, row, look, points, training=compared.is_loss)
            ax.set_ylim(top=top)
            _labelled(ax, label, compared.loss, whole=not label.startswith("seconds"))

        what = "Loss" if compared.is_loss else compared.loss.capitalize()
        add(f"loss-{by}", f"{what} against {by}", losses, table if number == 0 else "")
    if memory := _memory(compared.entries):
        draw, data = _quality(compared, memory, looks)
        add("quality-memory", "Quality against memory, with the Pareto front", draw, data)
    if compared.rates:
        draw, data = _rates(compared, looks)
        add("rates", "Every learning rate tried", draw, data)
    for key, title, label in (
        ("trained", "Numbers trained, by group of layers", "numbers trained"),
        ("change", "What training changed, by group of layers", "‖ΔW‖ / ‖W₀‖"),
        ("effective_rank", "Effective rank of the change, by group of layers", "effective rank of ΔW"),
    ):
        if groups := _layer_groups(compared.entries, key):
            draw, data = _bars(compared.entries, groups, key, label, looks)
            add(key.replace("_", "-"), title, draw, data)
    for key, title in zip(
        REFRESHED, ("Energy of the gradient in the basis", "Overlap of a basis with the one before"), strict=True
    ):
        if any(seen.refreshed.get(key) for entry in compared.entries for seen in entry.seeds):
            draw, data = _refreshes(compared.entries, key, looks)
            add(key.replace("_", "-"), title, draw, data)
    return drawn


def looks_of(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Label -> colour, dashes and marker."""
    return {
        entry.label: {
            "color": COLOURS[n % len(COLOURS)],
            "linestyle": DASHES[n // len(COLOURS) % len(DASHES)],
            "marker": _MARKERS[n // len(COLOURS) % len(_MARKERS)],
        }
        for n, entry in enumerate(entries)
    }


def draw_curves(compared: Comparison, path: Path) -> None:
    """A PNG of training loss (smoothed) and validation loss by step: one colour a method, its seeds' range as a band.

    Raises:
        ImportError: matplotlib is missing.
    """
    Figure = import_extra("matplotlib.figure", "report").Figure
    with _style():
        figure = Figure(figsize=(12, 5.2), layout="constrained")
        training, validation = figure.subplots(1, 2)
        handles: dict[str, Any] = {}
        for entry, look in zip(compared.entries, looks_of(compared.entries).values(), strict=True):
            line = {**look, "marker": ""}
            lines = _curve(training, [_smooth(seen.train) for seen in entry.seeds], line)
            seen_lines = _curve(validation, [seen.val for seen in entry.seeds], look)
            handles |= {one_line(entry.label): seen_lines or lines} if lines or seen_lines else {}
        for axes, title in ((training, "training loss, smoothed"), (validation, "validation loss")):
            axes.set_title(title, loc="left", fontsize=13)
            _labelled(axes, "optimizer step", compared.loss)
        if handles:
            columns = max(1, min(5, len(handles), 120 // (6 + max(map(len, handles)))))
            place = {"loc": "outside lower center", "ncols": columns, "fontsize": 11, "frameon": False}
            figure.legend(list(handles.values()), list(handles), **place)
        figure.savefig(path, dpi=150)


# --- curves ----------------------------------------------------------------------------------------------------------


def _loss_lines(
    axes: Any,
    entry: Entry,
    scales: Sequence[float | None],
    look: Mapping[str, Any],
    points: int,
    *,
    training: bool,
) -> None:
    """Validation as a line with its seeds' range, and training (smoothed) as a thin one, where that is the same figure;
    x in the unit of ``scales``."""
    known = [(seen, scale) for seen, scale in zip(entry.seeds, scales, strict=True) if scale is not None]
    if not known:
        return
    scale = statistics.fmean(scale for _, scale in known)  # one for all, so that seeds meet at the same x
    train = [_thin(_smooth(seen.train), points) for seen, _ in known if training]
    val = [_thin(seen.val, points) for seen, _ in known]
    thin = {**look, "marker": "", "alpha": 0.45 if any(val) else 1.0, "linewidth": 1.0}
    _curve(axes, [[(x * scale, y) for x, y in series] for series in train], thin, band=not any(val))
    _curve(axes, [[(x * scale, y) for x, y in series] for series in val], look)


def _curve(axes: Any, seeds: Sequence[Series], look: Mapping[str, Any], *, band: bool = True) -> Any:
    """The seeds' mean at each x that all of them have, between their lowest and highest; the line, if any."""
    tables = [dict(series) for series in seeds if series]
    if not tables:
        return None
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    values = [[table[step] for table in tables] for step in steps]
    marks = {"linewidth": 1.6, "markersize": 3.5, "markevery": max(1, len(steps) // _MARKS)}
    (line,) = axes.plot(steps, list(map(statistics.fmean, values)), **{**marks, **look})
    if len(tables) > 1 and band:
        low, high = list(map(min, values)), list(map(max, values))
        axes.fill_between(steps, low, high, color=look["color"], alpha=0.15, lw=0)
    return line


def _focus(values: Sequence[float]) -> float | None:
    """Up to where curves are shown: so that these figures fill most of the picture, whatever was before."""
    known = [value for value in values if math.isfinite(value)]
    return max(known) + 0.4 * (max(known) - min(known)) if len(set(known)) > 1 else None


def _thin(series: Series, points: int) -> Series:
    """About so many of its points, the last among them."""
    every = max(1, math.ceil(len(series) / points))
    return series[(len(series) - 1) % every :: every]


def _smooth(series: Series) -> Series:
    """An exponential mean over about a fiftieth of the run, started from the first value."""
    keep = 1 - 1 / max(1, len(series) // 50)
    smoothed: list[tuple[float, float]] = []
    for step, value in series:
        smoothed.append((step, keep * smoothed[-1][1] + (1 - keep) * value if smoothed else value))
    return smoothed


def _scale(seen: Seen, by: str) -> float | None:
    return 1.0 if by == "steps" else seen.step_seconds if by == "seconds" else seen.size


def _curves_table(compared: Comparison, points: int) -> str:
    lines = []
    for entry in compared.entries:
        for seen in entry.seeds:
            for split, series in (("train", _smooth(seen.train)), ("validation", seen.val)):
                for step, loss in _thin(series, points):
                    others = (_scale(seen, by) for by in (compared.unit, "seconds"))
                    at = ["" if scale is None else f"{scale * step:.6g}" for scale in others]
                    lines.append([entry.label, seen.seed, split, f"{step:g}", *at, f"{loss:.5g}"])
    return table_csv(["method", "seed", "split", "step", compared.unit, "seconds", "loss"], lines)


# --- other pictures --------------------------------------------------------------------------------------------------


def _memory(entries: Sequence[Entry]) -> dict[str, tuple[float, float, float]]:
    """Label -> (peak in bytes, mean figure, its spread) of those that have both."""
    found = {}
    for entry in entries:
        peak, values = entry.mean(lambda seen: seen.peak_bytes), entry.values(lambda seen: seen.value)
        if peak and values:
            found[entry.label] = (peak, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
    return found


def pareto(points: Mapping[str, tuple[float, float]], *, lower: bool) -> list[str]:
    """Of (cost, figure) by name those that none beats in both, cheapest first.

    >>> pareto({"a": (1, 3.0), "b": (2, 2.0), "c": (3, 2.5)}, lower=True)
    ['a', 'b']
    """
    front: list[str] = []
    for name in sorted(points, key=lambda n: (points[n][0], points[n][1] if lower else -points[n][1])):
        figure, before = points[name][1], points[front[-1]][1] if front else None
        if before is None or (figure < before if lower else figure > before):
            front.append(name)
    return front


def _quality(compared: Comparison, memory: Mapping[str, tuple[float, float, float]], looks: Looks) -> Drawn:
    most = max(peak for peak, _, _ in memory.values())
    name, size = ("GiB", 1 << 30) if most >= 1 << 30 else ("MiB", 1 << 20)
    front = pareto({label: point[:2] for label, point in memory.items()}, lower=compared.lower)

    def draw(axes: Any) -> None:
        at = [memory[label] for label in front]
        steps = {"where": "post", "color": _INK, "linewidth": 0.8, "linestyle": "--", "alpha": 0.6}
        axes.step([peak / size for peak, _, _ in at], [figure for _, figure, _ in at], **steps)
        for label, (peak, figure, spread) in memory.items():
            look = {k: looks[label][k] for k in ("color", "marker")}
            axes.errorbar([peak / size], [figure], yerr=[spread], capsize=2, markersize=6, linewidth=1.2, **look)
        for label in front:
            at_point = (memory[label][0] / size, memory[label][1])
            axes.annotate(one_line(label), at_point, xytext=(5, 3), textcoords="offset points", fontsize=7)
        axes.margins(x=0.12)
        _labelled(axes, f"peak of memory, {name}", compared.metric, whole=False)

    lines = [[label, f"{p:.0f}", f"{f:.6g}", f"{s:.3g}", str(label in front)] for label, (p, f, s) in memory.items()]
    return draw, table_csv(["method", "peak_bytes", "figure", "deviation", "on_the_front"], lines)


def _rates(compared: Comparison, looks: Looks) -> Drawn:
    """Whole runs filled and joined by rate, the better where one was tried twice; what diverged is out of sight."""
    sign = 1 if compared.lower else -1
    best_of: dict[tuple[str, bool, float], float] = {}
    for each in sorted(compared.rates, key=lambda each: sign * each.value):
        best_of.setdefault((each.label, each.short, each.lr), each.value)

    def draw(axes: Any) -> None:
        for label, look in looks.items():
            tried = {(short, lr): v for (name, short, lr), v in best_of.items() if name == label}
            whole = sorted((lr, value) for (short, lr), value in tried.items() if not short)
            axes.plot(*_columns(whole), **{**look, "linewidth": 1.2, "markersize": 4})
            short = [(each.lr, each.value) for each in compared.rates if each.label == label and each.short]
            axes.plot(*_columns(short), **{**look, "linestyle": "", "markersize": 3.5, "alpha": 0.5}, fillstyle="none")
        if compared.lower and (top := _focus(list(best_of.values()))) is not None:
            least, most = min(best_of.values()), max(each.value for each in compared.rates)
            axes.set_ylim(least - 0.05 * (top - least), min(top, most + 0.05 * (top - least)))
        axes.set_xscale("log")
        if len(rates := sorted({each.lr for each in compared.rates})) <= 6:
            axes.set_xticks(rates)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        _labelled(axes, "learning rate", compared.metric.replace("test ", "validation "), whole=False)

    lines = [[e.label, f"{e.lr:g}", f"{e.value:.6g}", str(e.short)] for e in compared.rates]
    return draw, table_csv(["method", "lr", "figure", "fewer_steps"], lines)


def _layer_groups(entries: Sequence[Entry], key: str) -> list[str]:
    found = (name for e in entries for s in e.seeds for name, figures in s.layers.items() if key in figures)
    return list(dict.fromkeys(found))


def _bars(entries: Sequence[Entry], groups: Sequence[str], key: str, label: str, looks: Looks) -> Drawn:
    def value(group: str) -> Callable[[Seen], float | None]:
        return lambda seen: seen.layers.get(group, {}).get(key)

    known = [entry for entry in entries if any(entry.values(value(group)) for group in groups)]
    wide = 0.8 / len(known)

    def draw(axes: Any) -> None:
        for number, entry in enumerate(known):
            at = [n + (number - (len(known) - 1) / 2) * wide for n in range(len(groups))]
            heights = [entry.mean(value(group)) or 0.0 for group in groups]
            spreads = [statistics.stdev(v) if len(v := entry.values(value(group))) > 1 else 0.0 for group in groups]
            look, error = looks[entry.label], {"elinewidth": 0.8, "ecolor": _INK}
            for bar in axes.bar(at, heights, wide * 0.92, yerr=spreads, color=look["color"], error_kw=error):
                bar.set(hatch=_HATCHES[look["linestyle"]], edgecolor=_INK, linewidth=0)
        axes.set_xticks(range(len(groups)), [one_line(group) for group in groups])
        axes.yaxis.set_major_formatter(_short)
        _labelled(axes, "", label, whole=False)

    lines = [
        [entry.label, group, f"{mean:.4g}"]
        for entry in known
        for group in groups
        if (mean := entry.mean(value(group))) is not None
    ]
    return draw, table_csv(["method", "layers", key], lines)


def _refreshes(entries: Sequence[Entry], key: str, looks: Looks) -> Drawn:
    def draw(axes: Any) -> None:
        for entry in entries:
            _curve(axes, [seen.refreshed.get(key, ()) for seen in entry.seeds], looks[entry.label])
        axes.set_ylim(0, 1.02)
        _labelled(axes, "optimizer step", "share of ‖G‖²" if key == REFRESHED[0] else "‖Qₙᵀ Qₒ‖² / rank")

    lines = [
        [entry.label, seen.seed, f"{step:g}", f"{value:.4g}"]
        for entry in entries
        for seen in entry.seeds
        for step, value in seen.refreshed.get(key, ())
    ]
    return draw, table_csv(["method", "seed", "step", key], lines)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _labelled(axes: Any, x: str, y: str, *, whole: bool = True) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=_LINES, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if whole:
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axes.xaxis.set_major_formatter(_short)


def _short(value: float, place: object) -> str:
    """A number at an axis."""
    return short_count(value) if value >= 10_000 else f"{value:g}"


@contextmanager
def _style() -> Any:
    """A dollar in a name is a dollar; text stays text; ids are the same in every run."""
    matplotlib = import_extra("matplotlib", "report")
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK)
    how = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "lowrank", "font.size": 9.5, **ink}
    with matplotlib.rc_context(how):
        yield


def _svg(draw: Callable[[Any], None], looks: Looks, prefix: str, title: str) -> tuple[str, str]:
    """(for a page, to keep): one drawing; the legend lies below it, where the page does not look."""
    Figure = import_extra("matplotlib.figure", "report").Figure
    lines = import_extra("matplotlib.lines", "report")
    names = [one_line(label) for label in looks]
    columns = max(1, min(3, 62 // (6 + max(map(len, names), default=1))))
    below = _LEGEND_LINE * math.ceil(len(names) / columns) + (0.12 if names else 0)
    height = _HEIGHT + below
    with _style():
        figure = Figure(figsize=(_WIDTH, height))
        axes = figure.add_axes(
            (0.72 / _WIDTH, (below + 0.52) / height, (_WIDTH - 0.87) / _WIDTH, (_HEIGHT - 0.65) / height)
        )
        draw(axes)
        if names:
            handles = [lines.Line2D([], [], markersize=3.5, linewidth=1.6, **look) for look in looks.values()]
            how = {"loc": "lower center", "ncols": columns, "fontsize": 8, "frameon": False, "borderaxespad": 0.2}
            figure.legend(handles, names, **how)
        svg = _saved(figure)
    return _for_page(svg, prefix, title, below / height), svg


def memory_picture(sheets: Mapping[str, Sheet], *, prefix: str) -> Picture:
    """The predicted peaks as stacked bars (``memory.bars``)."""
    title = "Memory of a training step, predicted"
    with _style():
        svg = _saved(bars(sheets, size=(_WIDTH + 0.25 * len(sheets), _HEIGHT + 0.8), font=8))
    kinds = list(dict.fromkeys(kind for sheet in sheets.values() for kind in sheet.peak.parts))
    lines = [[name, *(str(sheet.peak.parts.get(kind, 0)) for kind in kinds)] for name, sheet in sheets.items()]
    page = _for_page(svg, prefix, title, 0.0)
    return Picture(name="memory", title=title, page=page, file=svg, data=table_csv(["method", *kinds], lines))


def _saved(figure: Any) -> str:
    """As SVG, without metadata, to a hundredth of a point, and with letters that every browser has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor="white")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)


def _for_page(svg: str, prefix: str, title: str, cut: float) -> str:
    """The drawing inside HTML: ids of its own, the page's ink, cut off above the legend."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\b(id=\"|href=\"#|url\(#)", rf"\g<1>{prefix}", svg)
    svg = svg.replace(_INK, "currentColor").replace(_LINES, "var(--line)").replace("fill: #ffffff", "fill: none")
    head, _, body = svg.partition(">")
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    assert found is not None, "matplotlib gives every picture a viewBox"
    width, height = float(found[1]), float(found[2])
    if cut:
        body = re.sub(r'<g id="[^"]*legend_1">.*?\n  </g>', "", body, flags=re.DOTALL)
    return f'<svg viewBox="0 0 {width:g} {height * (1 - cut):g}" role="img" aria-label="{title}">{body}'


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    found = list(points)
    return [x for x, _ in found], [y for _, y in found]
