"""The record of a run: `log.jsonl`, the live progress line, TensorBoard and W&B on request, `env.json`.

A `Record` is a flat mapping with the `step` it belongs to: training records have `loss`, evaluation records `val_loss`
or another metric's name, never `loss`. Everything that takes records is a `Writer`, so the loop knows one list.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

Value: TypeAlias = float | int | str | bool | None
Record: TypeAlias = Mapping[str, Value]


class Writer(Protocol):
    """Takes records, one after another."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Log:
    """`log.jsonl`: one line a record, handed to the operating system at once, so that a killed process loses nothing.

    Args:
        path: the file; its folder must exist.
        after: None starts a new log; N goes on with one, dropping its records beyond step N (they will come again).

    Raises:
        FileExistsError: a new log is asked for where one already is.
    """

    def __init__(self, path: Path, *, after: int | None = None) -> None:
        if after is None:
            if path.exists() and path.stat().st_size:
                raise FileExistsError(f"{path} already holds the records of a run: resume it or choose another folder")
        elif path.exists():
            _rewrite(path, (record for record in read_log(path) if record["step"] <= after))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a log, oldest first; a last line that was cut off is left out.

    Raises:
        ValueError: a line before the last is not a record; the message names it.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not a record: {line[:80]!r}") from error
        records.append(record)
    return records


class TensorBoard:
    """Scalars for TensorBoard: every number of a record at its step.

    Raises:
        ImportError: the package `tensorboard` is missing.
    """

    def __init__(self, folder: Path, *, after: int | None = None) -> None:
        _need("tensorboard", "--tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, int(record["step"] or 0))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run named after the folder, with the run's settings.

    Raises:
        ImportError: the package `wandb` is missing.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, after: int | None = None) -> None:
        wandb = _need("wandb", "--wandb")
        self._run = wandb.init(
            project="lowrank",
            id=f"{folder.parent.name}-{folder.name}",
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
            resume="never" if after is None else "allow",
        )

    def write(self, record: Record) -> None:
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        self._run.log(numbers, step=int(record["step"] or 0))

    def close(self) -> None:
        self._run.finish()


def open_writers(
    out: Path,
    settings: Mapping[str, Any],
    *,
    tensorboard: bool = False,
    wandb: bool = False,
    after: int | None = None,
) -> list[Writer]:
    """The log of a run's folder and whatever else was asked for, in that order.

    Args:
        out: the run's folder.
        settings: the run as JSON, shown by W&B.
        tensorboard, wandb: also write there.
        after: None for a new run, otherwise the step from which it is resumed.

    Raises:
        ImportError: a package that was asked for is missing; raised before the log is touched.
        FileExistsError: a new log is asked for where one already is.
    """
    others: list[Writer] = []
    if tensorboard:
        others.append(TensorBoard(out / "tensorboard", after=after))
    if wandb:
        others.append(WeightsAndBiases(out, settings, after=after))
    return [Log(out / "log.jsonl", after=after), *others]


def _need(package: str, option: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{option} needs the package {package}: pip install {package}, or leave the option out"
        ) from error


def _line(record: Record) -> str:
    """One line of JSON; a number that is not finite becomes null, which every reader of JSON understands."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(finite) + "\n"


def _rewrite(path: Path, records: Iterable[Record]) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(_line(record) for record in records)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
