"""MedMNIST's sets (Yang et al., Scientific Data 2023), from their own ``.npz`` files: local ones, or downloaded once.

A file holds ``{train,val,test}_{images,labels}``. A member of an ``.npz`` cannot be memory-mapped, but is itself an
``.npy`` file, so each is copied once into the cache as it stands, in pieces, and mapped from there: the largest set has
12 GB. A file is not unpacked unasked if it would become much larger than itself.
"""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.data.cache import cache_root
from lowrank.data.images.set import SOURCES, ImageSet, ImageSource, Kind, Options, Split, stored
from lowrank.data.split_names import SPLITS
from lowrank.infra.checks import check_choice
from lowrank.infra.convert import nearest

SIZES, SIZES_3D = (28, 64, 128, 224), (28, 64)
KIND_OF_TASK: dict[str, Kind] = {
    "binary-class": "binary",
    "multi-class": "multi-class",
    "multi-label, binary-class": "multi-label",
    "ordinal-regression": "ordinal",
}
NAMES = (
    *("pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist"),
    *("breastmnist", "bloodmnist", "tissuemnist", "organamnist", "organcmnist", "organsmnist"),
    *("organmnist3d", "nodulemnist3d", "adrenalmnist3d", "fracturemnist3d", "vesselmnist3d", "synapsemnist3d"),
)
PACKED, LARGE = 100, 1 << 26  # a file that unpacks to so many times its size, and to more than so many bytes, is not
KEYS = tuple(f"{split}_{what}" for split in SPLITS for what in ("images", "labels"))


def facts(name: str, size: int) -> dict[str, Any]:
    """What is known of an official set without its file, as ``ImageData.to_json`` says it."""
    kind, classes = _task(name)
    reading = {"size": size, "grey": _info(name)["n_channels"] == 1, "depth": size if _volumes(name) else None}
    return {"kind": kind, "classes": classes, "reading": reading, "spec": {"size": size}}


