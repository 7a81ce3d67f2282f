"""A base in 4 and 8 bits: what is computed on it, what trains, what it costs, what is stored and what leaves."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.chats import saved
from torch import Tensor, nn

import lowrank
from lowrank.adapters.layers import AdaptedQuantised, adapted_layers, quantised_layers
from lowrank.cli import main
from lowrank.infra import checkpoint
from lowrank.linalg.quantised_linear import dense_weight, held, quantised
from lowrank.models.quantised import settle_quantised_
from lowrank.plan.live_bytes import FakeLiveBytes
from lowrank.recipes import find
from lowrank.run import memory_estimate as estimating
from lowrank.run.overrides import override, resolve
from lowrank.run.session import open_session, restore, task_of

pytest.importorskip("bitsandbytes")
KINDS = ("nf4", "int8")
WIDTH = 64


def fused(kind: Any) -> nn.Module:
    """A fused projection and a layer after it, both quantised."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, (inputs, outputs) in {"c_attn": (WIDTH, 3 * WIDTH), "back": (3 * WIDTH, WIDTH)}.items():
        linear = nn.Linear(inputs, outputs)
        model.add_module(name, quantised(linear, linear.weight.detach(), kind))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "targets"), [("lora", "c_attn,back"), ("dora", "q,v"), ("pissa", "c_attn")])
