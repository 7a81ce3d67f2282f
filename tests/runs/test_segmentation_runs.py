"""Runs on masks: trained, scored, resumed and reported as others are; folders that cannot be right are refused."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.units.test_medical_files import series

from lowrank.cli import main
from lowrank.data.images.decode import Reading, fitted, fitted_part
from lowrank.data.images.masks import MaskData, masks
from lowrank.data.images.set import Split
from lowrank.evaluate.predict_masks import segment
from lowrank.evaluate.segmentation_report import COLOURS, KEYS, hausdorff, overlays, report
from lowrank.evaluate.segmentation_task import MaskTally, mask_loss, overlaps
from lowrank.infra.log import read_log
from lowrank.report.runs import Result
from lowrank.report.table import Row, judged_by

SMALL = ["--model.image_size", "32", "--model.patch_size", "8", "--model.width", "16", "--model.depth", "2"]
SMALL += ["--model.heads", "2", "--model.hidden", "8", "--batch-size", "4"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of 40 × 30 pixels: a bright square of each on dark noise, whose mask is 1, and 2 below it."""
    root, noise = tmp_path / "set", np.random.default_rng(0)
    for what in ("images", "masks"):
        (root / what).mkdir(parents=True)
    for i in range(12):
        image, mask = noise.integers(0, 60, (30, 40)), np.zeros((30, 40))
        top, left = noise.integers(0, 12), noise.integers(0, 25)
        mask[top : top + 8, left : left + 12], mask[top + 8 : top + 14, left : left + 12] = 1, 2
        image[mask > 0] += 120
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{i:02}.png")
        Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / f"{i:02}.png")
    return root


def train(out: Path, data: Path, *more: str) -> int:
    return main(["train", "vit-segment", "--data", str(data), *SMALL, "--out", str(out), "--epochs", "2", *more])


@pytest.mark.parametrize("method", ["lora", "linear_probe"])
def test_a_run_on_masks_is_trained_resumed_scored_and_reported(
    folder: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x"
    assert train(out, folder, "--method", method, "--stop-at", "2") == 0
    assert main(["train", "--resume", str(out), "--quiet"]) == 0
    whole = tmp_path / "whole"
    assert train(whole, folder, "--method", method) == 0
    losses = [[record["loss"] for record in read_log(each / "log.jsonl") if "loss" in record] for each in (out, whole)]
    assert losses[0] == losses[1]
    figures = json.loads((whole / "clinic" / "metrics.json").read_text())
    assert list(figures["classes"]) == ["1", "2"]
    assert (whole / "clinic" / "overlays.png").is_file()
    capsys.readouterr()
    assert main(["eval", str(whole), "--split", "test"]) == 0
    told = capsys.readouterr().out
    assert f"{figures['overall']['dice']['value']:.4f}"[:5] in told
    assert main(["plan", "vit-segment", "--data", "mni152", "--method", method]) == 0


def test_the_probe_trains_the_decoder_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    from lowrank.run.session import restore

    assert train(tmp_path / "x", folder, "--method", "linear_probe", "--stop-at", "1") == 0
    session, _ = restore(tmp_path / "x", "latest")
    trained = {name for name, p in session.model.named_parameters() if p.requires_grad}
    assert trained == {f"head.{layer}.{what}" for layer in ("neighbours", "pixels") for what in ("weight", "bias")}


def test_overlap_and_loss_are_those_of_their_definition() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.int64)
    said = mask.clone()
    mask[0, :2], said[0, 1:3] = 1, 1
    dice, iou = overlaps(said, mask, 3)[:, 0]
    assert dice[0] == 0.5
    assert iou[0] == pytest.approx(1 / 3)
    assert torch.isnan(dice[1])
    sure = torch.nn.functional.one_hot(mask, 2).permute(0, 3, 1, 2) * 100.0
    assert mask_loss(sure, mask) == pytest.approx(0, abs=1e-5)
    assert mask_loss(torch.zeros(1, 2, 4, 4), mask) == pytest.approx(np.log(2) + 1 - 9 / 17)


