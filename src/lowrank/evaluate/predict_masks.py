"""Masks of files, each of its file's own size: a NIfTI file for a NIfTI file, in its array and affine, or for a DICOM
series; a PNG otherwise.

    plane (h, w) → fitted as in training (size, size) → logits (classes, s, s) → the plane's part of them → (h, w)

A pixel's value is its class, 0 being the background; where ``fit`` cropped a plane, what was cut off is background. A
volume is answered slice by slice. What was trained on windows (``fit="windows"``) slides them over each plane, half of
one over the next, and takes the mean of their logits, weighted by a Gaussian (MONAI's sliding window).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.data.cache import published
from lowrank.data.images.batches import to_model
from lowrank.data.images.decode import Damaged, Planes, Reading, coloured, fitted, fitted_part, read_planes
from lowrank.data.images.masks import MaskData
from lowrank.data.images.medical import DICOM, is_nifti, is_series, is_volume, series_files, write_labels
from lowrank.evaluate.collected_answers import check_finite
from lowrank.evaluate.segmentation_task import resized
from lowrank.infra.extras import import_extra
from lowrank.infra.files import refuse_filled
from lowrank.infra.text import some
from lowrank.models.vision import logits_of
from lowrank.run.task import Asked


@dataclass(frozen=True, kw_only=True)
class MaskPrediction:
    """One file: where its mask lies, and each class's share of the pixels, the background's left out."""

    path: str
    mask: str
    shares: dict[str, float]

    def __str__(self) -> str:
        return f"{self.path}: {self.mask}  ({', '.join(f'{name} {share:.1%}' for name, share in self.shares.items())})"


def predict_masks(model: nn.Module, data: MaskData, asked: Asked) -> list[MaskPrediction]:
    """Masks of files in the folder ``asked.out``, all of them or none.

    Raises:
        FileExistsError: the folder is not empty, or is a file.
        ValueError: no folder; two files of one name; damaged files (named, counted).
        FloatingPointError: the model gives NaN.
    """
    out, names = _checked(asked)
    made: list[MaskPrediction] = []
    damaged: list[str] = []
    with published(out) as folder:
        for path, name in names.items():
            try:
                planes = read_planes(path, data.reading)
            except Damaged as error:
                damaged.append(f"{path} ({error})")
                continue
            if damaged and not asked.skip_damaged:
                continue  # only looked at, to name them all
            labels = segment(model, planes.values, data, asked.batch_size)
            _write(folder / name, labels, path, planes)
            counts = np.bincount(labels.reshape(-1), minlength=len(data.classes)) / labels.size
            shares = dict(zip(data.classes[1:], map(float, counts[1:]), strict=True))
            made.append(MaskPrediction(path=str(path), mask=str(out / name), shares=shares))
        if damaged and not asked.skip_damaged:
            raise ValueError(
                f"{len(damaged)} of {len(names)} images cannot be read: {some(damaged)}; leave them out with "
                "--skip-damaged"
            )
    return made


def _checked(asked: Asked) -> tuple[Path, dict[Path, str]]:
    """The folder, and each file's mask in it: files of several folders keep these below what they have in common. A
    folder whose DICOM files are all there and one series is one volume."""
    out = asked.out
    if out is None:
        raise ValueError("where do the masks go? give --out FOLDER, a new one")
    refuse_filled(out)
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out} cannot be: there is no folder {out.absolute().parent}")
    series = {path.parent for path in asked.files if path.name.lower().endswith(DICOM)}
    series = {folder for folder in series if set(series_files(folder)) <= set(asked.files) and is_series(folder)}
    files = list(dict.fromkeys(path.parent if path.parent in series else path for path in asked.files))
    root = Path(os.path.commonpath([path.absolute().parent for path in files]))
    names = {}
    for path in files:
        suffix = ".png" if not is_volume(path) else "" if is_nifti(path) else ".nii.gz"
        mask = path.with_suffix(suffix) if suffix == ".png" else path.with_name(path.name + suffix)
        names[path] = mask.absolute().relative_to(root).as_posix()
    counts = Counter(names.values())
    if twice := [str(path) for path, name in names.items() if counts[name] > 1]:
        raise ValueError(f"the masks of {some(twice)} would have one name: rename them, or leave some out")
    return out, names


@torch.no_grad()
def segment(model: nn.Module, planes: np.ndarray, data: MaskData, batch_size: int) -> np.ndarray:
    """(n, h, w) or (n, h, w, 3) uint8 → the class of each pixel, (n, h, w) uint8."""
    if data.reading.fit == "windows":
        return np.stack([_in_windows(model, coloured(plane, data.reading), data, batch_size) for plane in planes])
    device, found = next(model.parameters()).device, []
    for first in range(0, len(planes), batch_size):
        some_planes = planes[first : first + batch_size]
        x = to_model(np.stack([fitted(plane, data.reading) for plane in some_planes]), data.spec).to(device)
        logits = logits_of(model, x)
        check_finite(logits, "images")
        found.append(_of_own_size(logits, planes.shape[1], planes.shape[2], data.reading))
    return np.concatenate(found)


def _in_windows(model: nn.Module, plane: np.ndarray, data: MaskData, batch_size: int) -> np.ndarray:
    """The class of each pixel of a plane, (h, w) uint8."""
    slide = import_extra("monai.inferers", "medical").sliding_window_inference
    device, size = next(model.parameters()).device, data.reading.size

    def answer(windows: Tensor) -> Tensor:
        images = windows[:, 0] if data.reading.grey else windows.permute(0, 2, 3, 1)
        logits = logits_of(model, to_model(images.round().byte().numpy(), data.spec).to(device))
        return resized(logits, size, size).cpu()

    image = torch.from_numpy(np.array(plane, dtype=np.float32))
    image = image[None, None] if data.reading.grey else image.permute(2, 0, 1)[None]
    logits = slide(image, (size, size), batch_size, answer, overlap=0.5, mode="gaussian")
    check_finite(logits, "images")
    return np.asarray(logits.argmax(dim=1)[0].byte().numpy())


def _of_own_size(logits: Tensor, h: int, w: int, reading: Reading) -> np.ndarray:
    """Logits (n, classes, s, s) → the classes of planes of h × w; one class at a time, for these may be large."""
    seen, shown = fitted_part(h, w, reading)
    high, wide = (part.stop - part.start for part in seen)
    best = torch.full((len(logits), high, wide), -math.inf, device=logits.device)
    labels = torch.zeros(best.shape, dtype=torch.uint8, device=logits.device)
    for i in range(logits.shape[1]):
        square = resized(logits[:, i : i + 1], reading.size, reading.size)
        own = resized(square[:, :, shown[0], shown[1]], high, wide)[:, 0]
        labels[own > best] = i
        best = torch.maximum(best, own)
    whole = np.zeros((len(logits), h, w), dtype=np.uint8)
    whole[:, seen[0], seen[1]] = labels.cpu().numpy()
    return whole


def _write(path: Path, labels: np.ndarray, of: Path, planes: Planes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_volume(of):
        return write_labels(path, labels, of, planes.affine)
    from PIL import Image

    Image.fromarray(labels[0]).save(path)
