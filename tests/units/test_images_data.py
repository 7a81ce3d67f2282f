"""Images as data: MedMNIST's layout at every size, people's folders, splits, damaged files, batches."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.images import COUNTS, class_folders, medmnist_file, pictures, write_picture

from lowrank.data.images.batches import ImageBatches, label_weights, to_model
from lowrank.data.images.decode import read_image, windowed
from lowrank.data.images.medmnist import NAMES, SIZES, download
from lowrank.data.images.set import ImageSpec, Split
from lowrank.data.images.source import images
from lowrank.data.images.splits import split_by_patient

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
    data = images(str(medmnist_file(tmp_path / f"{name}.npz", classes=count, several=several)))
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


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, train_images=np.zeros((2, 4, 4), np.uint8), images=np.zeros(1))
    with pytest.raises(ValueError, match=r"lacks train_labels, val_images.* it has images, train_images"):
        images(str(file))
    file.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"no \.npz file, or a damaged one"):
        images(str(file))
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        images(str(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match=r"from 0 to 2.*takes whole numbers from 0 to 1"):
        images(str(medmnist_file(tmp_path / "breastmnist.npz", classes=3)))
    with pytest.raises(ValueError, match="did you mean 'pathmnist'"):
        images("pathmnits")
    with pytest.raises(ValueError, match="none of MedMNIST's"):
        images(str(medmnist_file(tmp_path / "y.npz")), dataset="lungmnist")
    with pytest.raises(ValueError, match=r"data\.size=64, and .* holds images of 28 pixels"):
        images(str(tmp_path / "y.npz"), size=64)
    with pytest.raises(ValueError, match="the task of breastmnist is binary"):
        images(str(medmnist_file(tmp_path / "breastmnist.npz")), kind="ordinal")
    with pytest.raises(ValueError, match="exists at 28, 64, 128, 224"):
        download("pathmnist", 96)


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
        ("path,label\nill/patient00_0.png,", "1 files in .* have no label"),
        ("path,label,split\nill/patient00_0.png,a,holdout", "in the split 'holdout'"),
        ("path,label\nill/patient00_0.png,a\nill/patient00_0.png,b", "names 1 files more than once"),
        ("path,label\nill/patient00_0.png,a\nill/patient00_1.png,a", "only the class a"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, table: str, message: str) -> None:
    root = class_folders(tmp_path / "x", per_class=2)
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        images(str(root), size=16, labels=str(tmp_path / "t.csv"))


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


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_windowed_and_not_clipped_to_white(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(1000, 3000, 64 * 64).reshape(64, 64).astype(np.uint16)
    file = write_picture(tmp_path / f"x.{suffix}", ramp)
    read = read_image(file, 64, grey=True)
    assert read.min() <= 2
    assert read.max() >= 253
    assert abs(float(read.mean()) - 127.5) < 2
    given = read_image(file, 64, grey=True, window="0,4000")
    np.testing.assert_allclose(given, np.rint(ramp / 4000 * 255), atol=1)
    full = read_image(file, 64, grey=True, window="full")
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
    read = read_image(file, 20, grey=False, fit=fit)  # type: ignore[arg-type]
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


def test_unknown_augmentations_and_balances_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'hflip'"):
        images("digits", augment=("hflp",))
    with pytest.raises(ValueError, match="it is one of none, weights, sampler"):
        images("digits", balance="more")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data\.labels has no effect on digits"):
        images("digits", labels="x.csv")
