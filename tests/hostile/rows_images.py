"""Images: arrays and folders that do not fit, files that are none, and tables of labels."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tests.hostile.world import Row, World

SIZES = {"train": 24, "val": 8, "test": 8}


def stored(**changes: Any) -> Callable[[World], None]:
    """A file in MedMNIST's layout with some arrays changed, or, where None, left out."""
    content: dict[str, Any] = {}
    for split, count in SIZES.items():
        content[f"{split}_images"] = np.zeros((count, 20, 20), np.uint8)
        content[f"{split}_labels"] = column(*(i % 2 for i in range(count)))
    content = {name: array for name, array in (content | changes).items() if array is not None}
    return lambda world: np.savez("a.npz", **content)


def column(*labels: Any) -> np.ndarray:
    return np.array(labels)[:, None]


def npz(name: str, given: Any, *says: str, more: str = "", **rest: Any) -> Row:
    return Row(name=name, words=f"train vit-mini --data a.npz {{small}} {more} --out o", given=given, says=says, **rest)


def photos(spoil: Callable[[Path], Any]) -> Callable[[World], None]:
    """A copy of the common photos, spoilt."""

    def given(world: World) -> None:
        world.copy("photos")
        spoil(Path("photos"))

    return given


def folder(name: str, spoil: Callable[[Path], Any], *says: str, more: str = "", **rest: Any) -> Row:
    words = f"train vit-mini --data ./photos {{small}} {more} --out o"
    return Row(name=name, words=words, given=photos(spoil), says=says, **rest)


def table(name: str, content: str | bytes, *says: str, **rest: Any) -> Row:
    """Twelve images, and a table of their labels."""

    def given(world: World) -> None:
        Path("d").mkdir()
        for i in range(12):
            shutil.copy(world.image(), f"d/i{i}.png")
        Path("d/labels.csv").write_bytes(content.encode() if isinstance(content, str) else content)

    words = "train vit-mini --data d --labels labels.csv {small} --out o"
    return Row(name=name, words=words, given=given, says=says, **rest)


def one(path: Path) -> Path:
    return next((path / "ill").glob("*.png"))


GOOD = "".join(f"i{i}.png,{'ab'[i % 2]}\n" for i in range(12))
COPY = {"given": lambda world: shutil.copy(world.image(), "x.png")}

