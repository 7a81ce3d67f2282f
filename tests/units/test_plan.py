"""The plan: who trains and why, the report's counts, what is refused, and that a refusal leaves the model as it was."""

import copy
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


def why(plan: lowrank.Plan, name: str) -> str:
    return next(row.why for row in plan.rows if row.name == name)


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


class TestRest:
    def test_auto_trains_what_is_random(self) -> None:
        plan = lowrank.apply_(gpt2(), lowrank.methods.lora(rank=2))
        assert "transformer.wte.weight" in trained(plan)
        assert why(plan, "transformer.ln_f.weight") == "initialised at random"
        assert why(plan, "transformer.h.0.attn.c_attn.weight") == "under an adapter"
        assert "0 loaded ones are frozen" in str(plan)

    def test_auto_freezes_what_from_pretrained_loaded(self, tmp_path: Path) -> None:
        gpt2().save_pretrained(tmp_path)
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(tmp_path)
        plan = lowrank.apply_(model, lowrank.methods.lora(rank=2))
        assert all(".adapters." in name for name in trained(plan))
        assert why(plan, "transformer.wte.weight") == "loaded"

    def test_auto_trains_a_new_head_on_a_loaded_body(self, tmp_path: Path) -> None:
        from transformers import GPT2ForSequenceClassification

        gpt2().save_pretrained(tmp_path)
        model = GPT2ForSequenceClassification.from_pretrained(tmp_path, num_labels=3, pad_token_id=0)
        plan = lowrank.apply_(model, lowrank.methods.lora(rank=2))
        assert {name for name in trained(plan) if ".adapters." not in name} == {"score.weight"}
        assert why(plan, "score.weight") == "initialised at random"

    def test_auto_believes_the_marks(self) -> None:
        model = mlp()
        lowrank.mark_loaded_(model, ["fc1.weight", "fc1.bias", "norm.weight"])
        plan = lowrank.apply_(model, lowrank.methods.lora("fc2", rank=2))
        assert {name for name in trained(plan) if "adapters" not in name} == {"norm.bias", "head.weight", "head.bias"}
        model = mlp()
        lowrank.mark_loaded_(model)
        assert not {
            n for n in trained(lowrank.apply_(model, lowrank.methods.lora("fc2", rank=2))) if "adapters" not in n
        }

    def test_untied_copy_of_a_loaded_table_is_loaded(self) -> None:
        model = gpt2()
        lowrank.mark_loaded_(model)
        plan = lowrank.apply_(model, lowrank.methods.lora(rank=2, target_modules=("q", "lm_head"), ties="untie"))
        assert all(".adapters." in name for name in trained(plan))

    @pytest.mark.parametrize("rest", ["train", "freeze"])
    def test_said(self, rest: Any) -> None:
        plan = lowrank.apply_(mlp(), lowrank.methods.lora("fc2", rank=2, rest=rest))
        assert ("norm.weight" in trained(plan)) == (rest == "train")
        assert why(plan, "norm.weight") == f"rest='{rest}'"

    def test_frozen_before_stays_frozen(self) -> None:
        model = mlp()
        model.norm.requires_grad_(False)
        plan = lowrank.apply_(model, lowrank.methods.full())
        assert why(plan, "norm.weight") == "frozen before"
        assert not model.norm.weight.requires_grad

    def test_an_adapter_trains_on_a_layer_frozen_before(self) -> None:
        model = mlp().requires_grad_(False)
        plan = lowrank.apply_(model, lowrank.methods.lora("fc2", rank=2))
        assert trained(plan) == {"fc2.adapters.all.A", "fc2.adapters.all.B"}


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
        plan = lowrank.apply_(model, lowrank.methods.full(freeze=freeze))  # type: ignore[arg-type]
        names = {name for name, _ in model.named_parameters()}
        assert trained(plan) == names - frozen
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen

    @pytest.mark.parametrize("build", [gpt2, llama, vit])
    def test_first_blocks(self, build: Any) -> None:
        model = build()
        plan = lowrank.apply_(model, lowrank.methods.full(freeze="first:1"))
        frozen = {row.name for row in plan.rows if row.rule is None}
        assert frozen
        assert all(".0." in name for name in frozen)
        assert all(".0." not in name or "patch" in name for name in trained(plan))

    @pytest.mark.parametrize("freeze", ["first:0", "first:3", "first:x", "first:"])
    def test_first_blocks_are_counted(self, freeze: str) -> None:
        with pytest.raises(ValueError, match=r"must be first:n with n from 1 to the model's 2 blocks"):
            lowrank.apply_(gpt2(), lowrank.methods.full(freeze=freeze))

    def test_no_match(self) -> None:
        with pytest.raises(ValueError, match=r"freeze='\*.biass' matches no parameter; parameters are fc1.weight"):
            lowrank.apply_(mlp(), lowrank.methods.full(freeze="*.biass"))

    def test_a_part_cannot_be_frozen(self) -> None:
        """One parameter holds q, k and v: to freeze nothing in silence would be a trap."""
        with pytest.raises(ValueError, match=r"freeze='q' covers no parameter of its own"):
            lowrank.apply_(gpt2(), lowrank.methods.full(freeze="q"))

    def test_by_either_name_of_a_tied_weight(self) -> None:
        for name in ("lm_head", "wte"):
            plan = lowrank.apply_(gpt2(), lowrank.methods.full(freeze=name))
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
        assert why(plan, "transformer.ln_f.bias") == "chosen"
        assert {n for n in trained(plan) if ".adapters." not in n} == {
            "transformer.ln_f.weight",
            "transformer.ln_f.bias",
        }

    @pytest.mark.parametrize(
        ("uses", "words"),
        [
            ((Use("fc1", SGD()),), "fc2.weight would be trained but no rule covers it; end the method's rules with"),
            ((Use("fc9", SGD()), Use("*", AdamW())), "Use='fc9' matched no linear layer.*did you mean 'fc"),
            ((Use("fc1,fc9", SGD()), Use("*", AdamW())), "Use='fc9' matched no linear layer"),
            ((Use("*.adapters.*.B", SGD()), Use("*", AdamW())), "covers no parameter of its own"),
            ((Use("*", AdamW(), exclude_modules="nrm"),), "exclude_modules='nrm' covers no parameter"),
        ],
    )
    def test_errors(self, uses: tuple[Use, ...], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            lowrank.apply_(mlp(), Method(rules=uses, rest="train"))

    def test_learning_rates_are_positive(self) -> None:
        for lr in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match=r"must be above 0; freeze= freezes"):
                Use("*", SGD(), lr=lr)


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

    def test_one_that_gets_nothing_is_an_error(self) -> None:
        method = Method(adapt=(Adapt("attention", LoRA(rank=1)), Adapt("c_proj,c_attn", LoRA(rank=2), "mlp")))
        with pytest.raises(ValueError, match=r"gets nothing: earlier entries"):
            lowrank.apply_(gpt2(), method)


