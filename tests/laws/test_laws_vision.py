"""The laws on vision transformers: timm's with its fused qkv, transformers' with separate layers, patch embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tests.models import images, nudge_, output, small_method, vit
from torch import Tensor, nn

import lowrank
from lowrank.adapters import AdaptedLayer
from lowrank.plan.plan import merge_


def hf_vit(seed: int = 0) -> nn.Module:
    """transformers' ViT of the smallest sort: q, k, v and o apart, a convolution on patches."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **shape, **drop))


MODELS = {"timm": vit, "transformers": hf_vit}
TARGETS = "attention,mlp,patch_embed"
CASES = [pytest.param(name, place, id=f"{name}-{place}") for name in lowrank.METHODS for place in MODELS]


def method_of(name: str) -> lowrank.Method:
    known = inspect.signature(lowrank.METHODS[name]).parameters
    adapts = "dropout" in known
    return small_method(name, **({"target_modules": TARGETS} if adapts else {}))


def bound(name: str, place: str, **options: object) -> tuple[nn.Module, lowrank.Plan, lowrank.Optimizer]:
    model = MODELS[place]()
    plan = lowrank.apply_(model, method_of(name), seed=1)
    return model, plan, plan.optimizer(lr=5e-3, weight_decay=0.1, **options)  # type: ignore[arg-type]


def loss_of(model: nn.Module, step: int) -> Tensor:
    return F.cross_entropy(output(model, images(6, seed=step % 3)), torch.arange(6) % 3)


