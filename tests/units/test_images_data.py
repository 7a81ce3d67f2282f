"""Images as data: MedMNIST's layout at every size, people's folders, damaged files, what is read of a picture."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.images import COUNTS, class_folders, medmnist_file, write_picture

from lowrank.data.images.decode import Reading, read_image, windowed
from lowrank.data.images.medmnist import NAMES, SIZES
from lowrank.data.images.source import images

# --- MedMNIST's layout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("colour", [False, True])
def test_a_file_is_read_at_every_size_and_memory_mapped(tmp_path: Path, size: int, colour: bool) -> None:
    name = "pneumoniamnist" if size == 28 else f"pneumoniamnist_{size}"
    data = images(str(medmnist_file(tmp_path / f"{name}.npz", size=size, colour=colour)))
    assert (data.kind, data.classes, data.reading.size) == ("binary", ("normal", "pneumonia"), size)
    assert {k: len(v) for k, v in data.set.splits.items()} == COUNTS
    assert isinstance(data.set.splits["train"].images, np.memmap)
    batch = data.train(5, seed=0).batch(0)
    assert batch["images"].shape == (5, 3, size, size)
    assert batch["images"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("name", NAMES)
def test_every_set_is_recognised_by_its_name(tmp_path: Path, name: str) -> None:
    from medmnist import INFO

    task, count = INFO[name]["task"], len(INFO[name]["label"])
    several = count if "label, binary" in task else 0
    data = images(
        str(medmnist_file(tmp_path / f"{name}.npz", classes=count, several=several, slices=12 * name.endswith("3d")))
    )
    expected = {"binary-class": "binary", "multi-class": "multi-class", "ordinal-regression": "ordinal"}
    assert data.kind == expected.get(task, "multi-label")
    assert len(data.classes) == count
    batch = data.train(4, seed=0).batch(0)
    assert batch["labels"].shape == ((4, count) if several else (4,))


def test_the_set_can_be_told_and_a_stranger_is_inferred(tmp_path: Path) -> None:
    file = medmnist_file(tmp_path / "mine.npz", classes=2)
    assert images(str(file), dataset="breastmnist").classes == ("malignant", "normal, benign")
    assert images(str(file)).kind == "binary"
    assert images(str(medmnist_file(tmp_path / "grades.npz", classes=4)), kind="ordinal").kind == "ordinal"
    assert images(str(medmnist_file(tmp_path / "labels.npz", several=3))).kind == "multi-label"


def test_a_conversion_is_done_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    file = medmnist_file(tmp_path / "mine.npz", compressed=False)
    before = images(str(file)).set.splits["train"].images.filename
    assert images(str(file)).set.splits["train"].images.filename == before
    medmnist_file(file, size=30)
    assert images(str(file)).set.splits["train"].images.shape[1] == 30


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank.data.images import medmnist

    file, whole = medmnist_file(tmp_path / "mine.npz"), shutil.copyfileobj
    calls = []

    def dies(source: object, target: object, length: int) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        whole(source, target, length)  # type: ignore[arg-type]

    monkeypatch.setattr(medmnist.shutil, "copyfileobj", dies)
    with pytest.raises(KeyboardInterrupt):
        images(str(file))
    monkeypatch.setattr(medmnist.shutil, "copyfileobj", whole)
    assert len(images(str(file)).split("test")) == COUNTS["test"]


def test_digits_are_split_alike_every_time() -> None:
    data = images("digits")
    assert sum(len(split) for split in data.set.splits.values()) == 1797
    assert data.set.splits["train"].images.max() == 255
    assert all(np.bincount(split.labels, minlength=10).min() > 20 for split in data.set.splits.values())


# What to call a file, what it holds besides or instead of a small set (None: it is no file), options, the message.
WRONG_FILES = [
    ("x", {"val_images": None, "train_labels": None}, {}, r"lacks train_labels, val_images.* it has test_images"),
    ("x", b"not a zip", {}, r"no \.npz file, or a damaged one"),
    ("breastmnist", {"test_labels": np.array([2] * 12)}, {}, r"from 2 to 2.*takes whole numbers from 0 to 1"),
    ("x", {}, {"dataset": "lungmnist"}, "it is one of .*pathmnist"),
    ("x", {}, {"size": 64}, r"data\.size=64, and .* holds images of 28 pixels"),
    ("breastmnist", {}, {"kind": "ordinal"}, "the task of breastmnist is binary"),
    ("x", {"train_labels": np.ones((24, 3), int)}, {"kind": "multi-class"}, "3 labels to an image"),
    ("x", {"val_labels": np.array([7] * 12)}, {}, "has labels 7 in val that its training split lacks; that has 0, 1"),
    ("x", {"train_labels": np.ones(24)}, {}, "of float64; whole numbers"),
    ("x", {"train_labels": np.arange(3) % 2}, {}, "24 images and 3 labels"),
    ("x", {"train_images": np.zeros((24, 28, 28, 4), np.uint8)}, {}, "is wanted"),
    ("x", {"val_images": np.zeros((12, 0, 0), np.uint8)}, {}, "is wanted"),
    ("x", {"train_labels": np.zeros((0, 1), int)}, {}, "no image to train on: train_images or train_labels"),
    ("x", {}, {"window": "full"}, r"data\.window has no effect on .*x\.npz, a file with splits"),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), WRONG_FILES)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, name: str, content: dict[str, np.ndarray] | bytes, options: dict[str, object], message: str
) -> None:
    file = medmnist_file(tmp_path / f"{name}.npz")
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        arrays = dict(np.load(file)) | content
        np.savez(file, **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=message):
        images(str(file), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("none.npz", {}, "no file or folder"),
        ("pathmnits", {}, "did you mean 'pathmnist'"),
        ("pathmnist", {"size": 96}, "exists at 28, 64, 128, 224"),
        ("digits", {"augment": ("hflp",)}, "did you mean 'hflip'"),
        ("digits", {"balance": "more"}, "it is one of none, weights, sampler"),
        ("digits", {"labels": "x.csv"}, r"data\.labels has no effect on digits, a built-in set"),
    ],
)
def test_a_source_or_option_that_is_unknown_is_named(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        images(source, **options)


@pytest.mark.parametrize(
    ("numbers", "classes"), [((1, 2, 3), ("1", "2", "3")), ((0, 5, 900), ("0", "5", "900")), ((0, 1 << 40), None)]
)
def test_labels_that_do_not_count_from_0_make_no_phantom_classes(
    tmp_path: Path, numbers: tuple[int, ...], classes: tuple[str, ...] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    content = dict(np.load(medmnist_file(tmp_path / "x.npz", classes=len(numbers))))
    for split in COUNTS:
        content[f"{split}_labels"] = np.array(numbers)[content[f"{split}_labels"]]
    np.savez(tmp_path / "x.npz", **content)
    data = images(str(tmp_path / "x.npz"))
    assert data.classes == (classes or tuple(map(str, numbers)))
    assert np.unique(data.split("train").labels).tolist() == list(range(len(numbers)))
    assert f"{numbers[-1]} → {len(numbers) - 1}" in capsys.readouterr().err


def test_a_file_that_unpacks_to_much_more_is_not_unpacked_unasked(tmp_path: Path) -> None:
    content = dict(np.load(medmnist_file(tmp_path / "x.npz")))
    content["train_images"] = np.zeros((24, 1700, 1700), np.uint8)
    np.savez_compressed(tmp_path / "x.npz", **content)
    with pytest.raises(ValueError, match=r"unpacks to 69,.*--data\.unpack_large true"):
        images(str(tmp_path / "x.npz"))
    assert len(images(str(tmp_path / "x.npz"), unpack_large=True).split("train")) == 24


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first, other = class_folders(tmp_path / "x", per_class=4), tmp_path / "elsewhere" / "x"
    before = images(str(first), size=16).fingerprint
    shutil.copytree(first, other)
    assert images(str(other), size=16).fingerprint == before
    write_picture(other / "ill" / "patient00_0.png", np.zeros((20, 20), np.uint8))
    assert images(str(other), size=16).fingerprint != before
    assert images("digits").fingerprint != images(str(medmnist_file(tmp_path / "x.npz"))).fingerprint


def test_a_download_that_fails_names_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets.utils as utils

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(utils, "download_url", fails)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(OSError, match=r"pathmnist_64\.npz.*--data FILE\.npz"):
        images("pathmnist", size=64)


def test_a_file_that_was_downloaded_before_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".medmnist").mkdir()
    medmnist_file(tmp_path / ".medmnist" / "breastmnist_64.npz", size=64)
    assert images("breastmnist", size=64).reading.size == 64


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_a_class_with_patients_kept_whole(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "x")
    data = images(str(root), size=24, patient_pattern=r"(patient\d+)_")
    assert (data.kind, data.classes) == ("binary", ("ill", "well"))
    owners = {name: set(split.patients) for name, split in data.set.splits.items()}
    assert not owners["train"] & owners["val"]
    assert not owners["train"] & owners["test"]
    assert not owners["val"] & owners["test"]
    assert all(np.bincount(split.labels, minlength=2).min() > 0 for split in data.set.splits.values())
    split = data.split("train")
    assert split.images[[0, 2]].shape == (2, 24, 24)
    assert split.names[0].endswith(".png")


def test_folders_of_splits_stay_as_they_are(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        class_folders(tmp_path / "x" / split, per_class=4)
    data = images(str(tmp_path / "x"), size=16)
    assert {name: len(split) for name, split in data.set.splits.items()} == {"train": 8, "val": 8, "test": 8}
    with pytest.raises(ValueError, match="its own test split"):
        images(str(tmp_path / "x"), size=16, test_fraction=0.2)


def test_a_table_gives_labels_patients_and_splits(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "x", per_class=4)
    rows = ["path,labels,patient,split"]
    for i in range(4):
        rows.append(f"ill/patient0{i // 2}_{i % 2}.png,mass|effusion,p{i // 2},{'train' if i < 2 else 'test'}")
        rows.append(f"well/patient1{i // 2}_{i % 2}.png,,q{i // 2},{'train' if i < 2 else 'valid'}")
    (root / "labels.csv").write_text("\n".join(rows))
    data = images(str(root), size=16, labels="labels.csv")
    assert (data.kind, data.classes) == ("multi-label", ("effusion", "mass"))
    assert {name: len(split) for name, split in data.set.splits.items()} == {"train": 4, "val": 2, "test": 2}
    assert data.set.splits["val"].labels.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("path,label\nill/none.png,a", "1 of 1 files in .* are not in"),
        ("file,label\nx,a", "needs the columns path and label"),
        ("path,label,labels\nill/patient00_0.png,a,b", "one of them"),
        ("path,label,label\nill/patient00_0.png,a,b", "several columns label"),
        ("path,label\n", "path, label and 0 rows"),
        ("path,label\nill/patient00_0.png,", "line 2: ill/patient00_0.png has no label"),
        ("path,label,split\nill/patient00_0.png,a,holdout", "line 2: .* in the split 'holdout'"),
        ("path,label\nill/patient00_0.png,a\nill/patient00_0.png,b", "names 1 files more than once"),
        ("path,label\nill/patient00_0.png,a\nill/patient00_1.png,a", "only the class a"),
        ("path,label\nill/patient00_0.png,a\nill/patient00_1.png", "line 3 has 1 cells, and the header 2"),
        ("path;label\nill/patient00_0.png;a;b", "line 2 has 3 cells"),
        ('path,label\nill/patient00_0.png,"a\nill/patient00_1.png,b', "after line .*unexpected end of data"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, table: str, message: str) -> None:
    root = class_folders(tmp_path / "x", per_class=2)
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        images(str(root), size=16, labels=str(tmp_path / "t.csv"))


def test_stray_folders_and_files_are_no_classes_and_hide_no_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "x"
    for split in ("train", "Testing"):
        class_folders(root / split, per_class=4)
        shutil.copytree(root / split / "ill", root / split / "ill" / "__MACOSX")
        (root / split / "empty").mkdir()
    class_folders(root / "__MACOSX")
    class_folders(root / ".hidden")
    os.mkfifo(root / "train" / "ill" / "pipe.png")
    write_picture(root / "train" / "loose.png", np.zeros((4, 4), np.uint8))
    data = images(str(root), size=16, val_fraction=0.0)
    assert data.classes == ("ill", "well")
    assert {name: len(split) for name, split in data.set.splits.items()} == {"train": 8, "val": 0, "test": 8}
    told = capsys.readouterr().err
    assert "passed over: .hidden, __MACOSX" in told
    assert "1 images of" in told
    assert "train/loose.png" in told
    class_folders(root / "extra")
    with pytest.raises(ValueError, match=r"the splits Testing, train and beside them extra"):
        images(str(root), size=16)


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    assert images(str(class_folders(tmp_path / "x", classes=("pass", "test")))).classes == ("pass", "test")
    for split in ("val", "validation", "train"):
        class_folders(tmp_path / "y" / split, per_class=2)
    with pytest.raises(ValueError, match="at most one val"):
        images(str(tmp_path / "y"))


def test_damaged_files_are_named_and_counted_and_skipped_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = class_folders(tmp_path / "x", per_class=6)
    whole = (root / "ill" / "patient00_0.png").read_bytes()
    (root / "ill" / "patient00_0.png").write_bytes(whole[: len(whole) // 2])
    (root / "well" / "zero.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 13 images in .* ill/patient00_0\.png .* well/zero\.png .*skip_damaged"):
        images(str(root), size=16)
    data = images(str(root), size=16, skip_damaged=True)
    assert sum(len(split) for split in data.set.splits.values()) == 11
    assert "2 damaged images" in data.set.notes[0]
    assert "left out" in capsys.readouterr().err


def test_a_folder_without_classes_says_what_it_needs(tmp_path: Path) -> None:
    write_picture(tmp_path / "x" / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"holds 1 images directly.*--labels labels\.csv"):
        images(str(tmp_path / "x"))
    with pytest.raises(ValueError, match="finds no patient"):
        images(str(class_folders(tmp_path / "y", per_class=2)), size=16, patient_pattern=r"case(\d+)")
    with pytest.raises(FileNotFoundError, match="no table of labels"):
        images(str(tmp_path / "y"), labels="none.csv")
    wrong: dict[str, dict[str, Any]] = {
        "no regular expression": {"patient_pattern": "("},
        "at least 1": {"size": 0},
        "at most 16384": {"size": 10**7},
        "both finite": {"window": "0,inf"},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            images(str(tmp_path / "y"), **options)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_windowed_and_not_clipped_to_white(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(1000, 3000, 64 * 64).reshape(64, 64).astype(np.uint16)
    file = write_picture(tmp_path / f"x.{suffix}", ramp)
    read = read_image(file, Reading(size=64, grey=True))
    assert read.min() <= 2
    assert read.max() >= 253
    assert abs(float(read.mean()) - 127.5) < 2
    given = read_image(file, Reading(size=64, grey=True, window="0,4000"))
    np.testing.assert_allclose(given, np.rint(ramp / 4000 * 255), atol=1)
    full = read_image(file, Reading(size=64, grey=True, window="full"))
    assert full.max() == round(3000 / 65535 * 255)


def test_floating_point_pictures_and_flat_ones_are_windowed_too() -> None:
    assert windowed(np.array([[-1.0, np.nan], [1.0, np.inf]]), "full").tolist() == [[0, 0], [255, 255]]
    assert windowed(np.full((4, 4), 7.0), "auto").max() == 0
    with pytest.raises(ValueError, match="first number must be below"):
        windowed(np.zeros((2, 2)), "5,5")
    with pytest.raises(ValueError, match="neither auto, full"):
        windowed(np.zeros((2, 2)), "wide")


@pytest.mark.parametrize(("fit", "corner"), [("pad", 0), ("crop", 200), ("stretch", 200)])
def test_images_that_are_not_square(tmp_path: Path, fit: str, corner: int) -> None:
    file = write_picture(tmp_path / "x.png", np.full((10, 40), 200, np.uint8))
    read = read_image(file, Reading(size=20, fit=fit))  # type: ignore[arg-type]
    assert read.shape == (20, 20, 3)
    assert read[0, 0, 0] == corner