def download(name: str, size: int) -> Path:
    """The file of an official set; where it is not there yet it is downloaded and checked against MedMNIST's MD5.

    Raises:
        ValueError: no such set or size.
        OSError: it could not be downloaded.
    """
    if name not in NAMES:
        raise ValueError(f"there is no MedMNIST set {name!r}{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
    if size not in (sizes := SIZES_3D if _volumes(name) else SIZES):
        raise ValueError(f"data.size={size}: {name} exists at {', '.join(map(str, sizes))} pixels")
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


def read_npz(path: Path, options: Options) -> ImageSet:
    """The set in a local ``.npz`` of MedMNIST's layout; ``pathmnist_64.npz`` is recognised by its name.

    The classes of a set that is none of MedMNIST's are the numbers that occur as labels in its training split.

    Raises:
        ValueError: other keys, shapes or labels than the layout has; no such set.
    """
    name = options.dataset or _recognised(path)
    if name is not None:
        check_choice("data.dataset", name, NAMES)
    arrays, digest = _arrays(path, options.unpack_large)
    labels = {split: _labels(arrays[f"{split}_labels"], path, split) for split in SPLITS}
    if not len(labels["train"]):
        raise ValueError(f"{path} has no image to train on: train_images or train_labels is empty")
    notes: tuple[str, ...] = ()
    if name is not None:
        kind, classes = _task(name)
        if options.kind not in (None, kind):
            raise ValueError(f"data.kind={options.kind}: the task of {name} is {kind}; leave it out")
        notes = _notes(name, {split: len(labels[split]) for split in SPLITS})
    else:
        kind, numbers = _inferred(labels["train"], options.kind, path)
        classes = tuple(map(str, numbers))
        if kind != "multi-label":
            labels = {split: _numbered(each, numbers, path, split) for split, each in labels.items()}
        if numbers != list(range(len(numbers))):
            shown = ", ".join(f"{number} → {i}" for i, number in enumerate(numbers[:20]))
            notes = (f"labels of {path} are counted from 0: {shown}{' …' if len(numbers) > 20 else ''}",)
    splits = {}
    for split in SPLITS:
        pixels = arrays[f"{split}_images"]
        grey = pixels[..., 0] if pixels.shape[3:] == (1,) else pixels
        splits[split] = Split(images=grey, labels=_shaped(labels[split], kind))
    shape = splits["train"].images.shape
    found = ImageSet(
        name=name or path.stem,
        kind=kind,
        classes=classes,
        splits=splits,
        notes=notes,
        pixels=digest,
        volumes=_volumes(name) if name else shape[3:] > (4,),  # a last axis of up to four would be channels
    )
    if options.size not in (None, found.size):
        raise ValueError(
            f"data.size={options.size}, and {path} holds images of {found.size} pixels: give another file, or "
            "--data.size none (the model resizes what it gets)"
        )
    return found


SOURCES += [
    ImageSource(
        what="a file with splits",
        matches=lambda source: source.endswith(".npz") and Path(source).expanduser().is_file(),
        read=lambda source, options: read_npz(Path(source).expanduser(), options),
        takes=("dataset", "size", "kind", "unpack_large"),
    ),
    ImageSource(
        what="a MedMNIST set",
        matches=lambda source: source in NAMES,
        read=lambda source, options: read_npz(
            download(source, 28 if options.size is None else options.size), replace(options, dataset=source)
        ),
        takes=("size",),
        names=NAMES,
    ),
]


def _volumes(name: str) -> bool:
    return name.endswith("3d")


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


def _task(name: str) -> tuple[Kind, tuple[str, ...]]:
    """The kind and the classes of an official set."""
    info = _info(name)
    return KIND_OF_TASK[info["task"]], tuple(info["label"][str(i)] for i in range(len(info["label"])))


def _arrays(path: Path, unpack_large: bool) -> tuple[dict[str, np.ndarray], str]:
    """The members of the file, each mapped from its copy in the cache, and a digest of them all."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {each.filename.removesuffix(".npy"): each.file_size for each in archive.infolist()}
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is no .npz file, or a damaged one ({error})") from error
    missing = [key for key in KEYS if key not in sizes]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)} of MedMNIST's layout; it has {', '.join(sorted(sizes)) or 'nothing'}"
        )
    status, unpacked = path.stat(), sum(sizes[key] for key in KEYS)
    if unpacked > max(LARGE, PACKED * status.st_size) and not unpack_large:
        raise ValueError(
            f"{path} has {status.st_size:,} bytes and unpacks to {unpacked:,}: if that is meant, and there is room in "
            f"{cache_root()}, add --data.unpack_large true"
        )
    key = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    folder = stored(path.stem, key, lambda empty: _unpack(path, empty))
    arrays = {key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in KEYS}
    return arrays, (folder / "digest").read_text()


def _unpack(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for key in KEYS:
            try:
                with archive.open(f"{key}.npy") as member, open(folder / f"{key}.npy", "wb") as copy:
                    shutil.copyfileobj(member, copy, 1 << 22)
                np.load(folder / f"{key}.npy", mmap_mode="r")
            except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
                raise ValueError(f"{path}: {key} is damaged ({error})") from error


def _labels(array: np.ndarray, path: Path, split: str) -> np.ndarray:
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{path}: {split}_labels is {array.shape} of {array.dtype}; whole numbers (n, labels) are wanted"
        )
    return np.asarray(array).reshape(len(array), array.shape[1] if array.ndim == 2 else 1)


def _inferred(labels: np.ndarray, kind: Kind | None, path: Path) -> tuple[Kind, list[int]]:
    """The kind and the numbers that stand for classes, from the training labels (n, labels) of a stranger."""
    width = labels.shape[1]
    if width > 1 and kind not in (None, "multi-label"):
        raise ValueError(f"data.kind={kind}: {path} has {width} labels to an image, so that the task is multi-label")
    if width > 1 or kind == "multi-label":
        return "multi-label", list(range(width))
    numbers = np.unique(labels).tolist()
    return kind or ("binary" if len(numbers) == 2 else "multi-class"), numbers


def _numbered(labels: np.ndarray, numbers: list[int], path: Path, split: str) -> np.ndarray:
    """Labels as places among ``numbers``, (n, 1)."""
    strange = np.setdiff1d(labels, numbers)
    if len(strange):
        raise ValueError(
            f"{path} has labels {', '.join(map(str, strange[:5]))} in {split} that its training split lacks; that has "
            f"{', '.join(map(str, numbers[:20]))}"
        )
    return np.searchsorted(np.array(numbers, dtype=labels.dtype), labels)


def _shaped(labels: np.ndarray, kind: Kind) -> np.ndarray:
    """Labels as the set wants them: (n, classes) of zeros and ones for several labels, otherwise (n,).

    Labels that cannot be brought to (n,) are returned as they are; the set refuses them.
    """
    if kind == "multi-label":
        return labels if labels.dtype == np.uint8 else labels.astype(np.int64)
    return labels[:, 0].astype(np.int64) if labels.shape[1] == 1 else labels


def _notes(name: str, counts: dict[str, int]) -> tuple[str, ...]:
    official = _info(name)["n_samples"]
    other = [
        f"{split} {counts[split]:,} (official {official[split]:,})"
        for split in SPLITS
        if counts[split] != official[split]
    ]
    return (f"{name} is not the official release: {', '.join(other)}",) if other else ()