def train(model: nn.Module, opt: lowrank.Optimizer, steps: range) -> list[float]:
    model.train()
    losses = []
    for step in steps:
        loss = loss_of(model, step)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def evaluated(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output(model.eval(), images(5, seed=9))


def tensors(nest: dict[str, object]) -> Iterator[Tensor]:
    for value in nest.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors(value)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_laws_1_and_2_fresh_changes_nothing_and_unloading_gives_the_plain_model(name: str, place: str) -> None:
    plain = MODELS[place]()
    model, _, opt = bound(name, place)
    torch.testing.assert_close(evaluated(model), evaluated(plain), rtol=0, atol=1e-6)
    train(model, opt, range(4))  # past a merge at 3
    nudge_(model, 0.1)
    expected = evaluated(model)
    lowrank.merge_and_unload(model)
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}
    torch.testing.assert_close(evaluated(model), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("place", MODELS)
@pytest.mark.parametrize("name", ["lte", "lte_galore", "relora"])
def test_law_3_a_merge_conserves_the_mean_model(name: str, place: str) -> None:
    model, plan, opt = bound(name, place, merge="manual")
    train(model, opt, range(4))
    before = evaluated(model)
    merge_(plan, opt)
    torch.testing.assert_close(evaluated(model), before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("place", MODELS)
@pytest.mark.parametrize("name", ["galore", "fira", "apollo"])
def test_law_4_at_full_rank_a_projection_is_its_inner_rule(name: str, place: str) -> None:
    options = {"rank": 1000, "scale": 1.0, "target_modules": "all-linear"}
    model = MODELS[place]()
    plan = lowrank.apply_(model, lowrank.METHODS[name](**options))
    other = MODELS[place]()
    full = lowrank.apply_(other, lowrank.methods.full())
    ours = train(model, plan.optimizer(lr=1e-3, weight_decay=0.1), range(4))
    assert ours == pytest.approx(train(other, full.optimizer(lr=1e-3, weight_decay=0.1), range(4)), abs=1e-6)


@pytest.mark.parametrize("place", MODELS)
def test_law_5_merging_every_step_on_one_batch_is_multi_head_lora(place: str) -> None:
    shared = {"target_modules": TARGETS, "rank": 2, "heads": 3, "alpha": 8, "rest": "freeze"}
    model, other = MODELS[place](), MODELS[place]()
    lte = lowrank.apply_(model, lowrank.methods.lte(merge_every=1, **shared), seed=1)
    heads = lowrank.apply_(other, lowrank.methods.multihead_lora(**shared), seed=1)
    opts = lte.optimizer(lr=1e-2), heads.optimizer(lr=1e-2)
    x, y = images(2), torch.tensor([0, 2])
    for _ in range(3):
        a = F.cross_entropy(output(model, x.repeat(3, 1, 1, 1)), y.repeat(3))
        b = F.cross_entropy(output(other, x), y)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        for loss, opt in zip((a, b), opts, strict=True):
            loss.backward()
            opt.step()
            opt.zero_grad()


@pytest.mark.parametrize(("name", "place"), CASES)
def test_law_6_per_layer_equals_ordinary(name: str, place: str) -> None:
    model, _, opt = bound(name, place)
    other, _, per_layer = bound(name, place, per_layer=True)
    assert train(model, opt, range(4)) == train(other, per_layer, range(4))
    for (key, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize(("name", "place"), CASES)
def test_law_7_stop_and_resume(name: str, place: str) -> None:
    whole, _, opt = bound(name, place)
    expected = train(whole, opt, range(8))
    first, _, opt_first = bound(name, place)
    losses = train(first, opt_first, range(4))
    second, _, opt_second = bound(name, place)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    opt_second.load_state_dict(opt_first.state_dict())
    assert losses + train(second, opt_second, range(4, 8)) == expected


@pytest.mark.parametrize(("name", "place"), CASES)
def test_laws_8_9_and_10_one_rule_each_bytes_as_told_and_the_loss_falls(name: str, place: str) -> None:
    model, plan, opt = bound(name, place)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    grouped = [p for group in opt.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    losses = train(model, opt, range(15))
    assert sum(losses[-3:]) < sum(losses[:3])
    assert sum(t.numel() * t.element_size() for t in tensors(opt.state_dict()["state"])) == plan.state_bytes
    merges = plan.method.merge is not None
    for row in plan.rows:
        if row.rule is None and not (merges and row.why == "under an adapter"):
            assert torch.equal(dict(model.named_parameters())[row.name], before[row.name]), row.name


def test_a_fused_qkv_adapts_as_separate_layers_do() -> None:
    """The same factors on parts of one matrix and on three matrices: the same function and the same gradients."""
    fused = vit().double()  # the sums of a small layer and of a part are in different orders
    attention = fused.blocks[0].attn
    apart = {part: nn.Linear(8, 8).double() for part in "qkv"}
    for i, layer in enumerate(apart.values()):
        layer.load_state_dict(
            {"weight": attention.qkv.weight[8 * i : 8 * i + 8], "bias": attention.qkv.bias[8 * i : 8 * i + 8]}
        )
    separate = nn.ModuleDict({f"{part}_proj": layer for part, layer in apart.items()})
    lowrank.apply_(attention, lowrank.methods.lora(target_modules="*qkv.q,*qkv.v", rank=2, rest="freeze"))
    lowrank.apply_(separate, lowrank.methods.lora(target_modules="q_proj,v_proj", rank=2, rest="freeze"))
    noise = torch.Generator().manual_seed(3)
    for part in "qv":
        ours, theirs = attention.qkv.adapters[part], separate[f"{part}_proj"].adapters["all"]
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.data = b.data = torch.randn(a.shape, generator=noise, dtype=a.dtype)
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    y = attention.qkv(x)
    z = torch.cat([separate[f"{part}_proj"](x) for part in "qkv"], dim=-1)
    torch.testing.assert_close(y, z)
    weight = torch.randn(y.shape, dtype=y.dtype)
    (y * weight).sum().backward()
    (z * weight).sum().backward()
    for part in "qv":
        ours, theirs = attention.qkv.adapters[part], separate[f"{part}_proj"].adapters["all"]
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_a_patch_embedding_is_the_linear_map_that_it_is(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 10, (4, 2), stride=(4, 2), bias=bias))
    x, plain = torch.randn(2, 3, 9, 8), model[0]  # a row of pixels is left over
    expected = plain(x)
    lowrank.apply_(model, lowrank.methods.lora(target_modules="patch_embed", rank=2))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[0]), expected[0])
    nudge_(model)
    changed = model(x)
    assert not torch.allclose(changed, expected)
    lowrank.merge_and_unload(model)
    assert model[0] is plain
    torch.testing.assert_close(model(x), changed)


def test_convolutions_that_overlap_or_pad_are_no_patch_embeddings() -> None:
    for options in (
        {"stride": 1},
        {"stride": 3, "padding": 1},
        {"stride": 3, "dilation": 2},
        {"stride": 3, "groups": 3},
    ):
        with pytest.raises(ValueError, match="matched no linear layer"):
            lowrank.apply_(
                nn.Sequential(nn.Conv2d(3, 6, 3, **options)), lowrank.methods.lora(target_modules="0", rank=2)
            )


def test_multi_head_attention_is_refused_by_name_with_the_remedy() -> None:
    def model() -> nn.Module:
        return nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )

    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.out_proj and 1 more.*exclude_modules='out_proj'"):
        lowrank.apply_(model(), lowrank.methods.lora(target_modules="all-linear", rank=2))
    with pytest.raises(ValueError, match=r"nn\.MultiheadAttention hides q, k and v"):
        lowrank.apply_(model(), lowrank.methods.lora(target_modules="q", rank=2))
    spared = lowrank.methods.lora(target_modules="all-linear", exclude_modules="out_proj", rank=2)
    assert len(lowrank.apply_(model(), spared).adapters) == 4


def test_counts_are_the_papers() -> None:
    """MeLo: rank 4 on q and v of ViT-B, 0.147 M numbers."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=9)
    lowrank.mark_loaded_(model, [n for n, _ in model.named_parameters() if not n.startswith("head.")])
    plan = lowrank.apply_(model, lowrank.methods.lora(rank=4))
    assert plan.parameters_trained == 12 * 2 * (768 * 4 + 4 * 768) + 9 * 768 + 9
