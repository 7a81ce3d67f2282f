"""What came of an experiment: one JSON file, from which tables, pages and `docs/evidence.md` are made without a run.

    results/EXPERIMENT/HARDWARE_DATE/results.json

    {
      "schema": 1,
      "experiment": "arena-llama",  "size": "small",  "preset": "as-meant",
      "question": what it asks, one sentence,
      "caveat": what this size can and cannot say,
      "command": the command line that makes the file again,
      "baseline": the method with which all others are compared,
      "metric": a name in `figures` of which `lower` (true or false) says whether less is better, in `unit`,
      "equal": "tokens", "seconds" or "memory": what all methods got the same of,
      "seeds": of the rows,  "tuning_seeds": of the trials; none in common,
      "environment": {"hardware", "date", "commit", "versions": {package: version}},
      "settings": {option: value}, what all runs share,
      "seconds": of everything, tuning included,
      "space": {method: {option: [values]}}, what was searched; empty: nothing was tuned,
      "trials": [{"method", "rung", "steps", "seed", "settings": {option: value}, "value": validation figure or null,
                  "error": text or null, "seconds"}],
      "rows": one per method, horizon and seed, whatever became of it:
        [{"method": name in tables,
          "call": the method as `--method` takes it, with the arguments that are its own: {"name", "args"},
          "seed", "steps": optimizer steps, the horizon, "budget": {"tokens" or "images": seen in all, "batch_size"},
          "settings": {option: the tuned value}, "edge": [options whose best value lies at the edge of its space],
          "figures": {name: value}, such as test_loss (the reported one, read once, at the end) and val_loss,
          "steps_to_baseline": the first step whose validation loss is at most the baseline's last under the same seed
                               and horizon, or null,
          "peak_bytes", "state_bytes", "seconds": training alone, "step_seconds",
          "wire_bytes": sent by a rank in all, null on one rank,
          "trained", "total": numbers,
          "curve": {"train": [[step, loss], …], "val": [[step, loss], …]}, thinned out; where a method refreshes bases
                   also "basis_energy" and "basis_overlap",
          "layers": {group of layers: {"change", "effective_rank", "trained"}} of what was changed (`train/spectra`),
          "error": why there are no figures, or null}]
    }

Rows of the longest horizon are the main table; the shorter ones show whether a gain grows or shrinks with length.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from lowrank.infra.files import read_json, write_json
from lowrank.report.statistics import Difference, compare

FILE = "results.json"
SCHEMA = 1

Curve = Mapping[str, Sequence[tuple[int, float]]]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A tuning run: one point of a method's space."""

    method: str
    rung: int
    steps: int
    seed: int
    settings: Mapping[str, Any]
    value: float | None = None
    error: str | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A reporting run; the fields are the module's."""

    method: str
    seed: int
    steps: int
    call: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    edge: Sequence[str] = field(default_factory=list)
    figures: Mapping[str, float] = field(default_factory=dict)
    steps_to_baseline: int | None = None
    peak_bytes: int | None = None
    state_bytes: int | None = None
    seconds: float | None = None
    step_seconds: float | None = None
    wire_bytes: int | None = None
    trained: int | None = None
    total: int | None = None
    curve: Curve = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """An experiment's results; the fields are the module's."""

    experiment: str
    size: str
    preset: str
    question: str
    caveat: str
    command: str
    baseline: str
    metric: str
    lower: bool
    unit: str
    equal: str
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    seconds: float
    space: Mapping[str, Mapping[str, Sequence[Any]]]
    trials: Sequence[Trial]
    rows: Sequence[Row]

    @property
    def methods(self) -> list[str]:
        """In the order of the experiment, those that failed included."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def horizons(self) -> list[int]:
        """Of the baseline, in its steps, shortest first; the last is the main one."""
        return sorted({row.steps for row in self.rows if row.method == self.baseline})

    def at(self, horizon: int = -1) -> list[Row]:
        """The rows of one of the horizons, by its place among them; methods may take other numbers of steps."""
        steps = {method: sorted({r.steps for r in self.rows if r.method == method}) for method in self.methods}
        place = horizon % max(1, len(self.horizons))
        return [row for row in self.rows if row.steps == steps[row.method][min(place, len(steps[row.method]) - 1)]]

    def figures(self, name: str | None = None, horizon: int = -1) -> dict[str, dict[int, float]]:
        """method -> seed -> figure, by default the experiment's own; what failed or is not finite is left out."""
        found: dict[str, dict[int, float]] = {method: {} for method in self.methods}
        for row in self.at(horizon):
            value = row.figures.get(name or self.metric)
            if value is not None and math.isfinite(value):
                found[row.method][row.seed] = value
        return found

    def mean(self, method: str, name: str | None = None, horizon: int = -1) -> float | None:
        values = list(self.figures(name, horizon)[method].values())
        return statistics.fmean(values) if values else None

    def differences(self, horizon: int = -1, baseline: str | None = None) -> list[Difference]:
        """Every method beside the baseline."""
        return compare(self.figures(horizon=horizon), baseline or self.baseline, lower=self.lower)

    def write(self, folder: Path) -> Path:
        """Write the file into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, {"schema": SCHEMA, **asdict(self)})
        return folder / FILE


def read_results(file: Path) -> Results:
    """An experiment's results from its file.

    Raises:
        ValueError: it is damaged, of another schema or of something else; the message names the file and the fault.
        OSError: it cannot be read.
    """
    content = read_json(file)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{file} holds no results of an experiment (schema {SCHEMA})")
    try:
        rows = [_made(Row, row) for row in content.pop("rows")]
        trials = [_made(Trial, trial) for trial in content.pop("trials")]
        found = _made(Results, {**content, "rows": rows, "trials": trials})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} holds no results of an experiment: {error}") from error
    if found.baseline not in found.methods:
        raise ValueError(f"{file}: its baseline {found.baseline!r} is none of its methods, {', '.join(found.methods)}")
    return found


def find_experiments(paths: Iterable[Path]) -> dict[Path, Results]:
    """The results in files and folders, by their files: `results`, `results/arena-llama`, one of its folders, a file.

    Raises:
        ValueError: as ``read_results``.
    """
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob(FILE)))]
    return {file: read_results(file) for file in files}


def _made(kind: type[T], content: Mapping[str, Any]) -> T:
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in content.items() if name in known})
