"""What a model says of image files: a base with an adapter, or a run. How files are answered is the task's to say.

Files are read exactly as the training data was: the same size, window and fit, the model's own resize and
normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from lowrank.data.images.batches import to_model
from lowrank.data.images.decode import Damaged, Reading, image_files, read_image
from lowrank.data.images.medical import volumes_of
from lowrank.data.images.source import ImageData
from lowrank.evaluate.collected_answers import check_finite
from lowrank.evaluate.image_metrics import predicted
from lowrank.evaluate.image_task import probabilities
from lowrank.infra import checkpoint
from lowrank.infra.files import write_csv
from lowrank.infra.text import some
from lowrank.interop.adapter_bank import AdapterBank, AdapterInfo, read_adapter
from lowrank.models import MODELS
from lowrank.models.vision import logits_of
from lowrank.run.overrides import catalogue
from lowrank.run.run import Call, Run
from lowrank.run.session import pick_checkpoint, pick_device, restore, run_folder
from lowrank.run.task import Asked, Task


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One image: the answer (several names, or none, where labels are several) and the probability of every class."""

    path: str
    answer: tuple[str, ...]
    scores: dict[str, float]

    def __str__(self) -> str:
        """The answer, and the surest three with their probabilities."""
        surest = sorted(self.scores.items(), key=lambda item: -item[1])[:3]
        figures = ", ".join(f"{name} {score:.3f}" for name, score in surest)
        return f"{self.path}: {' and '.join(self.answer) or 'none'}  ({figures})"


def predict(
    images: Sequence[str],
    *,
    adapter: str | None = None,
    base: str | None = None,
    out: str | None = None,
    skip_damaged: bool = False,
    batch_size: int = 32,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> list[Any]:
    """Answer image files: their classes, or masks of them.

    Args:
        images: files, and folders of files.
        adapter: the folder of an exported adapter; none: ``base`` is a run.
        base: what the adapter was trained on: a run's folder, a file or folder of weights, a timm name, or ``hub``; by
            default what the adapter names itself.
        out: also write a CSV file; of masks the folder, new or empty, that they go to.
        skip_damaged: leave out files that cannot be read.
        batch_size: images at once.
        device: auto, cpu or cuda.

    Returns:
        A ``Prediction`` of each file, or a ``MaskPrediction``.

    Raises:
        ValueError: neither adapter nor run; an adapter for another base; damaged files (named, counted).
        FloatingPointError: the model gives NaN.
    """
    paths = _files(images)
    task: Task
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size} must be at least 1")
    if adapter is not None:
        info, tensors = read_adapter(Path(adapter))
        data, task = info.data(), catalogue().task[info.task]()
        bank = AdapterBank(base_model(info, base).to(pick_device(device)))
        bank.add("adapter", info, tensors)
        model = bank.use("adapter").eval()
    elif base is not None:
        session, _ = restore(Path(base), device=device)
        if type(session.task).predict is Task.predict:
            raise ValueError(f"{base} is a run on {session.run.task}: only models of images predict")
        model, data, task = session.model, session.data, session.task
    else:
        raise ValueError("which model? give --adapter DIR (and --base where it is elsewhere), or --base RUN")
    place = None if out is None else Path(out)
    asked = Asked(files=paths, batch_size=batch_size, out=place, skip_damaged=skip_damaged)
    return task.predict(model, data, asked)


def predict_classes(model: nn.Module, data: ImageData, asked: Asked) -> list[Prediction]:
    """The classes of files; ``asked.out`` is a CSV file."""
    _check_out(asked.out, asked.files)
    paths = asked.files if data.reading.depth is None else volumes_of(asked.files)
    made = [
        each
        for batch in _batches(paths, data.reading, asked.batch_size, asked.skip_damaged)
        for each in classify(model, batch, data)
    ]
    if asked.out is not None:
        _write(asked.out, made)
    return made


