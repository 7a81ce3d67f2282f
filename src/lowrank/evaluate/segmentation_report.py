"""The report of a run's final test on masks: Dice, IoU and Hausdorff distance by class, and overlays.

    metrics.json  report.html  report.md     figures overall and by class with 95 % bootstrap intervals
    predictions.csv                          the figures of every image
    overlays.png                             the best, the median and the worst image: as it is, its mask, the answer

An image's figures are averaged over its patient where that is known, and patients (else images) are resampled. The
Hausdorff distance is MONAI's, its 95th percentile, in millimetres where all files say how far apart their pixels lie,
otherwise in pixels as stored; it is defined where mask and answer both have the class.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowrank.data.images.masks import MaskData
from lowrank.data.images.set import Split
from lowrank.evaluate.collected_answers import defined_mean
from lowrank.evaluate.image_page import class_table, figure_text, write_markdown, write_page
from lowrank.evaluate.image_report import RESAMPLES, figure_of
from lowrank.evaluate.segmentation_task import MaskTally, one_hot
from lowrank.infra.extras import import_extra
from lowrank.infra.files import write_csv, write_json

KEYS = ("dice", "iou", "hausdorff_95")
COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (230, 159, 0), (204, 121, 167), (86, 180, 233))


def report(data: MaskData, tally: MaskTally, folder: Path, split: str) -> list[str]:
    """Write what a run's best checkpoint made of ``split`` to ``folder/clinic``; gives what is worth saying of it."""
    part, place, classes = data.set.splits[split], folder / "clinic", data.classes[1:]
    place.mkdir(parents=True, exist_ok=True)
    each = np.concatenate([tally.overlap, hausdorff(part, tally, len(data.classes))[None]])
    figures = _figures(each, classes, part)
    _write_each(place / "predictions.csv", part, each, classes)
    overlays(part, tally, each[0], data.classes).savefig(place / "overlays.png", dpi=150)
    write_json(place / "metrics.json", figures)
    names = dict(zip(KEYS, ("Dice", "IoU", f"Hausdorff 95 % ({figures['hausdorff_unit']})"), strict=True))
    overall = {names[name]: figure_text(figure) for name, figure in figures["overall"].items()}
    table = class_table(figures, names)
    write_page(place, figures, overall, table)
    write_markdown(place, figures, overall, table)
    told = ", ".join(f"{name} {_short(row['dice']['value'])}" for name, row in figures["classes"].items())
    return [f"report: {place / 'report.html'}", f"Dice by class: {told}", *figures["findings"]]


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def hausdorff(part: Split, tally: MaskTally, classes: int) -> np.ndarray:
    """(images, classes − 1), in the unit of :func:`_figures`, NaN where it is not defined; one image at a time."""
    monai = import_extra("monai.metrics", "medical")
    found = np.full((len(part), classes - 1), np.nan)
    for i in range(len(part)):
        mask = np.asarray(part.labels[i])
        true, said = (
            one_hot(torch.from_numpy(np.array(m))[None], classes) for m in (mask, tally.answer(i, mask.shape))
        )
        both = (true.flatten(2).any(dim=2) & said.flatten(2).any(dim=2))[0, 1:].nonzero()[:, 0]
        if len(both):
            pick = both + 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of MONAI, about its own call
                far = monai.compute_hausdorff_distance(
                    said[:, pick], true[:, pick], True, percentile=95, spacing=part.spacing[i] if part.spacing else None
                )
            found[i, both.numpy()] = far[0].numpy()
    return found


