"""The plan: who trains and why, the report's counts, what is refused, and that a refusal leaves the model as it was."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.models import VOCABULARY, gpt2, llama, mlp, small_method, text_loss, tokens, train_text, vit
from torch import nn

import lowrank
from lowrank.adapters import Dense, LoRA, Merge
from lowrank.methods import Adapt, Method, Use
from lowrank.optim.rules import SGD, AdamW


def trained(plan: lowrank.Plan) -> set[str]:
    return {row.name for row in plan.rows if row.rule is not None}


class TestTheReportsCounts:
    """GPT-2 with vocabulary 50,304 and context 512: attention adapted with its biases frozen, the rest trained."""

    def model(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        with torch.device("meta"):
            return GPT2LMHeadModel(GPT2Config(vocab_size=50304, n_positions=512))

    def test_full(self) -> None:
        plan = lowrank.apply_(self.model(), lowrank.methods.full())
        assert f"{plan.parameters_trained / 1e6:.3f}" == "124.083"
        assert plan.parameters_total == plan.parameters_trained

    @pytest.mark.parametrize(
        ("heads", "rank", "millions"), [(1, 4, "95.955"), (4, 4, "96.619"), (1, 64, "99.273"), (4, 64, "109.890")]
    )
    def test_heads(self, heads: int, rank: int, millions: str) -> None:
        method = lowrank.methods.lte(
            "attention", rank=rank, heads=heads, merge_every=10, rest="train", freeze="*.attn.*.bias"
        )
        plan = lowrank.apply_(self.model(), method)
        assert f"{plan.parameters_trained / 1e6:.3f}" == millions
        assert f"{plan.parameters_trained / 1e6:.3f} M of" in str(plan)
        assert len(plan.adapters) == 24


def marked(model: nn.Module, *starts: str) -> nn.Module:
    lowrank.mark_loaded_(model, [name for name, _ in model.named_parameters() if name.startswith(starts)])
    return model


def pretrained(at: Path, *, head: bool = False) -> nn.Module:
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

    gpt2().save_pretrained(at)
    if head:
        return GPT2ForSequenceClassification.from_pretrained(at, num_labels=3, pad_token_id=0)
    return GPT2LMHeadModel.from_pretrained(at)


full, lora = lowrank.methods.full, partial(lowrank.methods.lora, rank=2)
UNTIED = lora(target_modules=("q", "lm_head"), ties="untie")
NORM, HEAD = {"norm.weight", "norm.bias"}, {"head.weight", "head.bias"}
RANDOM, PLAIN = "initialised at random", {"fc1.bias", *NORM, *HEAD}
# the model, the method, what trains beside adapters, one of its parameters, and why that one trains or does not
REST: dict[str, tuple[Callable[[Path], nn.Module], Method, set[str], str, str]] = {
    "random": (lambda _: mlp(), lora("fc1,fc2"), PLAIN, "norm.weight", RANDOM),
    "adapted": (lambda _: mlp(), lora("fc1,fc2"), PLAIN, "fc1.weight", "under an adapter"),
    "loaded": (pretrained, lora(), set(), "transformer.wte.weight", "loaded"),
    "a new head": (partial(pretrained, head=True), lora(), {"score.weight"}, "score.weight", RANDOM),
    "some are marked": (
        lambda _: marked(mlp(), "fc1", "norm.weight"),
        lora("fc2"),
        {"norm.bias", *HEAD},
        "fc1.bias",
        "loaded",
    ),
    "all are marked": (lambda _: marked(mlp(), ""), lora("fc2"), set(), "norm.bias", "loaded"),
    "an untied copy": (lambda _: marked(gpt2(), ""), UNTIED, set(), "transformer.wte.weight", "loaded"),
    "said: train": (lambda _: marked(mlp(), ""), lora("fc1,fc2", rest="train"), PLAIN, "norm.bias", "rest='train'"),
    "said: freeze": (lambda _: mlp(), lora("fc2", rest="freeze"), set(), "norm.weight", "rest='freeze'"),
    "frozen before": (lambda _: mlp().requires_grad_(False), lora("fc2"), set(), "norm.weight", "frozen before"),
}


@pytest.mark.parametrize("case", REST)
def test_what_trains_and_why(case: str, tmp_path: Path) -> None:
    build, method, expected, name, reason = REST[case]
    model = build(tmp_path)
    plan = lowrank.apply_(model, method)
    assert {name for name in trained(plan) if ".adapters." not in name} == expected
    assert any(".adapters." in name for name in trained(plan)), "also on a layer frozen before"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained(plan)
    whys = {row.name: row.why for row in plan.rows}
    assert whys[name] == reason
    if reason in (RANDOM, "loaded"):
        numbers = {name: p.numel() for name, p in model.named_parameters()}
        random, loaded = (sum(numbers[n] for n, why in whys.items() if why == w) for w in (RANDOM, "loaded"))
        assert f"{random:,} parameters {RANDOM} train, {loaded:,} loaded ones are frozen" in str(plan)


class TestFreeze:
    @pytest.mark.parametrize(
        ("freeze", "frozen"),
        [
            ("*.bias", {"fc1.bias", "norm.bias", "head.bias"}),
            ("norm", {"norm.weight", "norm.bias"}),
            ("norm.bias,head", {"norm.bias", "head.weight", "head.bias"}),
            (["fc?"], {"fc1.weight", "fc1.bias", "fc2.weight"}),
            ("head", {"head.weight", "head.bias"}),
        ],
    )
    def test_patterns(self, freeze: object, frozen: set[str]) -> None:
        model = mlp()
        plan = lowrank.apply_(model, full(freeze=freeze))  # type: ignore[arg-type]
        names = {name for name, _ in model.named_parameters()}
        assert trained(plan) == names - frozen
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen

    @pytest.mark.parametrize("build", [gpt2, llama, vit])
    def test_first_blocks(self, build: Any) -> None:
        model = build()
        plan = lowrank.apply_(model, full(freeze="first:1"))
        frozen = {row.name for row in plan.rows if row.rule is None}
        assert frozen
        assert all(".0." in name for name in frozen)
        assert all(".0." not in name or "patch" in name for name in trained(plan))

    def test_by_either_name_of_a_tied_weight(self) -> None:
        for name in ("lm_head", "wte"):
            plan = lowrank.apply_(gpt2(), full(freeze=name))
            assert "transformer.wte.weight" not in trained(plan)


class TestRules:
    def test_first_match_wins(self) -> None:
        method = Method(
            rules=(Use("*.bias", SGD(), lr=2.0), Use("head", SGD(momentum=0.9)), Use("*", AdamW())), rest="train"
        )
        plan = lowrank.apply_(mlp(), method)
        rules = {row.name: row.rule for row in plan.rows}
        assert rules["head.bias"] == rules["fc1.bias"] == SGD()
        assert rules["head.weight"] == SGD(momentum=0.9)
        assert rules["fc1.weight"] == AdamW()
        groups = plan.optimizer(lr=0.1).param_groups
        assert {(repr(g["rule"]), g["lr"] * g["lr_ratio"]) for g in groups} == {
            (repr(SGD()), 0.2),
            (repr(SGD(momentum=0.9)), 0.1),
            (repr(AdamW()), 0.1),
        }

    def test_a_part_chooses_the_factors_on_it(self) -> None:
        adapt = (Adapt(("q", "v"), LoRA(rank=2)),)
        method = Method(adapt=adapt, rules=(Use("q", SGD()), Use("*", AdamW())), rest="freeze")
        rules = {row.name: row.rule for row in lowrank.apply_(gpt2(), method).rows if row.rule}
        assert all(rule == (SGD() if ".adapters.q." in name else AdamW()) for name, rule in rules.items())
        assert len(set(map(repr, rules.values()))) == 2

    def test_a_group_chooses_the_factors_in_it(self) -> None:
        adapt = (Adapt("all-linear", LoRA(rank=2)),)
        method = Method(adapt=adapt, rules=(Use("mlp", SGD()), Use("*", AdamW())), rest="freeze")
        rules = {row.name: row.rule for row in lowrank.apply_(gpt2(), method).rows if ".adapters." in row.name}
        assert all(rule == (SGD() if ".mlp." in name else AdamW()) for name, rule in rules.items())

    def test_exclusions(self) -> None:
        method = Method(rules=(Use("*.weight", SGD(), exclude_modules="norm"), Use("*", AdamW())), rest="train")
        rules = {row.name: row.rule for row in lowrank.apply_(mlp(), method).rows}
        assert rules["fc1.weight"] == SGD()
        assert rules["norm.weight"] == rules["fc1.bias"] == AdamW()

    def test_a_rule_that_names_a_layer_trains_it(self) -> None:
        model = gpt2()
        lowrank.mark_loaded_(model)
        method = Method(adapt=(Adapt("q", LoRA(rank=2)),), rules=(Use("ln_f", SGD()), Use("*", AdamW())))
        plan = lowrank.apply_(model, method)
        assert {row.why for row in plan.rows if ".ln_f." in row.name} == {"chosen"}
        assert {n for n in trained(plan) if ".adapters." not in n} == {
            "transformer.ln_f.weight",
            "transformer.ln_f.bias",
        }


class TestSeveralAdapters:
    def test_first_match_wins(self) -> None:
        method = Method(
            adapt=(Adapt("q", LoRA(rank=1)), Adapt("attention", LoRA(rank=2)), Adapt("mlp", Dense())), rest="freeze"
        )
        plan = lowrank.apply_(gpt2(layers=1), method)
        ranks = {
            name.removeprefix("transformer.h.0."): getattr(a.config, "rank", None) for name, a in plan.adapters.items()
        }
        assert ranks == {
            "attn.c_attn.q": 1,
            "attn.c_attn.k": 2,
            "attn.c_attn.v": 2,
            "attn.c_proj": 2,
            "mlp.c_fc": None,
            "mlp.c_proj": None,
        }
        before = text_loss(plan.model, tokens())
        opt = plan.optimizer(lr=1e-2)
        for _ in range(4):
            text_loss(plan.model, tokens()).backward()
            opt.step()
            opt.zero_grad()
        assert text_loss(plan.model, tokens()) < before


def tied_by_parts() -> nn.Module:
    model = nn.Module()
    model.qkv, model.other = nn.Linear(4, 12), nn.Linear(4, 12)
    model.other.weight = model.qkv.weight
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def ruled(*uses: Use, **options: Any) -> Method:
    return Method(**{"rules": uses, "rest": "train", **options})


def adapts(*adapt: Adapt, **options: Any) -> Method:
    return Method(adapt=adapt, **options)


LORA, EVERY = LoRA(rank=2), Use("*", AdamW())
SECOND_TOO_LARGE = adapts(Adapt("attention", LORA), Adapt("mlp", LoRA(rank=20)))
SECOND_IN_VAIN = adapts(Adapt("attention", LORA), Adapt("c_proj,c_attn", LORA, "mlp"))
FACTORS_ALONE = ruled(Use("*.adapters.*", AdamW()), adapt=(Adapt("lm_head", LORA),), ties="untie")
NO_FACTOR = ruled(Use("*.adapters.*.D", AdamW()), EVERY, adapt=(Adapt("q", LORA),), rest="auto")
BLOCKS = "must be first:n with n from 1 to the model's 2 blocks"
NOTHING = "nothing would be trained: all 7 .*frozen before apply_.*requires_grad_"
REFUSED: list[tuple[Callable[[], nn.Module], Callable[[], Method], str]] = [
    # what is chosen
    (gpt2, lambda: lora("attnn"), "matched no linear layer"),
    (gpt2, lambda: lora("all-linear", rank=9), "rank=9 is above the smaller side of transformer.h.0"),
    (gpt2, lambda: SECOND_TOO_LARGE, "rank=20 is above the smaller side"),
    (gpt2, lambda: lora(("lm_head", "mlp"), rank=9, ties="untie"), "rank=9 is above"),
    (gpt2, lambda: lora("lm_head", ties="leave"), "left alone"),
    (gpt2, lambda: SECOND_IN_VAIN, "gets nothing: earlier entries"),
    (tied_by_parts, lambda: lora("qkv.q"), "qkv is tied to other.weight and cannot be adapted by parts"),
    (lambda: nn.Linear(4, 4), lambda: lora("all-linear"), r"give nn.Sequential\(model\)"),
    (encoder, lambda: lora("out_proj"), "nn.MultiheadAttention reads its weights"),
    (encoder, lambda: lora("all-linear"), "layers.0.self_attn.out_proj and 1 more cannot be adapted"),
    # what is frozen; one parameter holds q, k and v, and to freeze nothing in silence would be a trap
    (gpt2, lambda: lora("q", freeze="zzz"), "freeze='zzz' matches no parameter"),
    (mlp, lambda: full(freeze="*.biass"), r"freeze='\*.biass' matches no parameter; parameters are fc1.weight"),
    (gpt2, lambda: full(freeze="q"), "freeze='q' covers no parameter of its own"),
    *((gpt2, partial(full, freeze=f"first:{n}"), BLOCKS) for n in ("0", "3", "x", "")),
    # what trains, by which rule
    (lambda: mlp().requires_grad_(False), full, NOTHING),
    (lambda: nn.Sequential(nn.ReLU()), full, "the model has no parameters"),
    (mlp, lambda: ruled(Use("fc1", SGD())), "fc2.weight would be trained but no rule covers it; end the method's"),
    (mlp, lambda: ruled(Use("fc9", SGD()), EVERY), "Use='fc9' matched no linear layer.*did you mean 'fc"),
    (mlp, lambda: ruled(Use("fc1,fc9", SGD()), EVERY), "Use='fc9' matched no linear layer"),
    (mlp, lambda: ruled(Use("*.adapters.*.B", SGD()), EVERY), "covers no parameter of its own"),
    (mlp, lambda: ruled(Use("*", AdamW(), exclude_modules="nrm")), "exclude_modules='nrm' covers no parameter"),
    (gpt2, lambda: FACTORS_ALONE, "no rule covers it"),
    (gpt2, lambda: NO_FACTOR, "covers no parameter of its own"),
    *((mlp, partial(Use, "*", SGD(), lr=lr), "must be above 0; freeze= freezes") for lr in (0.0, -1.0, float("nan"))),
    # words
    (mlp, lambda: lora(rest="maybe"), "rest='maybe' is unknown; it is one of auto, train, freeze"),
    (mlp, lambda: lora(ties="knot"), "ties='knot' is unknown; it is one of adapt, leave, untie"),
    (mlp, lambda: Method(merge=Merge(3)), "this method has no adapters"),
]


@pytest.mark.parametrize(("build", "make", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_a_refusal_leaves_the_model_as_it_was(build: Any, make: Callable[[], Method], words: str) -> None:
    model = build()
    for p in list(model.parameters())[-1:]:
        p.requires_grad_(False)
    kinds = {name: type(m) for name, m in model.named_modules()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    needs = {name: p.requires_grad for name, p in parameters.items()}
    values, config = copy.deepcopy(model.state_dict()), copy.deepcopy(getattr(model, "config", None))
    with pytest.raises(ValueError, match=words):
        lowrank.apply_(model, make())
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys()
    assert all(after[name] is p for name, p in parameters.items())
    assert {name: p.requires_grad for name, p in after.items()} == needs
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())
    assert config is None or model.config.tie_word_embeddings == config.tie_word_embeddings
    if any(needs.values()):
        lowrank.apply_(model, full())


class TestAdaptersThatAreNeverCalled:
    @pytest.mark.parametrize("per_layer", [False, True])
    def test_named_at_the_first_step(self, per_layer: bool) -> None:
        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.seen, self.hidden = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.linear(self.seen(x), self.hidden.weight)

        model = Reads()
        plan = lowrank.apply_(model, lowrank.methods.lora("all-linear", rank=2, rest="train"))
        opt = plan.optimizer(lr=0.1, per_layer=per_layer)
        before = copy.deepcopy(model.state_dict())
        model(torch.ones(2, 4)).sum().backward()
        with pytest.raises(RuntimeError, match=r"adapters of hidden were never called in the first.*exclude_modules="):
            opt.step()
        assert opt.steps == 0
        assert per_layer or all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        lowrank.merge_and_unload(model)
        plan = lowrank.apply_(
            model.requires_grad_(True),
            lowrank.methods.lora("all-linear", rank=2, rest="train", exclude_modules="hidden"),
        )
        opt = plan.optimizer(lr=0.1)
        model(torch.ones(2, 4)).sum().backward()
        opt.step()

    def test_encoder_layer(self) -> None:
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 3, enable_nested_tensor=False
        )
        with pytest.raises(ValueError, match=r"layers.0.self_attn.out_proj and 2 more cannot be adapted"):
            lowrank.apply_(model, lowrank.methods.lora("all-linear", rank=2))
        plan = lowrank.apply_(model, lowrank.methods.lora("linear1,linear2", rank=2, rest="train"))
        opt = plan.optimizer(lr=1e-2)
        model(torch.ones(2, 3, 8)).square().sum().backward()
        opt.step()
        assert len(plan.adapters) == 6


class TestTable:
    def test_says_what_a_reader_needs(self) -> None:
        text = str(
            lowrank.apply_(gpt2(), small_method("lte", target_modules=("attention", "lm_head"), freeze="*.ln_1.*"))
        )
        for words in (
            "method lte: ",
            " M parameters train (",
            "transformer.h.*.attn.c_attn.adapters.all.A ×2",
            "under an adapter",
            "freeze=",
            "AdamW",
            "lm_head is tied to transformer.wte.weight",
            "Merge(merge_every=3)",
            "memory: weights",
            "with per-layer updates",
        ):
            assert words in text, words
        assert max(map(len, text.splitlines())) < 300

    def test_learning_rate_ratio(self) -> None:
        assert "AdamW × lr 16" in str(lowrank.apply_(gpt2(), small_method("lora_plus")))


def test_a_model_with_modules_called_adapters() -> None:
    """What belongs to an adapter is known by the adapter and not by its name."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleDict({"inner": nn.ModuleDict({"adapters": nn.Linear(4, 4)})})
            self.fc1 = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc1(self.adapters["inner"]["adapters"](x))

    model = Model()
    plan = lowrank.apply_(model, lowrank.methods.lora("fc1", rank=2, rest="freeze"))
    assert trained(plan) == {"fc1.adapters.all.A", "fc1.adapters.all.B"}
    assert plan.ledger.factors == 2 * 2 * 4 * 4