def test_products_and_input_gradients_are_those_of_the_codes(kind: str, method: str, targets: str) -> None:
    model = fused(kind)
    plan = lowrank.apply_(model, lowrank.METHODS[method](targets, rank=4, rest="freeze"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    kept: list[Tensor] = []
    x = torch.randn(5, 3, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    ours = torch.autograd.grad(y.square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])
    assert not any(t.is_floating_point() and t.numel() >= 3 * WIDTH * WIDTH for t in kept)

    reference = nn.Sequential()
    for name, layer in model.named_children():
        base = quantised_layers(model)[name]
        linear = nn.Linear(base.in_features, base.out_features).double()
        linear.weight.data.copy_(dense_weight(base))
        linear.bias.data.copy_(layer.bias)
        reference.add_module(name, linear)
    lowrank.apply_(reference, plan.method)
    state = {name: t for name, t in model.state_dict().items() if ".adapters." in name}
    reference.load_state_dict(state, strict=False)
    x64 = x.detach().double().requires_grad_()
    y64 = reference(x64)
    theirs = torch.autograd.grad(y64.square().sum(), [x64, *(p for p in reference.parameters() if p.requires_grad)])
    torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-5)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_model_comes_back_with_the_weights_of_the_codes(kind: str) -> None:
    model = fused(kind)
    codes = {name: dense_weight(layer) for name, layer in quantised_layers(model).items()}
    lowrank.apply_(model, lowrank.methods.lora("c_attn", rank=2, rest="freeze"))
    with pytest.raises(ValueError, match="c_attn is quantised and stays as it is"):
        lowrank.adapters.merge_adapters_(model)
    plain = lowrank.merge_and_unload(model)
    assert {type(m) for m in plain.children()} == {nn.Linear}
    assert set(plain.state_dict()) == {"c_attn.weight", "c_attn.bias", "back.weight", "back.bias"}
    for name, W in codes.items():
        torch.testing.assert_close(plain.get_submodule(name).weight, nn.Parameter(W))


@pytest.mark.parametrize("method", ["full", "galore", "lte", "relora", "lte_galore"])
def test_methods_that_train_weights_are_refused_by_name(method: str) -> None:
    model = fused("nf4")
    with pytest.raises(ValueError, match=f"{method} .* quantised weights stay as they are: use lora") as refused:
        lowrank.apply_(model, lowrank.METHODS[method]())
    assert "leave --model.quantise out" in str(refused.value)
    assert next(adapted_layers(model), None) is None


def test_a_quantised_weight_that_a_rule_names_and_an_adapter_that_needs_it_are_refused() -> None:
    named = lowrank.Method(
        adapt=(lowrank.Adapt("c_attn", lowrank.adapters.LoRA(rank=2)),),
        rules=(lowrank.Use("back", lowrank.optim.rules.AdamW()), lowrank.Use("*", lowrank.optim.rules.AdamW())),
    )
    with pytest.raises(ValueError, match=r"back\.weight is quantised and cannot be trained"):
        lowrank.apply_(fused("nf4"), named)
    dense = lowrank.Method(adapt=(lowrank.Adapt("back", lowrank.adapters.Dense(split=False)),), rest="freeze")
    with pytest.raises(ValueError, match="DenseAdapter needs the weight of back itself"):
        lowrank.apply_(fused("nf4"), dense)


def test_gradients_after_an_evaluation_are_those_before_it() -> None:
    """Also through layers without adapters: on some CPUs bitsandbytes packs their codes in an evaluation."""
    model, x = fused("nf4"), torch.randn(3, WIDTH)
    model.eval()(x)  # as somebody may have done before
    lowrank.apply_(model, lowrank.methods.lora("c_attn", rank=2, rest="freeze"))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.train()(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            model.eval()(x)
    assert len(gradients[0]) == 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=0)


def test_bytes_of_a_weight() -> None:
    layer = fused("nf4").get_submodule("c_attn")
    count = 3 * WIDTH * WIDTH
    parts = [t.nbytes for t in held(layer)]
    assert parts == [count // 2, count // 64, 64, 4, 4 * -(-count // 64 // 256), 1024]
    assert [t.nbytes for t in held(fused("int8").get_submodule("c_attn"))] == [count, 4 * 3 * WIDTH]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n} and", "completion": " light"}) + "\n" for n in range(40)))
    return file


@pytest.mark.parametrize(("kind", "method"), [("nf4", "lora"), ("int8", "dora")])
def test_the_ledger_is_that_of_the_model_as_loaded(model: Path, kind: str, method: str) -> None:
    given = {"model.path": str(model), "model.quantise": kind, "method": method, "data": "x", "device": "cpu"}
    run = resolve(override(find("finetune"), given))
    session = open_session(run, data=task_of(run).stand_in(run)[0])
    sheet = estimating._estimated(run, FakeLiveBytes, on_card=False)
    assert sheet.static["weights"] == session.plan.ledger.weights
    assert sheet.parameters == session.plan.parameters_total
    assert sum(sheet.static.values()) == session.plan.ledger.total - session.plan.ledger.gradients
    layers = quantised_layers(session.model)
    every = sum(t.nbytes for t in (*session.model.parameters(), *session.model.buffers()))
    scales = sum(t.nbytes for layer in layers.values() for t in list(held(layer))[1:])
    assert session.plan.ledger.weights + session.plan.ledger.factors + session.plan.kept_bytes == every + scales


SHORT = ("--device", "cpu", "--steps", "4", "--batch-size", "2", "--warmup", "0", "--lr", "1e-2", "--method.rank", "2")


def test_a_run_from_first_step_to_export(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = tmp_path / "base"
    base.symlink_to(model)
    args = ["train", "finetune", "--model.path", str(base), "--data", str(data), "--model.quantise", "nf4", *SHORT]
    assert main([*args, "--out", str(tmp_path / "whole")]) == 0
    assert main([*args, "--out", str(tmp_path / "run"), "--stop-at", "2"]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--stop-at", "none"]) == 0
    found = [checkpoint.latest(tmp_path / name / "checkpoints") for name in ("whole", "run")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (found[0] / name).read_bytes() == (found[1] / name).read_bytes()
    with safe_open(found[0] / "model.safetensors", "pt") as tensors:
        assert all(".adapters." in name for name in list(tensors.keys()))
    assert checkpoint.load(found[0]).meta["base"]["place"] == str(base)

    run = str(tmp_path / "run")
    for command in (["eval", run], ["generate", run, "--prompt", "1", "--tokens", "2"]):
        assert main([*command, "--device", "cpu"]) == 0
    session, _ = restore(Path(run), "latest", device="cpu")
    assert any(isinstance(m, AdaptedQuantised) for m in session.model.modules())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours = session.model(ids).logits
    assert main(["export", run, "--adapter", str(tmp_path / "peft"), "--format", "peft", "--checkpoint", "latest"]) == 0
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    settle_quantised_(theirs)  # in evaluation, some CPUs' kernels refuse sizes that are no multiples of 32
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-4, atol=1e-5)

    assert main(["export", run, "--adapter", str(tmp_path / "ours"), "--checkpoint", "latest"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["export", run, str(tmp_path / "plain"), "--checkpoint", "latest"]) == 0
    assert "the base was quantised: plain weights are written" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "merged")]) == 0
    for folder in ("plain", "merged"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        assert not hasattr(plain.config, "quantization_config")
        with torch.no_grad():
            torch.testing.assert_close(plain(ids).logits, ours, rtol=1e-4, atol=1e-5)

    base.unlink()
    shutil.copytree(model, base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert main(["eval", run]) == 2
    assert f"the base {base} is not what it was" in capsys.readouterr().err.replace("\n", " ")


def test_models_that_were_loaded_so(model: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    given = AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
    given.save_pretrained(tmp_path / "small")
    for file in model.glob("*token*"):
        (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
    plan = lowrank.apply_(given, lowrank.methods.lora("all-linear", rank=2))
    assert {row.why for row in plan.rows if row.name.endswith("q_proj.weight")} == {"under an adapter"}
    optimizer = plan.optimizer(lr=1e-2)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = given(ids, labels=ids).loss
    before.backward()
    optimizer.step()
    assert given(ids, labels=ids).loss < before
    args = ["train", "finetune", "--model.path", str(tmp_path / "small"), "--data", str(data), *SHORT]
    assert main([*args, "--out", str(tmp_path / "run"), "--method.target_modules", "q_proj"]) == 0
    assert {row.why for row in restore(tmp_path / "run")[0].plan.rows if "v_proj" in row.name} == {"quantised"}
    assert main(["plan", *args[1:4], "--data", "x"]) == 0
    assert main([*args, "--out", str(tmp_path / "again"), "--model.quantise", "int8"]) == 2
    assert main([*args, "--out", str(tmp_path / "again"), "--method", "galore"]) == 2


def test_without_the_library_the_extra_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    given = ["--model.path", str(model), "--model.quantise", "nf4", "--data", "x"]
    assert main(["plan", "finetune", *given]) == 2
    assert "pip install 'lowrank-training[quantised]'" in capsys.readouterr().err
