"""MedMNIST's sets (Yang et al., Scientific Data 2023), from their own ``.npz`` files: local ones, or downloaded once.

A file holds ``{train,val,test}_{images,labels}``. A member of an ``.npz`` cannot be memory-mapped, but is itself an
``.npy`` file, so each is copied once into the cache as it stands, in pieces, and mapped from there: the largest set has
12 GB.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.data.cache import cache_root, locked, published, remove_leftovers
from lowrank.data.images.set import SPLITS, ImageSet, Kind, Split
from lowrank.infra.convert import nearest

SIZES = (28, 64, 128, 224)
KIND_OF_TASK: dict[str, Kind] = {
    "binary-class": "binary",
    "multi-class": "multi-class",
    "multi-label, binary-class": "multi-label",
    "ordinal-regression": "ordinal",
}
NAMES = (
    *("pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist"),
    *("breastmnist", "bloodmnist", "tissuemnist", "organamnist", "organcmnist", "organsmnist"),
)
KEYS = tuple(f"{split}_{what}" for split in SPLITS for what in ("images", "labels"))


def facts(name: str, size: int) -> dict[str, Any]:
    """What is known of an official set without its file, as ``ImageData.to_json`` says it."""
    info = _info(name)
    classes = [info["label"][str(i)] for i in range(len(info["label"]))]
    reading = {"size": size, "grey": info["n_channels"] == 1}
    return {"kind": KIND_OF_TASK[info["task"]], "classes": classes, "reading": reading, "spec": {"size": size}}


def download(name: str, size: int) -> Path:
    """The file of an official set; where it is not there yet it is downloaded and checked against MedMNIST's MD5.

    Raises:
        ValueError: no such set or size.
        OSError: it could not be downloaded.
    """
    if name not in NAMES:
        raise ValueError(f"there is no MedMNIST set {name!r}{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
    if size not in SIZES:
        raise ValueError(f"data.size={size}: {name} exists at {', '.join(map(str, SIZES))} pixels")
    suffix = "" if size == 28 else f"_{size}"
    for folder in (cache_root() / "medmnist", Path.home() / ".medmnist"):
        if (folder / f"{name}{suffix}.npz").is_file():
            return folder / f"{name}{suffix}.npz"
    from torchvision.datasets.utils import download_url

    root, info = cache_root() / "medmnist", _info(name)
    url = info[f"url{suffix}"]
    try:
        print(f"downloading {url}", file=sys.stderr, flush=True)
        download_url(url, str(root), filename=f"{name}{suffix}.npz", md5=info[f"MD5{suffix}"])
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"could not download {url} ({error}); get it by another way and give it with --data FILE.npz"
        ) from error
    return root / f"{name}{suffix}.npz"


def read_npz(path: Path, *, dataset: str | None = None, kind: Kind | None = None) -> ImageSet:
    """The set in a local ``.npz`` of MedMNIST's layout.

    Args:
        path: the file; ``pathmnist_64.npz`` is recognised by its name.
        dataset: which of MedMNIST's sets it is, where the name does not tell.
        kind: the task of a set that is none of MedMNIST's; by default it follows from the labels.

    Raises:
        ValueError: other keys, shapes or labels than the layout has; no such set.
    """
    name = dataset or _recognised(path)
    if dataset is not None and dataset not in NAMES:
        raise ValueError(
            f"data.dataset={dataset!r} is none of MedMNIST's{nearest(dataset, NAMES)}; it is one of {', '.join(NAMES)}"
        )
    arrays = _arrays(path)
    labels = {split: _labels(arrays[f"{split}_labels"], path, split) for split in SPLITS}
    if name is not None:
        info = _info(name)
        found = KIND_OF_TASK[info["task"]]
        if kind not in (None, found):
            raise ValueError(f"data.kind={kind}: the task of {name} is {found}; leave it out")
        classes = tuple(info["label"][str(i)] for i in range(len(info["label"])))
    else:
        found, classes = _inferred(labels, kind)
    notes = _notes(name, {split: len(labels[split]) for split in SPLITS})
    splits = {
        split: Split(images=_squeezed(arrays[f"{split}_images"]), labels=_shaped(labels[split], found))
        for split in SPLITS
    }
    return ImageSet(name=name or path.stem, kind=found, classes=classes, splits=splits, notes=notes)


def _recognised(path: Path) -> str | None:
    found = re.fullmatch(rf"({'|'.join(NAMES)})(_(28|64|128|224))?", path.stem)
    return found[1] if found else None


def _info(name: str) -> dict[str, Any]:
    """What MedMNIST says about a set: task, labels, addresses."""
    try:
        from medmnist import INFO
    except ImportError as error:
        raise ImportError(f"{name} is described by the package medmnist: pip install medmnist") from error
    info: dict[str, Any] = INFO[name]
    return info


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The members of the file, each mapped from its copy in the cache."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is no .npz file, or a damaged one ({error})") from error
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)} of MedMNIST's layout; it has {', '.join(sorted(found)) or 'nothing'}"
        )
    status = path.stat()
    mark = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    final = cache_root() / "images" / f"{path.stem}-{hashlib.blake2b(mark.encode(), digest_size=8).hexdigest()}"
    if not final.is_dir():
        with locked(final) as held:
            if not final.is_dir():
                if held:
                    remove_leftovers(final)
                _unpack(path, final)
    return {key: np.load(final / f"{key}.npy", mmap_mode="r") for key in KEYS}


def _unpack(path: Path, final: Path) -> None:
    with zipfile.ZipFile(path) as archive, published(final) as folder:
        for key in KEYS:
            try:
                with archive.open(f"{key}.npy") as member, open(folder / f"{key}.npy", "wb") as copy:
                    shutil.copyfileobj(member, copy, 1 << 22)
                np.load(folder / f"{key}.npy", mmap_mode="r")
            except (zipfile.BadZipFile, EOFError, ValueError) as error:
                raise ValueError(f"{path}: {key} is damaged ({error})") from error


def _labels(array: np.ndarray, path: Path, split: str) -> np.ndarray:
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{path}: {split}_labels is {array.shape} of {array.dtype}; whole numbers (n, labels) are wanted"
        )
    return np.asarray(array).reshape(len(array), -1)


def _shaped(labels: np.ndarray, kind: Kind) -> np.ndarray:
    """Labels as the set wants them: (n, classes) of zeros and ones for several labels, otherwise (n,).

    Labels that cannot be brought to (n,) are returned as they are; the set refuses them.
    """
    if kind == "multi-label":
        return labels if labels.dtype == np.uint8 else labels.astype(np.int64)
    return labels[:, 0].astype(np.int64) if labels.shape[1] == 1 else labels


def _inferred(labels: dict[str, np.ndarray], kind: Kind | None) -> tuple[Kind, tuple[str, ...]]:
    width = labels["train"].shape[1]
    if width > 1:
        return "multi-label", tuple(map(str, range(width)))
    count = int(labels["train"].max(initial=0)) + 1
    return kind or ("binary" if count == 2 else "multi-class"), tuple(map(str, range(count)))


def _squeezed(images: np.ndarray) -> np.ndarray:
    return images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images


def _notes(name: str | None, counts: dict[str, int]) -> tuple[str, ...]:
    if name is None:
        return ()
    official = _info(name)["n_samples"]
    other = [
        f"{split} {counts[split]:,} (official {official[split]:,})"
        for split in SPLITS
        if counts[split] != official[split]
    ]
    return (f"{name} is not the official release: {', '.join(other)}",) if other else ()