def test_slices_of_different_splits_are_never_neighbours() -> None:
    where = {int(name.split()[1]): split for split, part in masks().set.splits.items() for name in part.names}
    assert all(z + 1 not in where for z in where)
    assert len(set(where.values())) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda root: (root / "masks" / "03.png").unlink(), "images/03.png has no mask"),
        (lambda root: (root / "images" / "03.png").unlink(), "masks/03.png has no image"),
        (lambda root: Image.new("L", (30, 40)).save(root / "masks" / "03.png"), "its image 40 × 30"),
        (lambda root: Image.new("RGB", (40, 30)).save(root / "masks" / "03.png"), "03.png is no mask"),
        (
            lambda root: Image.new("L", (40, 30), 7).save(root / "masks" / "03.png"),
            "03.png holds the label 7, and there are 3 classes (0 to 2): name all with --data.classes",
        ),
        (lambda root: (root / "masks").rename(root / "labels"), "images/ and masks/"),
        (lambda root: [Image.new("L", (40, 30)).save(p) for p in (root / "masks").iterdir()], "nothing but 0"),
    ],
)
def test_folders_that_cannot_be_right_are_refused(folder: Path, fault: object, message: str) -> None:
    fault(folder)  # type: ignore[operator]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        masks(str(folder), classes=("background", "one", "two"))
    assert message in str(error.value)


