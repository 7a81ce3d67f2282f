"""Adapted layers: what they take over from the originals, and what they answer for them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tests.models import features, gpt2, mlp, nudge_, output, small_method, text_loss, tokens, train_text
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank.adapters import AdaptedEmbedding, AdaptedLinear, LoRA, Site
from lowrank.adapters.adapter import shard_sizes
from lowrank.adapters.layers import is_linear, matrix_of
from lowrank.infra.checks import check_integer


def adapted(model: nn.Module, **options: object) -> nn.Module:
    lowrank.apply_(model, lowrank.methods.lora("all-linear", rank=2, rest="train", **options))  # type: ignore[arg-type]
    nudge_(model)
    return model


class TestLayer:
    def test_keys_only_grow(self) -> None:
        model = gpt2()
        before = list(model.state_dict())
        adapted(model)
        added = [key for key in model.state_dict() if key not in before]
        assert [key for key in model.state_dict() if key in before] == before
        assert all(".adapters.all." in key for key in added)
        assert "transformer.h.0.attn.c_attn.adapters.all.A" in added

    def test_state_dict_of_the_plain_model_loads(self) -> None:
        model, plain = adapted(mlp(seed=1)), mlp(seed=2)
        report = model.load_state_dict(plain.state_dict(), strict=False)
        assert not report.unexpected_keys
        assert torch.equal(model.fc1.weight, plain.fc1.weight)

    def test_answers_for_the_original(self) -> None:
        layer = adapted(mlp()).fc1
        assert (layer.in_features, layer.out_features) == (10, 14)
        assert adapted(gpt2()).transformer.h[0].attn.c_attn.nf == 24
        assert adapted(mlp()).fc2.bias is None
        with pytest.raises(AttributeError, match=r"nonsense"):
            layer.nonsense  # noqa: B018

    def test_copies_are_independent(self) -> None:
        model = adapted(mlp())
        twin = copy.deepcopy(model)
        assert torch.equal(model(features()), twin(features()))
        nudge_(twin)
        assert not torch.equal(model(features()), twin(features()))
        lowrank.merge_and_unload(twin)
        assert isinstance(model.fc1, AdaptedLinear)

    def test_copies_of_tied_layers_stay_tied(self) -> None:
        model = gpt2()
        lowrank.apply_(model, lowrank.methods.lora("lm_head", rank=2))
        twin = copy.deepcopy(model)
        assert twin.lm_head.weight is twin.transformer.wte.weight
        assert twin.lm_head.adapters["all"] is twin.transformer.wte.adapters["all"]
        assert twin.lm_head.weight is not model.lm_head.weight

    def test_pickles(self) -> None:
        model = adapted(mlp())
        assert torch.equal(pickle.loads(pickle.dumps(model))(features()), model(features()))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_moves_to_another_dtype(self, dtype: torch.dtype) -> None:
        model = adapted(mlp()).to(dtype)
        x = features().to(dtype)
        assert model(x).dtype is dtype
        torch.testing.assert_close(model(x).float(), adapted(mlp())(features()), atol=0.1, rtol=0.1)
        lowrank.merge_and_unload(model)
        assert model.fc1.weight.dtype is dtype

    def test_moves_to_meta_and_back(self) -> None:
        model = adapted(mlp()).to("meta")
        assert model(torch.empty(3, 10, device="meta")).shape == (3, 4)

    @pytest.mark.parametrize("shape", [(10,), (0, 10), (1, 10), (2, 3, 10), (2, 2, 2, 10)])
    @pytest.mark.parametrize("split", [False, True])
    def test_shapes_of_input(self, shape: tuple[int, ...], split: bool) -> None:
        """Whatever nn.Linear takes, one vector and an empty batch included; a small batch leaves heads idle."""
        model = nn.Sequential(nn.Linear(10, 6))
        make = LoRA(rank=2, heads=3, split=split)
        lowrank.apply_(model, lowrank.Method(adapt=(lowrank.Adapt("0", make),), rest="train"))
        nudge_(model)
        x = torch.randn(shape)
        y = model(x)
        assert y.shape == (*shape[:-1], 6)
        y.sum().backward()
        if len(shape) == 1:
            assert torch.equal(y, model(x[None])[0])
            assert not torch.allclose(y, F.linear(x, model[0].weight, model[0].bias))

    @pytest.mark.parametrize("parts", [("q", "v"), "all-linear"])
    def test_strided_input(self, parts: object) -> None:
        from timm.models.vision_transformer import Attention

        model = nn.ModuleDict({"attn": Attention(8, num_heads=2, qkv_bias=True)})
        lowrank.apply_(model, lowrank.methods.lora(parts, rank=2, rest="freeze"))
        nudge_(model)
        x = torch.randn(5, 3, 8)
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert not strided.is_contiguous()
        torch.testing.assert_close(model["attn"].qkv(strided), model["attn"].qkv(x))
        broad = torch.randn(1, 3, 8).expand(5, 3, 8)
        torch.testing.assert_close(model["attn"].qkv(broad), model["attn"].qkv(broad.contiguous()))

    def test_hooks_go_on_working(self) -> None:
        model, seen = mlp(), []
        handle = model.fc1.register_forward_hook(lambda module, args, y: seen.append("forward"))
        model.fc1.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
        model.fc1.register_full_backward_hook(lambda module, gx, gy: seen.append("backward"))
        adapted(model)(features()).sum().backward()
        assert seen == ["before", "forward", "backward"]
        handle.remove()
        lowrank.merge_and_unload(model)
        model.requires_grad_(True)(features()).sum().backward()
        assert seen == ["before", "forward", "backward", "before", "backward"]

    def test_repr_names_adapter_and_size(self) -> None:
        assert "10 → 14, bias=True" in repr(adapted(mlp()).fc1)
        assert "rank=2" in repr(adapted(mlp()).fc1)


class TestWhatIsLinear:
    def test_subclasses(self) -> None:
        class Renamed(nn.Linear):
            pass

        class Scaled(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)

        assert is_linear(Renamed(3, 3))
        assert is_linear(nn.MultiheadAttention(4, 2).out_proj)
        assert not is_linear(Scaled(3, 3))
        assert not is_linear(nn.Bilinear(3, 3, 3))
        assert not is_linear(nn.Embedding(3, 3))
        assert not is_linear(nn.LazyLinear(3)) or isinstance(nn.LazyLinear(3), nn.Linear)

    def test_weights_that_are_made_anew(self) -> None:
        """A change to the weight of a parametrised layer would be lost at its next call."""
        assert not is_linear(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
        assert not is_linear(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)))

    def test_conv1d(self) -> None:
        layer = gpt2().transformer.h[0].mlp.c_fc
        assert is_linear(layer)
        assert matrix_of(layer).shape == (32, 8)

    def test_site(self) -> None:
        layer = nn.Linear(3, 5)
        site = Site.of(layer)
        assert (site.in_features, site.out_features) == (3, 5)
        assert Site.of(site) is site
        with pytest.raises(TypeError, match=r"not for Conv2d"):
            LoRA(rank=1)(nn.Conv2d(1, 1, 1))
        assert LoRA(rank=1)(layer).A.shape == (1, 1, 3)


class TestSurroundings:
    """What models are wrapped in and run under."""

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("name", ["lora", "dora", "lte", "pissa"])
    def test_compile(self, name: str, backend: str) -> None:
        models = [mlp(), mlp()]
        for model in models:
            lowrank.apply_(model, small_method(name, target_modules="all-linear"))
            nudge_(model, 0.1)
            lowrank.adapters.merge_adapters_(model)
            nudge_(model, 0.1, seed=1)
        torch._dynamo.reset()
        compiled = torch.compile(models[1], backend=backend)
        outs = [models[0](features()), compiled(features())]
        torch.testing.assert_close(*outs)
        for out in outs:
            out.square().sum().backward()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)

    def test_compile_parts(self) -> None:
        torch._dynamo.reset()
        model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(4, 12)})})
        lowrank.apply_(model, lowrank.methods.lora(("q", "v"), rank=2))
        nudge_(model)
        layer, x = model["attn"]["qkv"], torch.randn(3, 4)
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))

    @pytest.mark.parametrize("name", ["lora", "dora", "lte", "frozen"])
    def test_autocast(self, name: str) -> None:
        model = gpt2()
        opt = lowrank.apply_(model, small_method(name)).optimizer(lr=1e-2)
        nudge_(model, 0.1)
        exact = output(model, tokens())
        with torch.autocast("cpu", torch.bfloat16):
            narrow = output(model, tokens())
            assert model.transformer.h[0].attn.c_attn(torch.randn(2, 8)).dtype is torch.bfloat16
            text_loss(model, tokens()).backward()
        torch.testing.assert_close(narrow.float(), exact, atol=0.05, rtol=0.1)
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        opt.step()

    def test_small_magnitudes_count_under_autocast(self) -> None:
        """bfloat16 has no gain between 1 and 1.0078: what DoRA learns must not be rounded to that."""
        layer, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(512, 64)
        lowrank.apply_(layer, lowrank.methods.dora("0", rank=1))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            before = layer(x).float()
            layer[0].adapters["all"].magnitude.mul_(1.01)
            change = layer(x).float() - before
        assert float((change * before).sum() / before.square().sum()) == pytest.approx(0.01, rel=0.1)

    @pytest.mark.parametrize("name", ["lora", "dora", "lte"])
    def test_gradient_checkpointing(self, name: str) -> None:
        models = [mlp(), mlp()]
        for model, wrap in zip(models, (False, True), strict=True):
            lowrank.apply_(model, small_method(name, target_modules="all-linear"))
            nudge_(model)
            y = checkpoint(model, features(), use_reentrant=False) if wrap else model(features())
            y.square().sum().backward()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert p.grad is None or torch.equal(p.grad, q.grad)

    def test_checkpointed_transformer_trains_per_layer(self) -> None:
        models = [gpt2(), gpt2()]
        for model, wrap in zip(models, (False, True), strict=True):
            opt = lowrank.apply_(model, small_method("lte")).optimizer(lr=1e-2, per_layer=True)
            if wrap:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            train_text(model, opt, 4)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(p, q)

    def test_encoder_layer_in_evaluation(self) -> None:
        """nn.TransformerEncoderLayer's fast path reads the weights of its layers: adapters must not be missed."""
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        model = nn.ModuleDict({"block": layer})
        lowrank.apply_(model, lowrank.methods.lora(("linear1", "linear2"), rank=2, rest="train"))
        nudge_(model)
        x = torch.randn(2, 5, 8)
        expected = layer(x)
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), expected.detach())
            lowrank.merge_and_unload(model)
            torch.testing.assert_close(layer(x), expected.detach(), atol=1e-5, rtol=1e-5)

    def test_generation(self) -> None:
        model = gpt2().eval()
        lowrank.apply_(model, small_method("lte", target_modules=("attention", "lm_head")))
        nudge_(model)
        ids = model.generate(tokens(1, 3), max_new_tokens=4, do_sample=False, pad_token_id=0)
        lowrank.merge_and_unload(model)
        assert torch.equal(model.generate(tokens(1, 3), max_new_tokens=4, do_sample=False, pad_token_id=0), ids)


def test_shard_sizes() -> None:
    assert shard_sizes(10, 4) == [3, 3, 2, 2]
    assert shard_sizes(2, 4) == [1, 1, 0, 0]
    assert shard_sizes(0, 2) == [0, 0]


def test_whole_numbers() -> None:
    assert check_integer("rank", 3) == 3
    for value in (0, -1, 2.0, True, "3", None):
        with pytest.raises(ValueError, match=r"rank=.* must be a whole number of at least 1"):
            check_integer("rank", value)


def test_a_tied_embedding_learns_nothing_from_padding() -> None:
    """As nn.Embedding's own row of ``padding_idx``, which gets no gradient."""
    embedding = nn.Embedding(6, 4, padding_idx=2)
    adapter = LoRA(rank=2)(Site("wte", embedding.weight.detach()))
    nn.init.ones_(adapter.B)
    layer = AdaptedEmbedding(embedding, {"all": adapter}, {"all": slice(0, 6)})
    layer(torch.full((3,), 2)).sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in layer.parameters())
    layer(torch.tensor([1, 2])).sum().backward()
    assert adapter.A.grad is not None
    assert adapter.A.grad.any()
    assert not embedding.weight.grad[2].any()
