"""Images as data: MedMNIST's layout at every size, people's folders, splits, damaged files, batches."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.images import COUNTS, class_folders, medmnist_file, pictures, write_picture

from lowrank.data.images import augment
from lowrank.data.images.batches import ImageBatches, evaluation_batches, label_weights, to_model
from lowrank.data.images.decode import PixelBudget, Reading, read_image, windowed
from lowrank.data.images.medmnist import NAMES, SIZES
from lowrank.data.images.set import ImageSpec, Split
from lowrank.data.images.source import ImageData, images
from lowrank.data.images.splits import folds_by_patient, split_by_patient

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


# --- splits and batches ----------------------------------------------------------------------------------------------


def test_splits_depend_on_names_alone_and_keep_the_shares() -> None:
    patients = [f"p{i // 3}" for i in range(600)]
    labels = np.array([(i // 3) % 2 for i in range(600)])
    places = split_by_patient(labels, patients, 0.2, 0.1)
    order = np.random.default_rng(0).permutation(600)
    again = split_by_patient(labels[order], [patients[i] for i in order], 0.2, 0.1)
    assert [places[i] for i in order] == again
    assert places.count("test") == 60
    assert places.count("val") == 120
    assert split_by_patient(np.array([0, 1, 1]), ["a", "b", "b"], 0.2, 0.2) == ["train", "train", "train"]
    with pytest.raises(ValueError, match="together below 1"):
        split_by_patient(labels, patients, 0.6, 0.5)


def test_batches_are_a_function_of_seed_and_number(tmp_path: Path) -> None:
    data = images(
        str(medmnist_file(tmp_path / "x.npz")), augment=("hflip", "vflip", "crop", "randaugment"), balance="sampler"
    )
    first, second = data.train(5, seed=3), data.train(5, seed=3)
    second.batch(0)
    torch.manual_seed(99)
    for key in ("images", "labels"):
        assert torch.equal(first.batch(7)[key], second.batch(7)[key])
    assert not torch.equal(first.batch(7)["images"], data.train(5, seed=4).batch(7)["images"])
    assert not torch.equal(first.batch(7)["images"], first.batch(8)["images"])


def test_what_each_operation_of_randaugment_does() -> None:
    """Lines through the centre move as geometry says, grey levels as their formulas; the other sign is the reverse."""
    column, row = (torch.zeros(1, 101, 101, dtype=torch.uint8) for _ in range(2))
    column[0, :, 50], row[0, 50] = 255, 255
    same, *of_places, brightness, contrast, sharpness, posterize, solarize, autocontrast, equalize = (
        augment._operations(101)
    )
    assert torch.equal(same(column, 1.0), column)
    moves = {  # of the column 15 above, at and 15 below the centre; of the row 15 left of, at and 15 right of it
        "shear x": ([1, 0, -1], [0, 0, 0]),  # 15 · 0.09
        "shear y": ([0, 0, 0], [1, 0, -1]),
        "right": ([14, 14, 14], [0, 0, 0]),  # 101 · 150/331 · 0.3
        "down": ([0, 0, 0], [14, 14, 14]),
        "turn": ([2, 0, -2], [-2, 0, 2]),  # 15 · tan 9°
    }
    for operation, (columns, rows) in zip(of_places, moves.values(), strict=True):
        for sign in (1, -1):
            lines = operation(column, sign)[0, 35:66:15], operation(row, sign)[0, :, 35:66:15].T
            assert [(line.argmax(1) - 50).tolist() for line in lines] == [
                [sign * m for m in ms] for ms in (columns, rows)
            ]
    levels, even = torch.tensor([[[50, 150]] * 2], dtype=torch.uint8), torch.full((1, 2, 2), 201, dtype=torch.uint8)
    for operation, expected in (
        (brightness, ([63, 190], [36, 109], [255, 255])),  # times 1 ± 0.27
        (contrast, ([36, 163], [63, 136], [200, 200])),  # distances from the mean, times 1 ± 0.27
        (posterize, ([50, 150], [50, 150], [200, 200])),  # 7 bits
        (solarize, ([50, 150], [50, 150], [54, 54])),  # above 178.5 inverted
        (autocontrast, ([0, 254], [0, 254], [201, 201])),
        (equalize, ([50, 150], [50, 150], [201, 201])),
    ):
        found = [operation(x, sign)[0, 0].tolist() for x, sign in ((levels, 1), (levels, -1), (even, 1))]
        assert found == list(expected)
    edge = levels.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
    steps = [sharpness(edge, sign)[0, 1].int().diff().abs().max() for sign in (-1, 1)]
    assert steps[0] < 100 < steps[1]


def test_randaugment_applies_two_operations_drawn_evenly_with_either_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, float]] = []

    def noted(number: int) -> Callable[[torch.Tensor, float], torch.Tensor]:
        return lambda image, sign: (drawn.append((number, sign)), image)[1]

    monkeypatch.setattr(augment, "_operations", lambda width: [noted(i) for i in range(3)])
    augment.augment(torch.zeros(300, 1, 2, 2, dtype=torch.uint8), ["randaugment"], torch.Generator().manual_seed(0))
    assert len(drawn) == 600
    counts = [drawn.count((number, sign)) for number in range(3) for sign in (1.0, -1.0)]
    assert sum(counts) == 600
    assert all(70 < count < 130 for count in counts)


def test_flips_and_crops_are_what_they_say() -> None:
    """Of a picture whose levels are its rows and columns, the corners tell which window is seen."""
    ramp = torch.stack([torch.arange(64)[:, None].expand(64, 64), torch.arange(64).expand(64, 64)]).to(torch.uint8)
    noise, many = torch.Generator().manual_seed(0), ramp.expand(400, 2, 64, 64)
    for name, mirrored in (("hflip", ramp.flip(2)), ("vflip", ramp.flip(1))):
        seen = augment.augment(many, [name], noise)
        flipped = [torch.equal(image, mirrored) for image in seen]
        assert [torch.equal(image, ramp) for image in seen] == [not each for each in flipped]
        assert 160 < sum(flipped) < 240
    seen = augment.augment(many, ["crop"], noise).int()
    first, last = seen[:, [0, 1], 0, 0], seen[:, [0, 1], -1, -1]  # (crops, row and column)
    high, wide = (last - first + 1).T
    area, ratio = high * wide / 64**2, wide / high
    assert 0.48 < area.min() < 0.55
    assert 0.93 < area.max() <= 1.0
    assert 0.72 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.38
    assert first.min(0).values.tolist() == [0, 0]
    assert last.max(0).values.tolist() == [63, 63]
    assert area.mean() == pytest.approx(0.75, abs=0.03)


def test_an_epoch_shows_every_image_once_and_no_batch_is_short() -> None:
    split = Split(
        images=np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8), labels=np.arange(10) % 2
    )
    batches = ImageBatches(split=split, spec=ImageSpec(size=2), batch_size=4, seed=0)
    shown = torch.cat([batches.batch(n)["images"][:, 0, 0, 0] for n in range(5)])
    values = ((shown * 0.5 + 0.5) * 255).round().int().tolist()
    assert sorted(values[:10]) == sorted(values[10:]) == list(range(10))
    assert values[:10] != values[10:]
    assert batches.batches_per_epoch == 3


def test_the_sampler_draws_rare_classes_as_often() -> None:
    labels = np.array([0] * 95 + [1] * 5)
    split = Split(images=np.zeros((100, 2, 2), np.uint8), labels=labels)
    batches = ImageBatches(split=split, spec=ImageSpec(size=2), batch_size=400, seed=0, sampler=True)
    assert 150 < int(batches.batch(0)["labels"].sum()) < 250
    several = Split(images=split.images, labels=np.stack([labels, 1 - labels], axis=1).astype(np.uint8))
    drawn = ImageBatches(split=several, spec=ImageSpec(size=2), batch_size=400, seed=0, sampler=True).batch(0)
    assert 150 < int(drawn["labels"][:, 0].sum()) < 250


def test_weights_make_classes_weigh_the_same() -> None:
    labels = np.array([0] * 9 + [1])
    weights = label_weights(Split(images=np.zeros((10, 1, 1), np.uint8), labels=labels))
    assert weights[labels == 0].sum() == pytest.approx(weights[labels == 1].sum())
    assert weights.mean() == pytest.approx(1.0)
    several = np.stack([labels, np.ones(10)], axis=1).astype(np.uint8)
    weights = label_weights(Split(images=np.zeros((10, 1, 1), np.uint8), labels=several))
    assert weights[labels == 0, 0].sum() == pytest.approx(weights[labels == 1, 0].sum())
    assert weights[:, 1].tolist() == [1.0] * 10


def test_the_models_own_size_and_normalisation() -> None:
    array = pictures(np.array([0.0, 1.0]), 16, colour=True)
    spec = ImageSpec(size=24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), interpolation="bicubic")
    x = to_model(array, spec)
    assert x.shape == (2, 3, 24, 24)
    raw = to_model(array, ImageSpec(size=16, mean=(0, 0, 0), std=(1, 1, 1)))
    np.testing.assert_allclose(raw.permute(0, 2, 3, 1).numpy() * 255, array, atol=1e-3)
    back = x * torch.tensor(spec.std).view(3, 1, 1) + torch.tensor(spec.mean).view(3, 1, 1)
    assert float((back.mean((0, 2, 3)) - raw.mean((0, 2, 3))).abs().max()) < 0.01
    grey = to_model(array[..., 0], ImageSpec(size=16))
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_a_model_says_what_images_it_wants(tmp_path: Path) -> None:
    data, model = images(str(medmnist_file(tmp_path / "x.npz"))), torch.nn.Module()
    assert data.for_model(model) is data
    assert data.notes == []
    for size, done in ((56, "enlarged to 56, which adds nothing to them"), (14, "shrunk to 14")):
        model.image_spec = ImageSpec(size=size)  # type: ignore[assignment]
        wanted = data.for_model(model)
        assert (wanted.spec, wanted.reading, wanted.set) == (model.image_spec, data.reading, data.set)
        assert [done in note for note in wanted.notes] == [True]
        assert wanted.train(2, seed=0).batch(0)["images"].shape[-1] == size


def test_part_of_a_split_is_a_fixed_sample_of_every_class() -> None:
    labels = np.array([0] * 90 + [1] * 9 + [2])  # sorted by class, as folders are
    split = Split(images=np.zeros((100, 2, 2), np.uint8), labels=labels)
    batches = evaluation_batches(split, ImageSpec(size=2), 10, limit=2)
    found = torch.cat([batch["labels"] for batch in batches])
    assert torch.bincount(found).tolist() == [17, 2, 1]
    assert len(batches) == 2
    assert torch.equal(
        found, torch.cat([evaluation_batches(split, ImageSpec(size=2), 10, 2).batch(n)["labels"] for n in (0, 1)])
    )
    assert len(evaluation_batches(split, ImageSpec(size=2), 10, limit=50).rows) == 100
    assert evaluation_batches(split, ImageSpec(size=2), 10, None).rows.tolist() == list(range(100))


def test_pixels_in_flight_are_bounded_and_a_huge_image_is_alone() -> None:
    budget, seen = PixelBudget(100), []

    def decode(pixels: int) -> None:
        with budget.held(pixels):
            time.sleep(0.002)  # the others come meanwhile
            seen.append((pixels, budget.used))

    threads = [threading.Thread(target=decode, args=(pixels,)) for pixels in [60, 30, 500] * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 24
    assert all(used <= 100 or used == pixels == 500 for pixels, used in seen)
    both, met = threading.Barrier(2, timeout=60), []

    def meet(pixels: int) -> None:
        with budget.held(pixels):
            met.append(both.wait())

    threads = [threading.Thread(target=meet, args=(pixels,)) for pixels in (60, 40)]  # which fit together
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(met) == [0, 1]
    assert budget.used == 0


def test_a_run_s_classes_stay_whatever_the_folder_is_called_now(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "x", per_class=4, classes=("a", "b", "c"))
    trained = images(str(root), size=16)
    (root / "a").rename(root / "z")
    with pytest.raises(ValueError, match=r"trained on a, b, c .*does not know z; missing are a"):
        images(str(root), size=16).learnt_by(trained, whole=True)
    shutil.rmtree(root / "z")
    found = images(str(root), size=16).learnt_by(ImageData.without_images(trained.to_json()))
    assert (found.classes, found.kind, found.reading) == (trained.classes, trained.kind, trained.reading)
    assert np.unique(found.split("train").labels).tolist() == [1, 2]
    several = images(str(medmnist_file(tmp_path / "s.npz", several=3)))
    turned = replace(several.set, classes=("2", "0", "1"))
    back = several.learnt_by(replace(several, set=turned)).split("test").labels
    assert np.array_equal(back[:, [1, 2, 0]], several.split("test").labels)


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_test_every_image_once_and_part_no_patient(tmp_path: Path, folds: int) -> None:
    file = medmnist_file(tmp_path / "pneumoniamnist.npz")
    whole = images(str(file)).set
    seen: list[str] = []
    for fold in range(1, folds + 1):
        found = images(str(file), folds=folds, fold=fold).set
        parts = {split: set(part.names) for split, part in found.splits.items()}
        assert sum(map(len, parts.values())) == sum(map(len, whole.splits.values()))
        assert not parts["train"] & parts["test"]
        assert not parts["val"] & (parts["train"] | parts["test"])
        assert set(np.unique(found.splits["test"].labels)) == {0, 1}, "both classes are tested"
        seen += parts["test"]
    assert len(seen) == len(set(seen)) == sum(map(len, whole.splits.values()))
    patients = [f"p{i // 3}" for i in range(60)]
    place = folds_by_patient(np.array([i % 2 for i in range(60)]), patients, folds)
    assert all(len({place[i] for i in range(60) if patients[i] == p}) == 1 for p in patients)
    with pytest.raises(ValueError, match="there are 3 patients, and each fold needs one"):
        folds_by_patient(np.array([0, 1, 1]), ["a", "b", "c"], 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fold": 1}, "give data.folds too"),
        ({"folds": 3}, "data.folds=3: give data.fold too"),
        ({"folds": 1, "fold": 1}, "data.folds=1 must be at least 2"),
        ({"folds": 3, "fold": 4}, "data.fold=4 one of 1 to 3"),
    ],
)
def test_folds_that_are_none(options: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        images("digits", **options)