def test_masks_of_files_have_their_size_and_place(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import nibabel as nib

    run, out = str(tmp_path / "x"), tmp_path / "out"
    assert train(tmp_path / "x", folder, "--method", "lora", "--quiet") == 0
    volume = np.stack([np.asarray(Image.open(folder / "images" / f"{i:02}.png")) for i in range(5)])
    plain = nib.Nifti1Image(volume.transpose(2, 1, 0), np.diag([-2.0, -2, 3, 1]))
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt("SRA"))
    turned = plain.as_reoriented(turn)
    new = tmp_path / "new"
    (new / "b").mkdir(parents=True)
    nib.save(turned, new / "v.nii.gz")
    nib.save(plain.slicer[:, :, 3:4], new / "slice.nii")
    (new / "b" / "v.png").write_bytes((folder / "images" / "02.png").read_bytes())
    assert main(["export", run, "--adapter", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    assert main(["predict", run, str(new), "--out", str(out), "--batch-size", "2"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == [str(new / n) for n in ("b/v.png", "slice.nii", "v.nii.gz")]
    made = nib.load(out / "v.nii.gz")
    assert made.shape == turned.shape
    assert np.array_equal(made.affine, turned.affine)
    back = made.as_reoriented(nib.orientations.ornt_transform(*map(nib.io_orientation, (made.affine, plain.affine))))
    masks_of = np.asarray(back.dataobj).transpose(2, 1, 0)
    assert masks_of.any()
    assert np.array_equal(masks_of[2], np.asarray(Image.open(out / "b" / "v.png")))
    assert np.array_equal(masks_of[3], np.asarray(nib.load(out / "slice.nii").dataobj)[..., 0].T)
    one = [str(new / "b" / "v.png"), "--out"]
    assert main(["predict", "--adapter", str(tmp_path / "a"), "--base", run, *one, str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "v.png").read_bytes() == (out / "b" / "v.png").read_bytes()
    (new / "c.png").write_bytes(b"junk")
    capsys.readouterr()
    for words, message in (
        ([str(new)], "where do the masks go?"),
        ([str(new), "--out", str(out)], "is not empty"),
        ([str(new), "--out", str(tmp_path / "none" / "out")], "there is no folder"),
        ([str(new), "--out", str(tmp_path / "bad")], "1 of 4 images cannot be read"),
    ):
        assert main(["predict", run, *words]) == 2
        assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "bad" in path.name]


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("shape", [(30, 42), (42, 30), (20, 20)])
def test_what_a_plane_shows_is_where_reading_puts_it(shape: tuple[int, int], fit: str) -> None:
    reading = Reading(size=64, grey=True, fit=fit)  # type: ignore[arg-type]
    seen, shown = fitted_part(*shape, reading)
    plane, square = np.zeros(shape, np.uint8), np.zeros((64, 64), np.uint8)
    plane[seen], square[shown] = 200, 200
    assert np.array_equal(fitted(plane, reading) > 20, square > 20)  # a crop sees a little of what is beside it


def nifti(path: Path, slices: np.ndarray, shift: float = 0.0, axes: str = "LPS") -> Path:
    """Slices (d, h, w) from the feet up, 3 mm apart, their pixels 2 × 1 mm, as a file of these axes."""
    import nibabel as nib

    affine = np.diag([-1.0, -2, 3, 1])
    affine[0, 3] = shift
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt(axes))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(slices.transpose(2, 1, 0), affine).as_reoriented(turn), path)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Nine patients with a volume of four slices of 24 × 48 pixels each, in a table; one has two."""
    noise, lines = np.random.default_rng(0), ["image,mask,patient,split"]
    for i in range(10):
        mask = np.zeros((4, 24, 48), np.uint8)
        mask[1:, i : i + 8, 10:30] = 255
        image = (mask > 0) * 120 + noise.integers(0, 60, mask.shape)
        nifti(tmp_path / "t" / f"{i}.nii.gz", image.astype(np.int16), axes="SRA" if i % 2 else "LPS")
        nifti(tmp_path / "t" / f"{i}-seg.nii", mask)
        lines.append(f"{i}.nii.gz,{i}-seg.nii,p{min(i, 8)},{'train' if i < 5 else 'validation' if i < 7 else 'test'}")
    path = tmp_path / "t" / "table.csv"
    path.write_text("\n".join(lines))
    return path


def test_volumes_of_a_table_are_slices_of_patients_and_distances_are_millimetres(table: Path, tmp_path: Path) -> None:
    data = masks(str(table), size=24, classes=("background", "it"))
    assert {name: len(split) for name, split in data.set.splits.items()} == {"train": 20, "val": 8, "test": 12}
    dealt = [masks(str(table), size=24, folds=3, fold=k).set.splits for k in (1, 2, 3)]
    tested = [set(splits["test"].patients) for splits in dealt]
    assert sorted(who for each in tested for who in each) == [f"p{i}" for i in range(9)]
    assert all(set(splits["train"].patients).isdisjoint(each) for splits, each in zip(dealt, tested, strict=True))
    test = data.set.splits["test"]
    assert (test.names[1], set(test.patients)) == ("7.nii.gz slice 1", {"p7", "p8"})
    assert set(test.spacing) == {(4.0, 2.0)}  # 48 × 24 pixels of 1 × 2 mm go to 24 × 12
    assert test.labels[:4].max(axis=(1, 2)).tolist() == [0, 1, 1, 1]
    bright = test.images[1][test.labels[1] > 0].mean()
    assert bright > 2 * test.images[1][test.labels[1] == 0].mean()
    assert train(tmp_path / "x", table, "--method", "lora", "--data.size", "24", "--quiet") == 0
    figures = json.loads((tmp_path / "x" / "clinic" / "metrics.json").read_text())
    assert (figures["resampled"], figures["hausdorff_unit"]) == ("patients", "mm")


def test_a_distance_knows_how_far_apart_pixels_are() -> None:
    mask, said = np.zeros((1, 9, 9), np.uint8), np.zeros((1, 9, 9), np.uint8)
    mask[0, 2:4, 2:4], said[0, 2:4, 4:6] = 1, 1
    tally = MaskTally()
    tally.packed.append(torch.frombuffer(bytearray(zlib.compress(said[0].tobytes())), dtype=torch.uint8))
    for spacing, far in (((), 2), (((5.0, 1.5),), 3)):
        assert hausdorff(Split(images=mask, labels=mask, spacing=spacing), tally, 2) == pytest.approx(far)


def test_a_report_in_numbers(tmp_path: Path) -> None:
    """Four images of three patients; of the classes one is found, one never is and one is in no mask."""
    mask, said = np.zeros((4, 10, 10), np.uint8), np.zeros((4, 10, 10), np.uint8)
    mask[0, :3], said[0, :3] = 1, 1
    mask[2, 2:4, 2:4], said[2, 2:4, 4:6] = 1, 1
    mask[3, :2], said[3, 1:3], mask[3, 9] = 1, 1, 2
    grey, who = np.full((4, 10, 10), 100, np.uint8), ["p0", "p0", "p1", "p2"]
    part = Split(images=grey, labels=mask, patients=who, names=[f"in/{i}.png" for i in range(4)])
    tally = MaskTally()
    tally.figures.append(overlaps(torch.from_numpy(said).long(), torch.from_numpy(mask).long(), 4))
    tally.packed += [torch.frombuffer(bytearray(zlib.compress(each.tobytes())), dtype=torch.uint8) for each in said]
    data = SimpleNamespace(set=SimpleNamespace(splits={"test": part}), classes=("background", "a|$", "b", "c"))
    told = report(data, tally, tmp_path, "test")  # type: ignore[arg-type]
    assert told[1:] == [
        "Dice by class: a|$ 0.500, b 0.000, c –",
        "b was never found where it is",
        "c is in no mask of these images",
    ]
    figures = json.loads((tmp_path / "clinic" / "metrics.json").read_text())
    assert (figures["images"], figures["resampled"], figures["hausdorff_unit"]) == (4, "patients", "pixels")
    values = {name: [row[key]["value"] for key in KEYS] for name, row in figures["classes"].items()}
    assert values["a|$"] == pytest.approx([(1 + 0 + 0.5) / 3, (1 + 0 + 1 / 3) / 3, (0 + 2 + 1) / 3])
    assert (values["b"], values["c"]) == ([0, 0, None], [None] * 3)
    assert [row["images"] for row in figures["classes"].values()] == [3, 1, 0]
    assert [figures["overall"][key]["value"] for key in KEYS] == pytest.approx([0.25, 2 / 9, 1])
    drawn = figures["classes"]["a|$"]["dice"]
    assert (drawn["low"], drawn["high"]) == (0.0, 1.0)
    rows = (tmp_path / "clinic" / "predictions.csv").read_text().splitlines()
    assert (
        rows[0]
        == "image,patient,dice a|$,dice b,dice c,iou a|$,iou b,iou c,hausdorff_95 a|$,hausdorff_95 b,hausdorff_95 c"
    )
    assert rows[1:] == [
        "in/0.png,p0,1,,,1,,,0,,",
        "in/1.png,p0,,,,,,,,,",
        "in/2.png,p1,0,,,0,,,2,,",
        "in/3.png,p2,0.5,0,,0.333333,0,,1,,",
    ]
    page = (tmp_path / "clinic" / "report.md").read_text()
    assert "| class | images | Dice | IoU | Hausdorff 95 % (pixels) |" in page
    assert r"| a\|\$ | 3 | 0.500" in page
    axes = overlays(part, tally, tally.overlap[0], data.classes).axes
    titles = [each.get_title() for each in axes]
    assert titles[::3] == ["best: 0.png", "median: 3.png", "worst: 2.png"]
    assert titles[2::3] == ["answer, Dice 1.000", "answer, Dice 0.250", "answer, Dice 0.000"]
    plain, masked, answered = (each.images[0].get_array() for each in axes[3:6])
    first, second = ([round(0.45 * 100 + 0.55 * level) for level in colour] for colour in COLOURS[:2])
    assert (plain == 100).all()
    assert [masked[row, 0].tolist() for row in (0, 2, 9)] == [first, [100] * 3, second]
    assert [answered[row, 0].tolist() for row in (0, 2, 9)] == [[100] * 3, first, [100] * 3]
    names = [text.get_text() for text in axes[0].figure.legends[0].get_texts()]
    assert names == [r"a|\$", "b", "c"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: (t.parent / "3-seg.nii").unlink(), "line 5: there is no mask '3-seg.nii'"),
        (lambda t: t.write_text(t.read_text().replace(",p0,train", ",p8,train")), "p8 in train and test"),
        (lambda t: t.write_text(t.read_text().replace("p0,train", "p0,tran")), "the split 'tran'"),
        (lambda t: t.write_text("image,label\na,b\n"), "needs the columns image and mask"),
        (lambda t: nifti(t.parent / "3-seg.nii", np.ones((4, 24, 48), np.uint8), shift=5.0), "lies elsewhere than"),
        (lambda t: nifti(t.parent / "3-seg.nii", np.ones((3, 24, 48), np.uint8)), "48 × 24 × 3, and its image 48 × 24"),
        (lambda t: nifti(t.parent / "3-seg.nii", np.full((4, 24, 48), 0.5)), "3-seg.nii is no mask: it holds 0.5"),
        (lambda t: (t.parent / "3-seg.nii").write_bytes(b"junk"), "3-seg.nii cannot be read"),
        (
            lambda t: [nifti(t.parent / f"{i}-seg.nii", np.zeros((4, 24, 48), np.uint8)) for i in (5, 6)],
            "masks of the split val of",
        ),
    ],
)
def test_tables_that_cannot_be_right_are_refused(table: Path, spoil: object, message: str) -> None:
    spoil(table)  # type: ignore[operator]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        masks(str(table))
    assert message in str(error.value)


class Bright(torch.nn.Module):
    """Says of every pixel whether it is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(9.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([-self.weight * images[:, 0], self.weight * images[:, 0]], dim=1)


@pytest.mark.parametrize("shape", [(9, 50), (40, 33), (16, 16)])
@pytest.mark.parametrize("grey", [True, False])
def test_windows_slide_over_planes_in_their_own_pixels(shape: tuple[int, int], grey: bool) -> None:
    planes = np.random.default_rng(0).integers(0, 2, (3, *shape), dtype=np.uint8) * 200
    facts = {"classes": ("background", "bright"), "reading": {"size": 16, "grey": grey, "fit": "windows"}}
    data = MaskData.without_images({**facts, "spec": {"size": 16}})
    assert np.array_equal(segment(Bright(), planes, data, 4), planes > 0)


def test_a_run_on_windows_answers_a_series_by_a_volume(folder: Path, tmp_path: Path) -> None:
    import nibabel as nib

    data = masks(str(folder), size=16, fit="windows")  # twelve images of 40 × 30 pixels
    assert sum(map(len, data.set.splits.values())) == 12 * 3 * 2
    assert all(len({part.patients[i] for i in range(len(part))}) * 6 == len(part) for part in data.set.splits.values())
    words = ["--data.fit", "windows", "--data.size", "16", "--method", "lora", "--quiet"]
    assert train(tmp_path / "x", folder, *words) == 0
    volume = np.random.default_rng(0).integers(0, 200, (6, 20, 30)).astype(np.int16)
    series(tmp_path / "new" / "s", volume)
    assert main(["predict", str(tmp_path / "x"), str(tmp_path / "new"), "--out", str(tmp_path / "out")]) == 0
    made = nib.load(tmp_path / "out" / "s.nii.gz")
    assert made.shape == (30, 20, 6)
    assert made.affine.round(6).tolist() == np.diag([-2.0, -2, 3, 1]).tolist()


@pytest.mark.parametrize(("figure", "rank"), [("dice", 0.25), ("auc", 0.25), ("score", 2.0)])
def test_runs_are_compared_by_dice_or_auc_where_they_have_it(figure: str, rank: float) -> None:
    summary = {"val_loss": 2.0, f"val_{figure}": 0.7, f"best_val_{figure}": 0.75}
    result = Result(folder=Path("x"), settings={"data.fold": 1, "seed": 0}, summary=summary, log=[])
    row = Row(label="lora", lr=0.1, results=(result,))
    assert row.rank == rank
    assert judged_by([row]) == ("test_loss" if figure == "score" else f"test_{figure}")
