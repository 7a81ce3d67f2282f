"""The command ``report``, and what a comparison shows at its end: the tables, the sentences, the page."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank.cli.arguments import Option, Parsed, UsageError, command, switch
from lowrank.infra.text import printable

if TYPE_CHECKING:
    from lowrank.report.comparison import Comparison

_LOOK, _REFRESH = 2.0, 10  # seconds between looks at runs that grow, and until a browser reads their page again
_GROWING = ("run.json", "log.jsonl", "summary.json", "failed.json", "results.json")


_WRITTEN = (
    Option(name="out", value="NAME.html|DIR", help="one page, or a folder; default DIR if it has runs, else report"),
    Option(name="watch", help="write the page anew as runs grow, unfinished ones included, until interrupted"),
)


@command(_WRITTEN, positions=(1, None))
def report(parsed: Parsed) -> int:
    """report DIR… [--out NAME.html|DIR] [--watch]
    one page of runs: the answer, tables and pictures

    Prints tables of the finished runs in the folders (or right below them) and of experiments' results, and what their
    seeds allow to be said. --out NAME.html writes one page, which needs nothing but itself; any other name is a folder
    for report.html, report.md, curves.png, and figures/ with each picture as SVG and CSV and the table for LaTeX. Runs
    that cannot be compared with each other stand in tables of their own; a run that failed is a row with its reason.

    Examples:
      lowrank report runs/first runs/second --out report.html
      lowrank report results/heads-ranks-merge --out table1.html
      lowrank report runs/first --out live.html --watch
    """
    paths = [Path(position) for position in parsed.positions]
    beside = len(paths) == 1 and any(next(paths[0].glob(names), None) for names in ("run.json", "*/run.json"))
    out = Path(parsed.options.get("out", paths[0] if beside else "report"))
    if out.is_file() and not is_page(out):
        raise UsageError(f"--out {out} is a file: give NAME.html for one page, or the name of a folder")
    if is_page(out) and out.is_dir():
        raise UsageError(f"--out {out} is a folder, and a name that ends in .html is one page: give another name")
    if switch(parsed, "watch"):
        watch(paths, out if is_page(out) else out / "report.html")
        return 0
    from lowrank.report.comparison import find_comparisons

    found, why = find_comparisons(paths)
    show(found, out, why)
    return 0


def is_page(out: Path) -> bool:
    """Whether a name is that of one page; any other is a folder's."""
    return out.suffix.lower() in (".html", ".htm")


def show(found: Sequence[Comparison], out: Path, why: str = "") -> None:
    """Print tables and sentences, which need no extra package, then write the page or folder, which does."""
    from lowrank.report import html
    from lowrank.report.comparison import printed

    print(printable(printed(found, shutil.get_terminal_size((100, 24)).columns, why)))
    if is_page(out):
        html.write(found, out, why=why)
        print(f"\n{out}")
    else:
        html.write_folder(found, out, why=why)
        print(f"\n{out}/report.html, {out}/report.md, {out}/curves.png, {out}/figures/")


def watch(paths: Sequence[Path], page: Path) -> None:
    """Write the page anew whenever the runs have grown, until interrupted.

    Raises:
        FileNotFoundError: a path is not there.
        KeyboardInterrupt: the way it ends.
    """
    from lowrank.report import html
    from lowrank.report.comparison import find_comparisons

    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}: name a folder of finished runs, or a results.json")
    print(f"{page} is written anew as the runs grow; an interrupt (Ctrl-C) ends it", flush=True)
    before: object = None
    while True:
        now = _state(paths)
        if now != before:
            try:
                found, why = find_comparisons(paths, growing=True)
            except FileNotFoundError as error:  # nothing has begun yet
                print(printable(f"waiting: {error}"), flush=True)
            else:
                html.write(found, page, why=why, refresh=_REFRESH)
            before = now
        time.sleep(_LOOK)


def _state(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Of every file that a run's page is made of, its size and when it changed."""
    files = [path for path in paths if path.is_file()]
    for path in paths:
        for depth in ("", "*/", "*/*/"):
            files += [file for name in _GROWING for file in path.glob(depth + name)]
    found = []
    for file in sorted(files):
        try:
            stat = file.stat()
        except FileNotFoundError:  # a run that has just been removed
            continue
        found.append((str(file), stat.st_size, stat.st_mtime_ns))
    return found