@torch.no_grad()
def classify(model: nn.Module, images: Sequence[tuple[str, np.ndarray]], data: ImageData) -> list[Prediction]:
    """Predictions for (name, (h, w), (h, w, 3) or (d, h, w) uint8), all of one shape."""
    several = data.kind == "multi-label"
    x = to_model(np.stack([array for _, array in images]), data.spec).to(next(model.parameters()).device)
    told = probabilities(logits_of(model, x), several=several).cpu()
    check_finite(told, "images")
    scores = told.numpy()
    answers = predicted(scores, data.kind)
    made = []
    for (name, _), row, answer in zip(images, scores, answers, strict=True):
        chosen = tuple(data.classes[c] for c in (np.flatnonzero(answer) if several else [int(answer)]))
        made.append(Prediction(path=name, answer=chosen, scores=dict(zip(data.classes, map(float, row), strict=True))))
    return made


def base_model(info: AdapterInfo, base: str | None = None) -> nn.Module:
    """The plain model that an adapter goes on, as the adapter names it or as ``base`` says."""
    call, weights = info.model, None
    path = Path(base).expanduser() if base is not None else None
    if path is not None and (path / "run.json").is_file():
        root = run_folder(path)
        run = Run.read(root / "run.json")
        if run.task != info.task:
            raise ValueError(f"--base {base} is a run on {run.task}, and the adapter is for {info.task}")
        call = run.model
        weights = checkpoint.load(pick_checkpoint(root, "best")).tensors
    elif base is not None and (base == "hub" or (path is not None and path.exists())):
        call = Call(name=call.name, args={**call.args, "path" if call.name == "hf-vit" else "weights": base})
    elif base is not None:
        if call.name != "vit":
            raise ValueError(f"--base {base}: there is no such file or folder, and {call.name} has no models by name")
        call = Call(name="vit", args={**call.args, "name": base})
    torch.manual_seed(info.seed)  # a base that was drawn at random is drawn again
    if call.name not in MODELS:
        raise ValueError(f"the adapter's base is {call.name!r}, a model that is not known here: say where, --base RUN")
    try:
        model = MODELS[call.name](info.data(), **call.args)
    except TypeError as error:
        raise ValueError(f"the adapter's base, {call.name}, does not take what the adapter says: {error}") from error
    if weights is not None:
        ours = model.state_dict()
        missing = [n for n in info.base if n not in weights or n not in ours or weights[n].shape != ours[n].shape]
        if missing:
            raise ValueError(f"the run {base} is of another model than the adapter: it has no {', '.join(missing[:3])}")
        model.load_state_dict({n: weights[n] for n in info.base}, strict=False)
    return model


def _check_out(path: Path | None, images: Sequence[Path]) -> None:
    """Refuse, before any work, a file that could not be written, or is one of the images."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        why = "is a folder" if path.is_dir() else f"cannot be: there is no folder {path.parent}"
        raise ValueError(f"--out {path} {why}; give the name of a file that is to be written")
    if path.exists() and any(path.samefile(image) for image in images):
        raise ValueError(f"--out {path} is one of the images, and would be overwritten: choose another name")


def _files(images: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for name in images:
        path = Path(name).expanduser()
        if path.is_dir():
            found += image_files(path)
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"there is no image or folder {name}")
    if not found:
        raise ValueError("no images: give files, or folders with files")
    return found


def _batches(
    paths: Sequence[Path], reading: Reading, batch_size: int, skip_damaged: bool
) -> Iterator[list[tuple[str, np.ndarray]]]:
    """(name, array) of the files, so many at once; once one is damaged the rest is only looked at, to name them all."""
    damaged: list[str] = []
    batch: list[tuple[str, np.ndarray]] = []
    for path in paths:
        try:
            batch.append((str(path), read_image(path, reading)))
        except Damaged as error:
            damaged.append(f"{path} ({error})")
        if damaged and not skip_damaged:
            batch.clear()
        if len(batch) == batch_size:
            yield batch
            batch = []
    if damaged and not skip_damaged:
        raise ValueError(
            f"{len(damaged)} of {len(paths)} images cannot be read: {some(damaged)}; leave them out with --skip-damaged"
        )
    if batch:
        yield batch


def _write(path: Path, predictions: Sequence[Prediction]) -> None:
    header = ["image", "answer", *(predictions[0].scores if predictions else [])]
    rows = [[each.path, "|".join(each.answer), *(f"{s:.6g}" for s in each.scores.values())] for each in predictions]
    write_csv(path, header, rows)