ROWS = [
    npz("no archive", {"a.npz": b"junk" * 99}, "a.npz is no .npz file, or a damaged one"),
    npz("an empty archive", {"a.npz": b""}, "a.npz is no .npz file"),
    npz(
        "an archive of text",
        lambda w: zipfile.ZipFile("a.npz", "w").writestr("train_images.npy", "x"),
        "a.npz lacks train_labels",
    ),
    npz("no labels", stored(train_labels=None), "a.npz lacks train_labels"),
    npz("numbers with points", stored(train_images=np.zeros((24, 20, 20))), "float64", "uint8"),
    npz("sixteen bits", stored(train_images=np.zeros((24, 20, 20), np.uint16)), "uint16", "uint8"),
    npz("four channels", stored(train_images=np.zeros((24, 20, 20, 4), np.uint8)), "(24, 20, 20, 4)"),
    npz("fewer labels than images", stored(train_labels=column(*[0, 1] * 9)), "24 images and 18 labels"),
    npz(
        "no image",
        stored(train_images=np.zeros((0, 20, 20), np.uint8), train_labels=np.zeros((0, 1), np.uint8)),
        "a.npz has no image to train on",
    ),
    npz("a label of 2^40", stored(train_labels=column(*[0, 2**40] * 12)), "labels 1 in val", "1099511627776"),
    npz("a negative label", stored(train_labels=column(*[0, -1] * 12)), "labels 1 in val", "-1, 0"),
    npz("a label of NaN", stored(train_labels=column(*[0, np.nan] * 12)), "train_labels", "whole numbers"),
    npz("labels of letters", stored(train_labels=column(*"ab" * 12)), "train_labels", "whole numbers"),
    npz("pickled labels", stored(train_labels=np.array([[{}]] * 24, dtype=object)), "train_labels", "Python objects"),
    npz("one class", stored(**{f"{s}_labels": column(*[0] * n) for s, n in SIZES.items()}), "nothing to tell apart"),
    npz("a class that is never trained", stored(val_labels=column(*[0, 2] * 4)), "labels 2 in val", "lacks"),
    npz(
        "labels of threes",
        stored(**{f"{s}_labels": np.full((n, 3), 2, np.uint8) for s, n in SIZES.items()}),
        "must be zeros and ones",
    ),
    npz(
        "one of several",
        stored(**{f"{s}_labels": np.array([[0, 1], [1, 0]] * (n // 2), np.uint8) for s, n in SIZES.items()}),
        "2 labels to an image",
        "multi-label",
        more="--data.kind multi-class",
    ),
    npz("a table that means nothing", stored(), "data.labels has no effect on a.npz", more="--labels l.csv"),
    npz(
        "labels from 1 on",
        stored(**{f"{s}_labels": column(*[1, 2] * (n // 2)) for s, n in SIZES.items()}),
        "1 → 0, 2 → 1",
        status=0,
        writes=("o", "o/*"),
    ),
    folder("one class is left", lambda d: shutil.rmtree(d / "well"), "photos has only the class ill"),
    folder("no class is left", lambda d: [shutil.rmtree(d / n) for n in ("well", "ill")], "has no folders of images"),
    folder(
        "splits beside classes",
        lambda d: shutil.copytree(d / "ill", d / "train" / "ill"),
        "the splits train and beside them ill, well",
    ),
    folder("junk called PNG", lambda d: (d / "ill/x.png").write_bytes(b"junk"), "1 of 25 images", "ill/x.png", "skip"),
    folder(
        "a PNG cut short", lambda d: (d / "ill/x.png").write_bytes(one(d).read_bytes()[:80]), "ill/x.png", "truncated"
    ),
    folder("an empty PNG", lambda d: (d / "ill/x.png").write_bytes(b""), "ill/x.png"),
    folder(
        "junk alone",
        lambda d: [path.write_bytes(b"junk") for path in d.rglob("*.png")],
        "photos",
        "24",
        more="--data.skip_damaged true",
    ),
    folder("a pattern that is none", lambda d: None, "'('", "no regular expression", more="--data.patient_pattern '('"),
    folder("a pattern without group", lambda d: None, "needs a group", more="--data.patient_pattern x+"),
    folder("a window of one", lambda d: None, "data.window='5'", "low,high", more="--data.window 5"),
    folder("a fit that is none", lambda d: None, "--data.fit x", "stretch", more="--data.fit x"),
    folder("an augmentation that is none", lambda d: None, "'x'", "hflip", more="--data.augment x"),
    folder("a balance that is none", lambda d: None, "--data.balance x", more="--data.balance x"),
    folder(
        "what a Mac leaves behind",
        lambda d: ((d / "__MACOSX").mkdir(), shutil.copy(one(d), d / "__MACOSX" / "._x.png")),
        "passed over: __MACOSX",
        status=0,
        writes=("o", "o/*"),
    ),
    folder("a pipe called PNG", lambda d: os.mkfifo(d / "ill/x.png"), status=0, writes=("o", "o/*")),
    table("a short row", f"path,label\n{GOOD}i1.png\n", "labels.csv line 14 has 1 cells, and the header 2"),
    table("a long row", f"path,label\n{GOOD}i1.png,a,b\n", "labels.csv line 14 has 3 cells"),
    table("a row twice", f"path,label\n{GOOD}i1.png,a\n", "labels.csv names 1 files more than once"),
    table("a file that is not there", f"path,label\n{GOOD}zz.png,a\n", "1 of 13 files", "zz.png"),
    table("a file that is no image", f"path,label\n{GOOD}/etc/passwd,a\n", "1 of 13 images", "/etc/passwd"),
    table("a folder for a file", f"path,label\n{GOOD}.,a\n", "1 of 13 files", "not in d: ."),
    table("no label", f"path,label\n{GOOD}i1.png,\n", "labels.csv line 14: i1.png has no label"),
    table("no table", "", "labels.csv needs the columns path and label"),
    table("other columns", f"file,class\n{GOOD}", "it has file, class and 12 rows"),
    table("a table in UTF-16", f"path,label\n{GOOD}".encode("utf-16"), "labels.csv", "can't decode"),
    table("a stray quote", f'path,label\n"i1.png,a\n{GOOD}', "labels.csv after line 1", "unexpected end of data"),
    table(
        "a split that is none",
        "path,label,split\ni1.png,a,holdout\n",
        "line 2: i1.png is in the split 'holdout'",
        "train, val, test",
    ),
    table(
        "nothing to train on",
        "path,label,split\n" + "".join(f"i{i}.png,{'ab'[i % 2]},test\n" for i in range(12)),
        "d leaves no image to train on",
        "splits test",
    ),
    Row(
        name="a table that is a pipe",
        words="train vit-mini --data {photos} --labels f.csv {small} --out o",
        given=lambda w: os.mkfifo("f.csv"),
        says=("no table of labels f.csv",),
    ),
    Row(
        name="predict a pipe",
        words="predict --base {images} p.png",
        given=lambda w: os.mkfifo("p.png"),
        says=("p.png",),
    ),
    Row(name="predict junk", words="predict --base {images} x.png", given={"x.png": b"junk"}, says=("x.png", "skip")),
    Row(name="predict nothing", words="predict --base {images} x.png", says=("no image or folder x.png",)),
    Row(
        name="predict an empty folder",
        words="predict --base {images} d",
        given=lambda w: Path("d").mkdir(),
        says=("no images",),
    ),
    Row(name="predict by a text", words="predict --base {text} x.png", **COPY, says=("is a run on text",)),  # type: ignore[arg-type]
    Row(
        name="predict into a folder",
        words="predict --base {images} x.png --out .",
        **COPY,  # type: ignore[arg-type]
        says=("--out . is a folder",),
    ),
    Row(
        name="predict into nowhere",
        words="predict --base {images} x.png --out nowhere/p.csv",
        **COPY,  # type: ignore[arg-type]
        says=("there is no folder nowhere",),
    ),
    Row(
        name="predict over the image",
        words="predict --base {images} x.png --out x.png",
        **COPY,  # type: ignore[arg-type]
        says=("is one of the images",),
    ),
    Row(
        name="predict no images at once",
        words="predict --base {images} x.png --batch-size 0",
        **COPY,  # type: ignore[arg-type]
        says=("--batch-size 0 must be at least 1",),
    ),
    Row(
        name="predict one pixel of four channels",
        words="predict --base {images} x.png",
        given=lambda w: Image.new("RGBA", (1, 1)).save("x.png"),
        status=0,
        shows=("x.png: ",),
    ),
]
