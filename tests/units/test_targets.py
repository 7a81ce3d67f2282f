"""Names to layers: groups on GPT-2, LLaMA and ViT, globs, names, parts, and errors that help."""

import fnmatch
import re

import pytest
import timm
import torch
import transformers
from tests.models import gpt2, llama, mlp, vit
from torch import nn

import lowrank
from lowrank.adapters import targets
from lowrank.adapters.layers import WHOLE

MODELS = {"gpt2": gpt2, "llama": llama, "vit": vit}


def chosen(model: nn.Module, pattern: object) -> list[str]:
    return [layer.label(part) for layer, part in targets.select(targets.linear_layers(model), pattern)]


@pytest.mark.parametrize(
    ("place", "group", "expected"),
    [
        ("gpt2", "all-linear", ["*.attn.c_attn", "*.attn.c_proj", "*.mlp.c_fc", "*.mlp.c_proj"]),
        ("gpt2", "attention", ["*.attn.c_attn", "*.attn.c_proj"]),
        ("gpt2", "mlp", ["*.mlp.c_fc", "*.mlp.c_proj"]),
        ("gpt2", "q", ["*.attn.c_attn.q"]),
        ("gpt2", "v", ["*.attn.c_attn.v"]),
        ("gpt2", "o", ["*.attn.c_proj"]),
        ("llama", "attention", ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"]),
        ("llama", "mlp", ["*.gate_proj", "*.up_proj", "*.down_proj"]),
        ("llama", "q", ["*.q_proj"]),
        ("llama", "o", ["*.o_proj"]),
        ("vit", "attention", ["*.attn.qkv", "*.attn.proj"]),
        ("vit", "mlp", ["*.mlp.fc1", "*.mlp.fc2"]),
        ("vit", "k", ["*.attn.qkv.k"]),
        ("vit", "o", ["*.attn.proj"]),
    ],
)
def test_groups_of_blocks(place: str, group: str, expected: list[str]) -> None:
    stack = {"gpt2": "transformer.h", "llama": "model.layers", "vit": "blocks"}[place]
    found = [name.removeprefix(stack) for name in chosen(MODELS[place](), group)]
    found = [name.partition(".")[2].partition(".")[2] for name in found]
    ends = [pattern.removeprefix("*") for pattern in expected]
    assert len(found) == 2 * len(ends)
    assert all(f".{name}".endswith(end) for name, end in zip(found, 2 * ends, strict=True)), found


def test_outputs() -> None:
    assert chosen(gpt2(), "lm_head") == chosen(gpt2(), "head") == ["lm_head"]
    assert chosen(gpt2(), "classifier") == []
    assert chosen(vit(), "classifier") == chosen(vit(), "head") == chosen(mlp(), "head") == ["head"]
    assert "head" not in chosen(vit(), "all-linear")


class Tied(nn.Module):
    """A model of one's own: its output layer is known by its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.words = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.words.weight = self.table.weight


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}
SMALL_T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
SMALL_DISTILBERT = {"vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12}
FEED_FORWARD = "*.intermediate.dense *.[0-9].output.dense"
OTHERS = {
    # architecture: its configuration; globs of its attention, its feed-forward, its output layers
    "T5ForConditionalGeneration": (SMALL_T5, "SelfAttention.[qkvo] EncDecAttention.[qkvo]", "wi wo", "lm_head"),
    "MambaForCausalLM": ({"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1}, "", "", "lm_head"),
    "RobertaForSequenceClassification": (SMALL, "attention.*", FEED_FORWARD, "classifier.*"),
    "BertForMaskedLM": (SMALL, "attention.*", FEED_FORWARD, "cls.predictions.*"),
    "DistilBertForSequenceClassification": (SMALL_DISTILBERT, "attention.*", "ffn.*", "pre_classifier classifier"),
    "ViTForImageClassification": (SMALL | {"image_size": 16, "patch_size": 8}, "attention.*", "mlp.*", "classifier"),
    "timm.convnext_atto": ({"conv_mlp": False}, "", "mlp.*", "head.fc"),
    "timm.deit_tiny_distilled_patch16_224": ({"depth": 1}, "attn.*", "mlp.*", "head head_dist"),
    "Tied": ({}, "", "", "words"),
}


def of_others(architecture: str) -> nn.Module:
    if architecture == "Tied":
        return Tied()
    if architecture.startswith("timm."):
        return timm.create_model(architecture.removeprefix("timm."), **OTHERS[architecture][0])
    kind = getattr(transformers, architecture)
    return kind(kind.config_class(**OTHERS[architecture][0]))


@pytest.mark.parametrize("architecture", OTHERS)
def test_roles_in_models_of_others(architecture: str) -> None:
    """By position and shape as well as by name; output layers are known from the model itself and never adapted."""
    model = of_others(architecture)
    names = [layer.name for layer in targets.linear_layers(model)]
    for group, globs in zip(("attention", "mlp", "head"), OTHERS[architecture][1:], strict=True):
        matching = [n for n in names if any(fnmatch.fnmatchcase(f".{n}", f"*.{glob}") for glob in globs.split())]
        assert chosen(model, group) == matching, group
    assert not set(chosen(model, "all-linear")) & set(chosen(model, "head"))


def test_a_new_output_layer_trains_beside_the_adapters() -> None:
    """RoBERTa's classifier is two layers initialised at random: neither may be frozen under an adapter."""
    model = of_others("RobertaForSequenceClassification")
    lowrank.mark_loaded_(model.roberta)
    plan = lowrank.apply_(model, lowrank.methods.lora("all-linear", rank=2))
    why = {row.name: row.why for row in plan.rows}
    assert {why[f"classifier.{name}.weight"] for name in ("dense", "out_proj")} == {"initialised at random"}
    assert not any("classifier" in name for name in plan.adapters)


def test_several_and_separated_by_commas() -> None:
    model = gpt2()
    assert chosen(model, "q,v") == chosen(model, ("q", "v")) == chosen(model, ["v", " q "])
    assert chosen(model, "q, mlp")[:3] == [
        "transformer.h.0.attn.c_attn.q",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
    ]


def test_names_and_globs() -> None:
    model = gpt2(layers=12)
    assert len(chosen(model, "c_attn")) == 12
    assert len(chosen(model, "attn.c_proj")) == 12
    assert len(chosen(model, "c_proj")) == 24
    assert chosen(model, "h.1.attn.c_attn") == ["transformer.h.1.attn.c_attn"]
    assert len(chosen(model, "*.h.[0-3].attn.*")) == 8
    assert len(chosen(model, "*.c_attn.q")) == 12
    assert chosen(model, "*.h.0.*.c_attn*") == ["transformer.h.0.attn.c_attn"]
    assert len(chosen(model, "*")) == 49


def test_a_whole_layer_covers_its_parts() -> None:
    assert chosen(gpt2(layers=1), ("attention", "q")) == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]