BAD = {
    "no match": (lambda: lowrank.methods.lora("attnn", rank=2), "matched no linear layer"),
    "rank": (lambda: lowrank.methods.lora("all-linear", rank=9), "rank=9 is above the smaller side of transformer.h.0"),
    "rank later": (
        lambda: Method(adapt=(Adapt("attention", LoRA(rank=2)), Adapt("mlp", LoRA(rank=20)))),
        "rank=20 is above the smaller side",
    ),
    "tied part": (lambda: lowrank.methods.lora("lm_head", rank=2, ties="leave"), "left alone"),
    "freeze": (lambda: lowrank.methods.lora("q", rank=2, freeze="zzz"), "freeze='zzz' matches no parameter"),
    "untie, then rank": (lambda: lowrank.methods.lora(("lm_head", "mlp"), rank=9, ties="untie"), "rank=9 is above"),
    "no rule": (
        lambda: Method(
            adapt=(Adapt("lm_head", LoRA(rank=2)),), rules=(Use("*.adapters.*", AdamW()),), ties="untie", rest="train"
        ),
        "no rule covers it",
    ),
    "rule of nothing": (
        lambda: Method(adapt=(Adapt("q", LoRA(rank=2)),), rules=(Use("*.adapters.*.D", AdamW()), Use("*", AdamW()))),
        "covers no parameter of its own",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_refusal_leaves_the_model_as_it_was(case: str) -> None:
    make, words = BAD[case]
    model = gpt2()
    model.transformer.ln_f.bias.requires_grad_(False)
    kinds = {name: type(m) for name, m in model.named_modules()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    needs = {name: p.requires_grad for name, p in parameters.items()}
    values, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config)
    with pytest.raises(ValueError, match=words):
        lowrank.apply_(model, make())
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys()
    assert all(after[name] is p for name, p in parameters.items())
    assert {name: p.requires_grad for name, p in after.items()} == needs
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())
    assert model.config.tie_word_embeddings == config.tie_word_embeddings
    lowrank.apply_(model, lowrank.methods.lora("q", rank=2))


class TestRefused:
    def test_nothing_to_train(self) -> None:
        model = mlp().requires_grad_(False)
        with pytest.raises(ValueError, match=r"nothing would be trained: all 7 .*frozen before apply_.*requires_grad_"):
            lowrank.apply_(model, lowrank.methods.full())

    def test_no_parameters(self) -> None:
        with pytest.raises(ValueError, match=r"the model has no parameters"):
            lowrank.apply_(nn.Sequential(nn.ReLU()), lowrank.methods.full())

    def test_a_model_that_is_one_layer(self) -> None:
        with pytest.raises(ValueError, match=r"give nn.Sequential\(model\)"):
            lowrank.apply_(nn.Linear(4, 4), lowrank.methods.lora("all-linear", rank=2))
        lowrank.apply_(nn.Linear(4, 4), lowrank.methods.full())

    def test_unknown_choices(self) -> None:
        with pytest.raises(ValueError, match=r"rest='maybe' is unknown; it is one of auto, train, freeze"):
            lowrank.methods.lora(rest="maybe")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"ties='knot' is unknown; it is one of adapt, leave, untie"):
            lowrank.methods.lora(ties="knot")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"this method has no adapters"):
            Method(merge=Merge(3))

    def test_tied_by_parts(self) -> None:
        model = nn.Module()
        model.qkv, model.other = nn.Linear(4, 12), nn.Linear(4, 12)
        model.other.weight = model.qkv.weight
        with pytest.raises(ValueError, match=r"qkv is tied to other.weight and cannot be adapted by parts"):
            lowrank.apply_(model, lowrank.methods.lora("qkv.q", rank=2))


class TestAdaptersThatAreNeverCalled:
    def test_attention_that_hides_its_layers(self) -> None:
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
        with pytest.raises(
            ValueError, match=r"attn.out_proj cannot be adapted: nn.MultiheadAttention reads its weights"
        ):
            lowrank.apply_(model, lowrank.methods.lora("out_proj", rank=2))

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
    losses = train_text(ours, lowrank.apply_(ours, lowrank.methods.full()).optimizer(lr=1e-2, weight_decay=0.1), 5)
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
