"""The record of a run: `log.jsonl`, the live progress line, TensorBoard and W&B on request, `env.json`.

A `Record` is a flat mapping with the `step` it belongs to: training records have `loss`, evaluation records `val_loss`
or another metric's name, never `loss`. Everything that takes records is a `Writer`, so the loop knows one list.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from lowrank.infra.files import finite, write_text_atomically

Value: TypeAlias = float | int | str | bool | None
Record: TypeAlias = Mapping[str, Value]


class Writer(Protocol):
    """Takes records, one after another."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class LogError(OSError):
    """A record that could not be written; the message says what is left and how to go on."""


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
            records = [record for record in read_log(path) if record["step"] <= after]
            write_text_atomically(path, "".join(map(_line, records)))
        self.path = path
        self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        try:
            if not self._is_there():
                self._file.close()
                self._file = self.path.open("ab", buffering=0)
                warnings.warn(
                    f"{self.path} was deleted while the run was writing it: the records before step {record['step']} "
                    "are lost, and a new one is begun",
                    stacklevel=2,
                )
            self._append(_line(record).encode())
        except OSError as error:
            raise LogError(self._why(record, error)) from error

    def _append(self, line: bytes) -> None:
        """The whole line, or nothing of it."""
        before = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(before)
            raise

    def _is_there(self) -> bool:
        try:
            return self.path.stat().st_ino == os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return False

    def _why(self, record: Record, error: OSError) -> str:
        folder = self.path.parent
        if not folder.is_dir():
            return f"{folder} was deleted while the run was writing it, and nothing of it is left: start the run again"
        full = error.errno == errno.ENOSPC
        cause, remedy = ("the disk is full", "make room") if full else (str(error), "mend that")
        return (
            f"could not write the record of step {record['step']} into {self.path}: {cause}; the records before and "
            f"the checkpoints are untouched; {remedy} and go on with: lowrank train --resume {folder}"
        )

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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is no text ({error})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not a record: {line[:80]!r}") from error
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path}, line {number} is damaged: a record has the step that it belongs to")
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
    return json.dumps(finite(dict(record)), allow_nan=False) + "\n"