def test_binding_a_large_model_is_quick() -> None:
    """On the meta device nothing is computed, so what this takes is the plan's own work."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=24, n_embd=64, n_head=2, vocab_size=VOCABULARY))
    plan = lowrank.apply_(model, lowrank.methods.lte("all-linear", rank=2))
    assert len(plan.adapters) == 96
    assert plan.state_bytes > 0


def test_full_training_is_torchs() -> None:
    """The plan and the optimizer add nothing to plain AdamW training."""
    ours, theirs = gpt2(), gpt2()
    opt = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    losses = train_text(ours, lowrank.apply_(ours, full()).optimizer(lr=1e-2, weight_decay=0.1), 5)
    assert losses == train_text(theirs, opt, 5)


def test_an_optimizer_leaves_the_plan_as_it_is() -> None:
    """What changes between steps is each optimizer's own: of two from one plan neither sees what the other has done."""
    plan = lowrank.apply_(mlp(), lowrank.methods.lte("fc1", rank=2, heads=2, merge_every=2, overlap=True))
    before = {n: copy.copy(v) if isinstance(v, (list, dict)) else v for n, v in vars(plan).items()}
    first, second = plan.optimizer(lr=1e-2), plan.optimizer(lr=1e-2)
    assert {name: vars(plan)[name] for name in before} == before
    assert plan.synchroniser(first) is first.synchroniser
    assert plan.synchroniser(second) is second.synchroniser is not first.synchroniser
    assert plan.synchroniser() is not plan.synchroniser()
    first.synchroniser.left_out.append(1)
    assert not second.synchroniser.left_out
