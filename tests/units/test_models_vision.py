"""Vision models: shapes, weights from files, positions resized, new heads, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import lowrank
from lowrank.data.images.decode import Reading
from lowrank.data.images.set import ImageSet, ImageSpec
from lowrank.data.images.source import ImageData
from lowrank.infra.loaded_parameters import origin
from lowrank.models.vision import hf_vit, logits_of, vit, vit_mini

TINY = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 2}


def data_of(classes: int = 3) -> ImageData:
    nothing = ImageSet(name="none", kind="multi-class", classes=tuple(map(str, range(classes))), splits={})
    return ImageData(set=nothing, reading=Reading(size=8), spec=ImageSpec(size=8))


def tiny(classes: int = 3, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return vit(data_of(classes), **TINY | options)  # type: ignore[arg-type]


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=5, **shape)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3]}')
    return tmp_path


def test_vit_mini_is_small_and_says_how_it_wants_its_images() -> None:
    model = vit_mini(data_of(4))
    assert model.image_spec.size == 28
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert logits_of(model, torch.randn(2, 3, 28, 28)).shape == (2, 4)


def test_any_timm_model_by_name_with_its_own_normalisation() -> None:
    model = tiny()
    config = timm.create_model("vit_tiny_patch16_224").pretrained_cfg
    assert model.image_spec == ImageSpec(size=32, mean=config["mean"], std=config["std"], interpolation="bicubic")
    assert logits_of(model, torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert vit(data_of(), name="deit_tiny_distilled_patch16_224", depth=1).image_spec.size == 224


def test_weights_from_a_file_are_all_taken_but_the_head(tmp_path: Path) -> None:
    source = tiny(classes=3)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    for path in (tmp_path / "model.safetensors", tmp_path, tmp_path / "x.pth"):
        torch.manual_seed(1)
        model = vit(data_of(3), weights=str(path), **TINY)  # type: ignore[arg-type]
        ours, theirs = model.state_dict(), source.state_dict()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours if not n.startswith("head."))
        assert not torch.equal(ours["head.weight"], theirs["head.weight"])
        plan = lowrank.apply_(model, lowrank.methods.linear_probe())
        assert plan.parameters_trained == 3 * 24 + 3


def test_the_new_head_trains_and_the_rest_is_frozen(tmp_path: Path) -> None:
    save_file(tiny().state_dict(), tmp_path / "model.safetensors")
    plan = lowrank.apply_(tiny(7, weights=str(tmp_path)), lowrank.methods.lora(rank=2))
    plain = {row.name for row in plan.rows if row.rule is not None and ".adapters." not in row.name}
    assert plain == {"head.weight", "head.bias"}


def test_positions_are_resized_to_the_image(tmp_path: Path) -> None:
    source = tiny()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = tiny(weights=str(tmp_path), image_size=48)
    assert model.pos_embed.shape == (1, 37, 24)
    assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])
    assert logits_of(model, torch.randn(1, 3, 48, 48)).shape == (1, 3)


def test_weights_that_do_not_fit_name_their_keys(tmp_path: Path) -> None:
    state: dict[str, Tensor] = dict(tiny().state_dict())
    state["blocks.0.extra"] = state.pop("blocks.1.norm1.weight")
    state["norm.weight"] = torch.zeros(7)
    save_file(state, tmp_path / "model.safetensors")
    message = r"lacks blocks\.1\.norm1\.weight.*has no blocks\.0\.extra.*norm\.weight \(7,\) where \(24,\) is wanted"
    with pytest.raises(ValueError, match=message):
        tiny(weights=str(tmp_path))
    (tmp_path / "x.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no weights that can be read safely"):
        tiny(weights=str(tmp_path / "x.pth"))
    (tmp_path / "model.safetensors").rename(tmp_path / "other")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="lowrank export"):
        tiny(weights=str(tmp_path))


def test_googles_npz_loads(tmp_path: Path) -> None:
    block, attention = "Transformer/encoderblock_{}/", "MultiHeadDotProductAttention_1/"
    shapes: dict[str, tuple[int, ...]] = {
        **{"embedding/kernel": (8, 8, 3, 24), "embedding/bias": (24,), "cls": (1, 1, 24)},
        "Transformer/posembed_input/pos_embedding": (1, 17, 24),
        **{"Transformer/encoder_norm/scale": (24,), "Transformer/encoder_norm/bias": (24,)},
        **{"head/kernel": (24, 3), "head/bias": (3,)},
    }
    own: dict[str, tuple[int, ...]] = {
        **{f"{attention}{part}/kernel": (24, 2, 12) for part in ("query", "key", "value")},
        **{f"{attention}{part}/bias": (2, 12) for part in ("query", "key", "value")},
        **{f"{attention}out/kernel": (2, 12, 24), f"{attention}out/bias": (24,)},
        **{f"LayerNorm_{i}/{what}": (24,) for i in (0, 2) for what in ("scale", "bias")},
        **{"MlpBlock_3/Dense_0/kernel": (24, 96), "MlpBlock_3/Dense_0/bias": (96,)},
        **{"MlpBlock_3/Dense_1/kernel": (96, 24), "MlpBlock_3/Dense_1/bias": (24,)},
    }
    shapes |= {block.format(i) + name: shape for i in range(2) for name, shape in own.items()}
    noise = np.random.default_rng(0)
    w = {name: noise.normal(size=shape) for name, shape in shapes.items()}
    np.savez(tmp_path / "x.npz", **w)
    model = tiny(weights=str(tmp_path / "x.npz"))
    np.testing.assert_allclose(model.cls_token.detach().numpy(), w["cls"], rtol=1e-6)
    assert id(model.head.weight) not in origin(model).loaded
    assert not np.allclose(model.head.weight.detach().numpy(), w["head/kernel"].T)


def test_transformers_vit_from_a_folder(hf_folder: Path) -> None:
    for classes in (3, 5):  # as many as in the folder: the head is new all the same
        model = hf_vit(data_of(classes), path=str(hf_folder))
        assert model.image_spec == ImageSpec(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))
        assert logits_of(model, torch.randn(2, 3, 32, 32)).shape == (2, classes)
        plan = lowrank.apply_(model, lowrank.methods.lora(rank=2))
        plain = {row.name for row in plan.rows if row.rule is not None and ".adapters." not in row.name}
        assert plain == {"classifier.weight", "classifier.bias"}
        assert len(plan.adapters) == 4


def test_transformers_vit_takes_another_image_size(hf_folder: Path) -> None:
    model = hf_vit(data_of(), path=str(hf_folder), image_size=48)
    assert logits_of(model, torch.randn(1, 3, 48, 48)).shape == (1, 3)
    assert id(model.vit.embeddings.position_embeddings) in origin(model).loaded
    with pytest.raises(ValueError, match="48 and 56 are"):
        hf_vit(data_of(), path=str(hf_folder), image_size=50)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: vit_mini(data_of(), image_size=30),
            r"image_size=30 is not a multiple of the patch, 4; 28 and 32 are",
        ),
        (lambda: tiny(image_size=44), "multiple of the patch"),
        (lambda: vit_mini(data_of(), width=90, heads=4), r"must be a multiple of model\.heads"),
        (lambda: vit(data_of(), name="vit_base_patch16_225"), "did you mean 'vit_base_patch16_224'"),
        (lambda: vit_mini(object()), "looks at images"),
        (lambda: hf_vit(data_of(), path="./none"), r"no folder with config\.json"),
        (lambda: tiny(weights="none.pth"), "is no file"),
    ],
)
def test_what_cannot_be_made_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make()


def test_the_hub_out_of_reach_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(OSError, match=r"--model\.weights FILE"):
        vit(data_of(), weights="hub")