def _figures(each: np.ndarray, classes: Sequence[str], part: Split) -> dict[str, Any]:
    """The content of ``metrics.json``; each (3, images, classes)."""
    of, units = "images", each
    if len(part.patients):
        patients = np.array(part.patients)
        whose = [patients == who for who in sorted(set(part.patients))]
        units = np.array([[defined_mean(f[own]) for own in whose] for f in each])
        of = "patients"
    count = units.shape[1]
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)
    there = np.isfinite(units)
    values = np.where(there, units, 0.0)
    with np.errstate(invalid="ignore"):
        drawn = np.einsum("rn,fnc->frc", weights, values) / np.einsum("rn,fnc->frc", weights, there.astype(np.float64))
    means = np.array([defined_mean(f) for f in units])
    overall, rows = {}, {}
    for k, name in enumerate(KEYS):
        overall[name] = figure_of(float(defined_mean(means[k])), defined_mean(drawn[k].T))
    for c, name in enumerate(classes):
        own = {key: figure_of(means[k, c], drawn[k, :, c]) for k, key in enumerate(KEYS)}
        rows[name] = {"images": int(np.isfinite(each[0, :, c]).sum()), **own}
    held, found = _held(part, len(classes) + 1), (each[0] > 0).any(axis=0)
    findings = [
        f"{name} was never found where it is" if there else f"{name} is in no mask of these images"
        for name, there, seen in zip(classes, held, found, strict=True)
        if not seen
    ]
    return {
        **{"images": len(part), "kind": "segmentation", "resamples": RESAMPLES, "resampled": of},
        "hausdorff_unit": "mm" if part.spacing else "pixels",
        **{"findings": findings, "overall": overall, "classes": rows},
    }


def _held(part: Split, classes: int) -> np.ndarray:
    """Whether any mask holds each class but the background."""
    counts = np.zeros(classes, dtype=np.int64)
    for i in range(len(part)):
        counts += np.bincount(np.asarray(part.labels[i]).reshape(-1), minlength=classes)
    return counts[1:] > 0


def _write_each(path: Path, part: Split, each: np.ndarray, classes: Sequence[str]) -> None:
    rows = []
    for i in range(len(part)):
        name = part.names[i] if len(part.names) else i
        patient = part.patients[i] if len(part.patients) else ""
        rows.append([name, patient, *("" if np.isnan(v) else f"{v:.6g}" for v in each[:, i].reshape(-1))])
    write_csv(path, ["image", "patient", *(f"{key} {name}" for key in KEYS for name in classes)], rows)


def overlays(part: Split, tally: MaskTally, dice: np.ndarray, classes: Sequence[str]) -> Any:
    """A figure with the best, the median and the worst image by Dice: the image, its mask, the answer."""
    from matplotlib.figure import Figure as Drawing
    from matplotlib.patches import Patch

    score = defined_mean(dice.T)
    order = [int(i) for i in np.argsort(-score, kind="stable") if np.isfinite(score[i])] or [0]
    shown = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    figure = Drawing(figsize=(7.2, 7.7), layout="constrained")
    axes = figure.subplots(3, 3)
    for row, (word, i) in zip(axes, shown.items(), strict=True):
        image, mask = np.asarray(part.images[i]), np.asarray(part.labels[i])
        said = tally.answer(i, mask.shape)
        name = Path(part.names[i]).name if len(part.names) else f"image {i}"
        titles = (f"{word}: {name[-24:]}".replace("$", r"\$"), "mask", f"answer, Dice {score[i]:.3f}")
        for place, title, drawn in zip(row, titles, (None, mask, said), strict=True):
            place.set_axis_off()
            place.set_title(title, fontsize=8)
            place.imshow(painted(image, drawn), interpolation="nearest")
    names = [name.replace("$", r"\$") for name in classes[1 : len(COLOURS) + 1]]
    keys = [Patch(color=f"#{bytes(colour).hex()}", label=name) for name, colour in zip(names, COLOURS, strict=False)]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(3, len(keys)), fontsize=8, frameon=False)
    return figure


def painted(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """(h, w, 3) uint8: a grey or colour image, its classes in colours over it."""
    base = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
    if mask is None:
        return base
    colours = np.array([COLOURS[i % len(COLOURS)] for i in range(255)], dtype=np.float64)
    mixed = np.where((mask > 0)[..., None], 0.45 * base + 0.55 * colours[mask.astype(np.int64) - 1], base)
    return mixed.round().astype(np.uint8)
