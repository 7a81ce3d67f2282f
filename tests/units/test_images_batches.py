"""Splits, folds, batches and augmentation of images."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.images import class_folders, medmnist_file, pictures

from lowrank.data.images import augment
from lowrank.data.images.batches import ImageBatches, evaluation_batches, label_weights, to_model
from lowrank.data.images.decode import PixelBudget
from lowrank.data.images.set import ImageSpec, Split
from lowrank.data.images.source import ImageData, images
from lowrank.data.images.splits import folds_by_patient, split_by_patient


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
