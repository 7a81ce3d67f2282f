"""Volumes: MedMNIST's 3-D layout, a ViT's weights inflated, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tests.images import medmnist_file

from lowrank.cli import main
from lowrank.data.images.batches import to_model
from lowrank.data.images.set import ImageSpec
from lowrank.data.images.source import ImageData, images
from lowrank.evaluate.image_pictures import mistakes
from lowrank.evaluate.image_report import Judged
from lowrank.infra.loaded_parameters import origin
from lowrank.models.vision import vit_mini
from lowrank.models.volumes import vit_3d

TINY = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2}
SMALL = ["--batch-size", "8", *(f"--model.{name}={value}" for name, value in TINY.items())]


def no_volumes(classes: int = 3) -> ImageData:
    return ImageData.without_images(
        {
            "kind": "multi-class",
            "classes": [*map(str, range(classes))],
            "reading": {"depth": 16},
            "spec": {"size": 16, "depth": 16},
        }
    )


@pytest.mark.parametrize(("name", "size"), [("nodulemnist3d", 28), ("nodulemnist3d_64", 64), ("mine", 28)])
def test_a_file_of_volumes_is_mapped_and_its_batches_are_resized(tmp_path: Path, name: str, size: int) -> None:
    data = images(str(medmnist_file(tmp_path / f"{name}.npz", slices=size, size=size)))
    assert data.set.volumes
    assert (data.kind, data.reading.size, data.reading.depth) == ("binary", size, size)
    assert data.classes == (("0", "1") if name == "mine" else ("benign", "malignant"))
    stored = data.set.splits["train"].images
    assert isinstance(stored, np.memmap)
    assert ImageData.without_images(data.to_json()).reading.depth == size
    whole = data.train(4, seed=0).batch(0)["images"]
    assert whole.shape == (4, 3, size, size, size)
    exact = torch.from_numpy(np.array(stored[:2])).float() / 127.5 - 1
    assert torch.allclose(to_model(stored[:2], data.spec), exact[:, None].expand(-1, 3, -1, -1, -1), atol=1e-6)
    half = to_model(stored[:2], ImageSpec(size=size // 2, depth=size // 4, mean=(0, 0, 0), std=(1, 1, 1)))
    assert half.shape == (2, 3, size // 4, size // 2, size // 2)
    assert float(half.mean()) == pytest.approx(stored[:2].mean() / 255, rel=0.02)  # no slice is passed over


def test_what_augments_a_volume_does_the_same_to_every_slice(tmp_path: Path) -> None:
    plane = np.random.default_rng(0).integers(0, 255, size=(6, 1, 16, 16)).astype(np.uint8)
    same = np.repeat(plane, 5, axis=1)
    x = to_model(same, ImageSpec(size=16, depth=5), ("hflip", "crop"), torch.Generator().manual_seed(0))
    assert not torch.equal(x, to_model(same, ImageSpec(size=16, depth=5)))
    assert torch.equal(x, x[:, :, :1].expand_as(x))
    with pytest.raises(ValueError, match="randaugment is for images; volumes take hflip, vflip and crop"):
        images(str(medmnist_file(tmp_path / "a.npz", size=16, slices=12)), augment=["randaugment"])


@pytest.mark.parametrize("by", ["cubes", "slices"])
def test_a_volume_of_like_slices_is_to_2d_weights_what_its_slice_is(tmp_path: Path, by: str) -> None:
    torch.manual_seed(0)
    flat = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
    ).eval()
    save_file(flat.state_dict(), tmp_path / "flat.safetensors")
    model = vit_3d(
        no_volumes(),
        by=by,  # type: ignore[arg-type]
        name="vit_tiny_patch16_224",
        weights=str(tmp_path / "flat.safetensors"),
        **TINY,  # type: ignore[arg-type]
    ).eval()
    picture = torch.randn(2, 3, 16, 16)
    volume = picture[:, :, None].expand(-1, -1, 16, -1, -1)
    with torch.no_grad():
        if by == "cubes":  # each cube is embedded, and placed, as its patch is
            assert torch.allclose(
                model.patch_embed(volume),  # type: ignore[operator]
                flat.patch_embed(picture).repeat(1, 2, 1),
                atol=1e-5,
            )
            assert torch.allclose(model.pos_embed[:, 1:], flat.pos_embed[:, 1:].repeat(1, 2, 1), atol=1e-6)
            assert torch.equal(model.pos_embed[:, :1], flat.pos_embed[:, :1])
        else:  # the mean of like features is the feature
            pooled = flat.forward_head(flat.forward_features(picture), pre_logits=True)
            assert torch.allclose(model(volume), model.head(pooled), atol=1e-5)  # type: ignore[operator]
    loaded = origin(model).loaded
    fresh = {name for name, p in model.named_parameters() if id(p) not in loaded}
    assert fresh == {"head.weight", "head.bias"} | ({"patch_embed.depth"} if by == "cubes" else {"places", "query"})


def test_the_order_of_slices_is_seen_once_it_is_learnt() -> None:
    for by, name in (("cubes", "patch_embed.depth"), ("slices", "places")):
        torch.manual_seed(0)
        model = vit_3d(no_volumes(), by=by, **TINY).eval()  # type: ignore[arg-type]
        torch.nn.init.normal_(model.get_parameter("query" if by == "slices" else name))
        torch.nn.init.normal_(model.get_parameter(name))
        x = torch.randn(1, 3, 16, 16, 16)
        assert not torch.allclose(model(x), model(x.flip(2)), atol=1e-4)


@pytest.mark.parametrize("by", ["cubes", "slices"])
def test_runs_on_volumes_train_resume_score_and_are_planned(tmp_path: Path, by: str) -> None:
    file = str(medmnist_file(tmp_path / "a.npz", size=16, slices=12))
    words = ["vit-3d", "--data", file, *SMALL, "--model.by", by, "--method.rank", "2"]
    assert main(["plan", *words]) == 0
    assert main(["train", *words, "--steps", "4", "--out", str(tmp_path / "whole")]) == 0
    assert main(["train", *words, "--steps", "4", "--stop-at", "2", "--out", str(tmp_path / "cut")]) == 0
    assert main(["train", "--resume", str(tmp_path / "cut")]) == 0
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    assert [x for x in losses[0] if x is not None] == [x for x in losses[1] if x is not None]
    assert main(["eval", str(tmp_path / "whole"), "--split", "test"]) == 0
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "plain")]) == 0
    start = vit_3d(no_volumes(5), by=by, weights=str(tmp_path / "plain"), **TINY)  # type: ignore[arg-type]
    written = load_file(tmp_path / "plain" / "model.safetensors")
    other = {name for name, t in start.state_dict().items() if not torch.equal(t, written[name])}
    assert other == {"head.weight", "head.bias"}
    loaded = origin(start).loaded
    fresh = {name for name, p in start.named_parameters() if id(p) not in loaded}
    assert fresh == {"head.weight", "head.bias"} | ({"patch_embed.depth"} if by == "cubes" else {"places", "query"})
    flat = ImageData.without_images({**no_volumes().to_json(), "reading": {}, "spec": {"size": 16}})
    if by == "slices":  # its ViT is one of images
        images_of = vit_mini(flat, weights=str(tmp_path / "plain"), **TINY)  # type: ignore[arg-type]
        assert torch.equal(images_of.get_parameter("pos_embed"), written["encoder.pos_embed"])
    else:
        with pytest.raises(ValueError, match="are of vit-3d by cubes"):
            vit_mini(flat, weights=str(tmp_path / "plain"), **TINY)  # type: ignore[arg-type]


def test_the_sheet_of_mistakes_shows_the_middle_slice() -> None:
    volumes = np.zeros((2, 5, 4, 4), np.uint8)
    volumes[:, 2] = 7
    scores = np.array([[0.1, 0.9], [0.1, 0.9]])
    judged = Judged(kind="binary", classes=("a", "b"), labels=np.array([0, 1]), scores=scores, images=volumes)
    figure = mistakes(judged)
    assert figure is not None
    assert (np.asarray(figure.axes[0].images[0].get_array()) == np.full((4, 4), 7)).all()


def test_images_for_volumes_and_the_reverse_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(medmnist_file(tmp_path / "a.npz", size=16, slices=12))
    assert main(["train", "vit-mini", "--data", file, "--out", str(tmp_path / "o")]) != 0
    assert "a holds volumes, which --model vit-3d takes" in capsys.readouterr().err
    assert main(["train", "vit-3d", "--data", "digits", "--out", str(tmp_path / "o")]) != 0
    assert "digits holds images, which --model vit or vit-mini takes" in capsys.readouterr().err
    with pytest.raises(ValueError, match="volumes of one slice, which are images"):
        images(str(medmnist_file(tmp_path / "nodulemnist3d.npz", slices=1)))
    with pytest.raises(ValueError, match="exists at 28, 64 pixels"):
        images("nodulemnist3d", size=224)
    with pytest.raises(ValueError, match="takes timm's plain ViTs"):
        vit_3d(no_volumes(), name="deit_tiny_distilled_patch16_224", depth=1)
    with pytest.raises(ValueError, match="not a multiple of the cube, 8; 8 and 16 are"):
        vit_3d(no_volumes(), slices=12, **TINY)  # type: ignore[arg-type]
