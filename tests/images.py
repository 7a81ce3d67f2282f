"""Small sets of images that tests write: MedMNIST's layout, folders of files, sixteen bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

COUNTS = {"train": 24, "val": 12, "test": 12}


def pictures(labels: np.ndarray, size: int, colour: bool = False, seed: int = 0, slices: int = 0) -> np.ndarray:
    """uint8 images, or volumes of ``slices``, whose brightness follows the label, so that something can be learnt."""
    noise = np.random.default_rng(seed)
    level = 40 + 150 * (labels.reshape(len(labels), -1)[:, 0] / max(1, labels.max()))
    shape = (len(labels), *([slices] if slices else []), size, size, *([3] if colour else []))
    base = level.reshape(-1, *([1] * (len(shape) - 1)))
    return (base + noise.normal(0, 15, size=shape)).clip(0, 255).astype(np.uint8)


def medmnist_file(
    path: Path,
    classes: int = 2,
    size: int = 28,
    *,
    several: int = 0,
    colour: bool = False,
    compressed: bool = True,
    slices: int = 0,
) -> Path:
    """A file in MedMNIST's layout; ``several`` labels an image instead of one of ``classes``."""
    content = {}
    for number, (split, count) in enumerate(COUNTS.items()):
        noise = np.random.default_rng(number)
        if several:
            labels = noise.integers(0, 2, size=(count, several)).astype(np.uint8)
        else:
            labels = (np.arange(count) % classes).astype(np.uint8)[:, None]
        content[f"{split}_images"] = pictures(labels, size, colour, number, slices)
        content[f"{split}_labels"] = labels
    (np.savez_compressed if compressed else np.savez)(path, **content)
    return path


def write_picture(path: Path, array: np.ndarray) -> Path:
    """A PNG or TIFF file of an array, of eight or sixteen bits."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def class_folders(root: Path, per_class: int = 20, size: int = 20, classes: tuple[str, ...] = ("ill", "well")) -> Path:
    """A folder a class; files are called patientN_view.png, two views a patient."""
    for number, name in enumerate(classes):
        for i in range(per_class):
            array = pictures(np.array([number * 1.0, len(classes) - 1.0]), size, seed=i)[0]
            write_picture(root / name / f"patient{number}{i // 2}_{i % 2}.png", array)
    return root