def test_parts_are_thirds_in_order() -> None:
    layer = next(layer for layer in targets.linear_layers(vit()) if layer.name.endswith("qkv"))
    assert [layer.rows(part) for part in "qkv"] == [slice(0, 8), slice(8, 16), slice(16, 24)]
    assert layer.rows(WHOLE) == slice(0, 24)
    assert not next(layer for layer in targets.linear_layers(llama()) if "q_proj" in layer.name).parts
    for outputs, parts in ((8, 0), (12, 3), (16, 0)):  # with fewer keys than queries, say, there are no thirds
        (layer,) = targets.linear_layers(nn.ModuleDict({"qkv": nn.Linear(4, outputs)}))
        assert len(layer.parts) == parts


def test_a_part_is_that_matrix() -> None:
    """The change on q of a fused projection is the change on a separate q."""
    fused = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    lowrank.apply_(fused, lowrank.methods.lora("q", rank=2), seed=1)
    adapter = fused["qkv"].adapters["q"]
    assert (adapter.B.shape, adapter.A.shape) == ((1, 4, 2), (1, 2, 4))
    with torch.no_grad():
        adapter.B.normal_()
    x, W = torch.randn(3, 4), fused["qkv"].weight
    torch.testing.assert_close(fused["qkv"](x)[:, :4], x @ adapter.merged(W[:4]).T + fused["qkv"].bias[:4])


class TestErrors:
    def words(self, model: nn.Module, pattern: object, **options: object) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            lowrank.apply_(model, lowrank.methods.lora(pattern, rank=2, **options))  # type: ignore[arg-type]
        return str(caught.value)

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            (
                "*.attnn.*",
                r"^target_modules='\*.attnn.\*' matched no linear layer; layers are transformer.h.0.attn.c_attn",
            ),
            ("*.attnn.*", r"did you mean '\*.attn.\*'\?"),
            ("atention", "did you mean 'attention'?"),
            ("c_atn", "did you mean 'c_attn'?"),
            (("q", "c_atn", "mlp"), r"^target_modules='c_atn' matched .*did you mean 'c_attn'"),
            ("zzz", "groups are all-linear"),
            ("ln_1,wpe", "it matched Embedding, LayerNorm, which have no matrix to adapt"),
            ("classifier", "matched no linear layer"),
            *((empty, "names nothing; give a name, a glob") for empty in ("", [], " , ")),
        ],
    )
    def test_targets(self, pattern: object, message: str) -> None:
        assert re.search(message, self.words(gpt2(), pattern))

    def test_no_linear_layer_at_all(self) -> None:
        assert "the model has no nn.Linear or Conv1D layer" in self.words(nn.Sequential(nn.LayerNorm(3)), "all-linear")

    @pytest.mark.parametrize(
        ("pattern", "excluded", "message"),
        [
            ("mlp", "zzz", "exclude_modules='zzz' matched no linear layer"),
            ("mlp", ("c_fc", "c_prj"), r"exclude_modules='c_prj' matched .*did you mean 'c_proj'"),
            ("mlp", "all-linear", "takes away all that target_modules='mlp' matched"),
            ("c_attn", "q,k,v", "exclude_modules take all that it matches"),
        ],
    )
    def test_exclusions(self, pattern: str, excluded: object, message: str) -> None:
        assert re.search(message, self.words(gpt2(), pattern, exclude_modules=excluded))

    def test_adapted_already(self) -> None:
        model = gpt2()
        lowrank.apply_(model, lowrank.methods.lora(rank=2))
        assert "carries adapters already; lowrank.merge_and_unload(model)" in self.words(model, "mlp")


def test_exclusions() -> None:
    model = gpt2()
    plan = lowrank.apply_(model, lowrank.methods.lora("attention", rank=2, exclude_modules=("k", "*.h.1.attn.c_proj")))
    assert [name.removeprefix("transformer.h.") for name in plan.adapters] == [
        "0.attn.c_attn.q",
        "0.attn.c_attn.v",
        "0.attn.c_proj",
        "1.attn.c_attn.q",
        "1.attn.c_attn.v",
    ]
