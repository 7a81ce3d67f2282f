"""What `lowrank report` does: tables in the terminal, and the page, of runs or of an experiment's results."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank.cli.arguments import Parsed, switch
from lowrank.infra.text import printable

_WATCH = 5  # seconds between two looks at the folders


def report(parsed: Parsed) -> int:
    """Tables, pictures and the page of runs that are finished, or of an experiment's results."""
    folders = [Path(position) for position in parsed.positions]
    out = Path(parsed.options.get("out", folders[0] if len(folders) == 1 else "report"))
    _show(folders, out)
    while switch(parsed, "watch"):
        time.sleep(_WATCH)
        _write(folders, out, refresh=_WATCH)
    return 0


def show_report(results: Sequence[Any], out: Path) -> None:
    """The table first: it needs no extra package, the pictures do."""
    from lowrank.report import html
    from lowrank.report.table import printed

    print(printable(printed(results, _width())))
    html.write(results, out)
    print(f"\n{out}/report.html, {out}/report.md, {out}/curves.png")


def _show(folders: Sequence[Path], out: Path) -> None:
    from lowrank.report.results import find_experiments
    from lowrank.report.results_table import printed_results
    from lowrank.report.table import find_results, printed

    experiments = find_experiments(folders)
    for each in experiments.values():
        print(printable(printed_results(each, _width())) + "\n")
    if not experiments and out.suffix != ".html":
        show_report(find_results(folders), out)
        return
    if not experiments:
        print(printable(printed(find_results(folders), _width())) + "\n")
    print(_write(folders, out))


def _write(folders: Sequence[Path], out: Path, refresh: int | None = None) -> Path:
    """The page alone, which is given."""
    from lowrank.report import html
    from lowrank.report.results import find_experiments
    from lowrank.report.table import find_results

    page = out if out.suffix == ".html" else out / "report.html"
    if experiments := find_experiments(folders):
        html.write_experiments(list(experiments.values()), page, refresh=refresh)
    else:
        html.write_runs(find_results(folders), page, refresh=refresh)
    return page


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns
