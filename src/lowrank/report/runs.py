"""The runs in folders: those that have come to their end, and what is known of the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.infra.log import read_log
from lowrank.infra.text import one_line
from lowrank.run.run import flat

CONTENT = "data.fingerprint"  # of what a run was trained on, whatever it is called
FAILED = "failed.json"  # in the folder of a run that went wrong: why


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run: its settings (dotted names), its summary and its log."""

    folder: Path
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]

    @property
    def method(self) -> str:
        return str(self.settings["method"])

    @property
    def length(self) -> str:
        """How long the run was, in the unit in which it was asked for."""
        if self.settings.get("steps") is None and self.settings.get("stop_at") is None:
            return f"{self.settings.get('epochs')} epochs"
        return f"{self.summary.get('steps')} steps"


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A run that has not come to its end, and why; its log is as far as it went."""

    result: Result
    why: str


def to_stderr(text: str) -> None:
    print(one_line(text), file=sys.stderr)


def find_results(paths: Iterable[Path], *, say: Callable[[str], None] = to_stderr) -> list[Result]:
    """The finished runs in the folders given, or in the folders right below them in the order in which they began.

    Runs whose files are damaged are left out, and ``say`` is told the file.

    Raises:
        FileNotFoundError: a folder holds none.
    """
    results = []
    for path in paths:
        folders, found = _folders(path), []
        for folder in folders:
            try:
                result = _read(folder)
            except ValueError as error:
                say(f"left out: {error}")
                continue
            found += [result] if result else []
        if not found:
            begun = f"; {len(folders)} unfinished or damaged" if folders else ""
            raise FileNotFoundError(f"there is no finished run (run.json with summary.json) in {path}{begun}")
        results += found
    return results


def find_unfinished(paths: Iterable[Path], *, growing: bool = False) -> list[Unfinished]:
    """The runs in the folders given (as in ``find_results``) that have not come to their end, each with the reason.

    ``growing``: others may be at work on them. Damaged folders are left out.
    """
    found = []
    for folder in (folder for path in paths for folder in _folders(path)):
        try:
            if _read(folder) is not None:
                continue
            settings, log = _settings(folder / "run.json"), _log(folder)
        except ValueError:
            continue
        asked = min((n for name in ("steps", "stop_at") if (n := settings.get(name))), default=None)
        last = log[-1] if log else {"step": 0}
        place = f"step {last['step']}" + (f" of {asked}" if asked else "")
        why = f"running: {place}" if growing else f"not finished: {place}"
        if (folder / FAILED).is_file():
            why = str(_object(folder / FAILED).get("error"))
        elif "loss" in last and not isinstance(last["loss"], float):
            why = f"the loss became {last['loss'] or 'not finite'} at {place}"
        result = Result(folder=folder, settings=settings, summary={"steps": asked}, log=log)
        found.append(Unfinished(result=result, why=why))
    return found


def is_finished(folder: Path, *, say: Callable[[str], None] = to_stderr) -> bool:
    """Whether a run has come to the end that its run.json asks for: it has a sound summary, and nobody stopped it.

    ``say`` is told of a damaged file.
    """
    try:
        return _read(folder) is not None
    except ValueError as error:
        say(f"not taken for finished: {error}")
        return False


def _read(folder: Path) -> Result | None:
    """A run's result; None where it has not finished.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    summary_file = folder / "summary.json"
    if not summary_file.is_file():
        return None
    settings, summary = _settings(folder / "run.json"), _object(summary_file)
    done, asked = summary.get("steps"), [settings[name] for name in ("steps", "stop_at") if settings.get(name)]
    if not isinstance(done, int):
        raise ValueError(f"{summary_file} is damaged: it does not say how many steps were made")
    if summary.get("interrupted", False) or (asked and done < min(asked)):
        return None
    return Result(folder=folder, settings=settings, summary=summary, log=_log(folder))


def _folders(path: Path) -> list[Path]:
    """A run's folder itself, or those of runs right below it in the order in which they began."""
    if (path / "run.json").is_file():
        return [path]
    files = sorted(path.glob("*/run.json"), key=lambda file: (file.stat().st_mtime_ns, file))
    return [file.parent for file in files]


def _log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, none where it has not begun."""
    file = folder / "log.jsonl"
    return read_log(file) if file.is_file() else []


def _settings(file: Path) -> dict[str, Any]:
    """What a run.json sets, flat."""
    try:
        content = _object(file)
        settings = flat(content)
        if "fingerprint" in content["data"]:
            settings[CONTENT] = content["data"]["fingerprint"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no run: {type(error).__name__} {error}") from error
    if missing := {"recipe", "task", "seed", "lr", "data", "method"} - settings.keys():
        raise ValueError(f"{file} holds no run: it has no {', '.join(sorted(missing))}")
    return settings


def _object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    return content
