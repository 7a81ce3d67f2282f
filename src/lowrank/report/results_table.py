"""An experiment's results as a table and its sentences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lowrank.infra.progress import short_bytes, short_count
from lowrank.report.results import Results, Row
from lowrank.report.statistics import plus_minus, sentence, within
from lowrank.report.table import Table, said


def results_cells(results: Results, *, costs: bool = False) -> Table:
    """Best first; ± is the standard deviation over the seeds. A setting with * is best at the edge of its space. A
    method that failed has its reason. ``costs``: also state for each parameter, seconds and bytes on the wire."""
    rows, figures = results.at(), results.figures()
    sign = 1 if results.lower else -1
    order = sorted(results.methods, key=lambda m: sign * statistics.fmean(figures[m].values()) if figures[m] else 1e9)
    header = ["method", results.metric.replace("_", " "), "steps", "trained", "state", "peak", "s/step"]
    wire = costs and any(row.wire_bytes is not None for row in rows)
    header += (["state B/param", "seconds"] if costs else []) + (["sent"] if wire else [])
    header += ["steps to baseline's", "tuned to"]
    body = []
    for method in order:
        own = [row for row in rows if row.method == method]
        sound = [row for row in own if row.error is None]
        if not sound:
            body.append([method, *["–"] * (len(header) - 2), own[0].error or "failed"])
            continue
        values = list(figures[method].values())
        figure = plus_minus(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
        shown = (("trained", short_count), ("state_bytes", short_bytes), ("peak_bytes", short_bytes))
        more = [f"{(sound[0].state_bytes or 0) / (sound[0].total or 1):.3g}", within(_known(sound, "seconds"))]
        sent = [short_bytes(sound[0].wire_bytes or 0)]
        body.append(
            [method, figure, str(sound[0].steps)]
            + [show(getattr(sound[0], name) or 0) for name, show in shown]
            + [f"{statistics.median(row.step_seconds or 0 for row in sound):.2g}"]
            + (more if costs else [])
            + (sent if wire else [])
            + [_reached(sound), _tuned(sound[0])]
        )
    return header, body


def findings(results: Results) -> list[str]:
    """What the results say: the sentence, one for each shorter horizon, and what failed."""
    told = [sentence(results.differences())]
    for place, steps in enumerate(results.horizons[:-1]):
        told.append(f"After {steps} of {results.horizons[-1]} steps: {sentence(results.differences(place))}")
    failed = {row.method: row.error for row in results.rows if row.error}
    return told + [f"{method} failed: {error}" for method, error in failed.items()]


def _known(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := getattr(row, name)) is not None]


def _reached(rows: Sequence[Row]) -> str:
    """The median step at which the seeds reached the baseline's loss, where more than half did."""
    steps = sorted(float("inf") if row.steps_to_baseline is None else row.steps_to_baseline for row in rows)
    middle = steps[len(steps) // 2]
    return "–" if middle == float("inf") else str(int(middle))


def _tuned(row: Row) -> str:
    names = {name: name.removeprefix("method.") for name in row.settings}
    return " ".join(
        f"{names[name]}={said(value)}{'*' if name in row.edge else ''}" for name, value in row.settings.items()
    )
