"""Adapters of PEFT, both ways: the installed library and ours compute the same from one folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import gpt2, images, llama, mlp, nudge_, output, tokens, vit
from tests.runs.tiny import tiny
from torch import Tensor, nn

import lowrank
from lowrank.cli import main
from lowrank.interop import AdapterBank, read_peft, write_peft
from lowrank.run.session import open_session, restore
from lowrank.train.loop import train

peft = pytest.importorskip("peft")

BASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "gpt2": (gpt2, tokens),
    "llama": (llama, tokens),
    "vit": (vit, images),
}


def say(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return output(model.eval(), x)


def opened(model: nn.Module, folder: Path) -> nn.Module:
    """The folder as PEFT opens it."""
    return peft.PeftModel.from_pretrained(model, folder)


# --- ours, opened by PEFT --------------------------------------------------------------------------------------------

WRITTEN: dict[str, lowrank.Method] = {
    "lora": lowrank.methods.lora(rank=2, alpha=5, rest="freeze"),
    "lora of all": lowrank.methods.lora("all-linear", rank=2, rest="freeze"),
    "rslora": lowrank.methods.rslora("mlp", rank=3, rest="freeze"),
    "dora": lowrank.methods.dora(rank=2, rest="freeze"),
    "dora of parts": lowrank.methods.dora("q", rank=2, rest="freeze"),
    "pissa": lowrank.methods.pissa(rank=2, rest="freeze"),
    "lora_plus": lowrank.methods.lora_plus(rank=2, rest="freeze"),
    "heads": lowrank.methods.multihead_lora("q,v,mlp", rank=2, heads=2, rest="freeze"),
    "some blocks": lowrank.methods.lora("*.0.*", rank=1, rest="freeze"),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", WRITTEN)
def test_peft_computes_what_was_written(tmp_path: Path, name: str, base: str) -> None:
    make, x = BASES[base]
    model = make()
    plan = lowrank.apply_(model, WRITTEN[name])
    nudge_(model)
    write_peft(plan, tmp_path)
    ours = say(model, x())
    assert not torch.allclose(ours, say(make(), x()), atol=1e-5)
    torch.testing.assert_close(say(opened(make(), tmp_path), x()), ours, rtol=1e-5, atol=1e-5)
    bank = AdapterBank(make())
    bank.add("again", *read_peft(tmp_path, bank.model))
    torch.testing.assert_close(say(bank.use("again"), x()), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_what_else_was_trained_travels_too(tmp_path: Path, base: str) -> None:
    """Norms, biases, embeddings and the output layer, tied ones too."""
    make, x = BASES[base]
    model = make()
    freeze = ("cls_token", "pos_embed") if base == "vit" else ()
    plan = lowrank.apply_(model, lowrank.methods.lora(rank=2, rest="train", freeze=freeze))
    nudge_(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1
    write_peft(plan, tmp_path)
    torch.testing.assert_close(say(opened(make(), tmp_path), x()), say(model, x()), rtol=1e-5, atol=1e-5)
    bank = AdapterBank(make())
    bank.add("again", *read_peft(tmp_path, bank.model))
    torch.testing.assert_close(say(bank.use("again"), x()), say(model, x()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ties", ["adapt", "leave"])
def test_the_output_layer_of_a_tied_embedding(tmp_path: Path, ties: Any) -> None:
    """Both are adapted, which PEFT says twice; or the output layer alone."""
    model = gpt2()
    plan = lowrank.apply_(model, lowrank.methods.lora("lm_head,mlp", rank=2, rest="freeze", ties=ties))
    nudge_(model)
    write_peft(plan, tmp_path)
    expected = say(model, tokens())
    torch.testing.assert_close(say(opened(gpt2(), tmp_path), tokens()), expected, rtol=1e-5, atol=1e-5)
    bank = AdapterBank(gpt2())
    bank.load(tmp_path, "again")
    torch.testing.assert_close(say(bank.use("again"), tokens()), expected, rtol=1e-5, atol=1e-5)


def test_half_of_a_tie_is_refused(tmp_path: Path) -> None:
    """PEFT adapts the embedding alone, and leaves the output layer that has the same weights."""
    trained(gpt2, tmp_path, target_modules=["wte"])
    with pytest.raises(ValueError, match=r"changes transformer\.wte and not lm_head.weight, which is the same"):
        read_peft(tmp_path, gpt2())
    untied = AdapterBank(gpt2(tied=False))
    theirs = trained(lambda: gpt2(tied=False), tmp_path, target_modules=["wte", "c_fc"])
    untied.load(tmp_path, "theirs")
    torch.testing.assert_close(say(untied.use("theirs"), tokens()), say(theirs, tokens()), rtol=1e-5, atol=1e-5)


def test_patches_and_whole_names(tmp_path: Path) -> None:
    """A patch embedding is a convolution to PEFT; layers whose names end alike are told apart."""
    for number, targets in enumerate((("patch_embed",), ("patch_embed", "blocks.1.mlp.fc1"))):
        model = vit()
        plan = lowrank.apply_(model, lowrank.methods.lora(targets, rank=2, rest="freeze"))
        nudge_(model)
        write_peft(plan, tmp_path / str(number))
        torch.testing.assert_close(say(opened(vit(), tmp_path / str(number)), images()), say(model, images()))


REFUSED: dict[str, tuple[Callable[[], nn.Module], lowrank.Method, str]] = {
    "merged": (gpt2, lowrank.methods.lte(rank=2, heads=2), "lte merges its factors into the weights"),
    "no adapter": (gpt2, lowrank.methods.galore(rank=2), "galore has no adapter"),
    "tied": (gpt2, lowrank.methods.dora("lm_head", rank=2), "is tied to a layer with DoRA"),
    "parameters alone": (vit, lowrank.methods.lora(rank=2, rest="train"), "cls_token, pos_embed is not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_say_is_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    make, method, says = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        write_peft(lowrank.apply_(make(), method), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_adapter_of_a_run_is_exported_for_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny("pissa"), tmp_path / "run", quiet=True)
    words = ["export", str(tmp_path / "run"), "--adapter", str(tmp_path / "out"), "--format"]
    assert main([*words, "peft"]) == 0
    assert capsys.readouterr().out.endswith("for PEFT\n")
    session, _ = restore(tmp_path / "run")
    expected = say(session.model, tokens())
    plain = say(lowrank.merge_and_unload(session.model), tokens())
    base = open_session(session.run).model
    theirs = opened(lowrank.merge_and_unload(open_session(session.run).model), tmp_path / "out")
    assert not torch.allclose(say(base, tokens()), expected, atol=1e-3)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(say(theirs, tokens()), expected, rtol=1e-5, atol=1e-5)
    for form, says in (("peft", "out is not empty"), ("x", "--format is lowrank or peft")):
        assert main([*words, form]) == 2
        assert says in capsys.readouterr().err


# --- PEFT's, read by us ----------------------------------------------------------------------------------------------

READ: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 5},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "heads and norms": {"modules_to_save": ["norm", "ln_f"]},
    "patterns": {"rank_pattern": {"1.mlp.*": 3}, "alpha_pattern": {"1.*": 7}},
    "biases": {"bias": "lora_only"},
}
TARGETS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj"], "vit": ["qkv", "fc1", "head"]}


def trained(make: Callable[[], nn.Module], folder: Path, **config: Any) -> nn.Module:
    """A model that PEFT adapted, trained (at random) and saved."""
    torch.manual_seed(0)
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, **config))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", READ)
def test_what_peft_wrote_computes_the_same_here(tmp_path: Path, kind: str, base: str) -> None:
    make, x = BASES[base]
    theirs = trained(make, tmp_path, target_modules=TARGETS[base], **READ[kind])
    bank = AdapterBank(make())
    plain = say(bank.model, x())
    bank.add("theirs", *read_peft(tmp_path, bank.model))
    expected = say(theirs, x())
    assert not torch.allclose(expected, plain, atol=1e-3)
    torch.testing.assert_close(say(bank.use("theirs"), x()), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(say(bank.use(None), x()), plain)


def changed(folder: Path, **config: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def without(folder: Path, end: str, **more: Tensor) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if not n.endswith(end)} | more, file)


SPOILT: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "kind": (lambda f: changed(f, peft_type="LOHA"), ValueError, "peft_type=LOHA cannot be expressed; LoRA, rsLoRA"),
    "switch": (lambda f: changed(f, lora_bias=True), ValueError, "lora_bias cannot be expressed"),
    "start": (lambda f: changed(f, init_lora_weights="olora"), ValueError, "'olora', for which PEFT changes the base"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "has no adapter_config.json"),
    "half a config": (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "json cannot be read"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "has no adapter_model"),
    "half weights": (lambda f: (f / "adapter_model.safetensors").write_text("x"), ValueError, "weights cannot be read"),
    "a factor less": (lambda f: without(f, "fc1.lora_B.weight"), ValueError, "fc1 has A, and needs A, B"),
    "another model": (lambda f: without(f, "?", **{"x.lora_A.weight": torch.ones(1)}), ValueError, "has no x"),
    "another shape": (
        lambda f: without(f, "?", **{"base_model.model.fc1.lora_A.weight": torch.ones(2, 3)}),
        ValueError,
        r"\(2, 3\) and \(14, 2\) do not fit fc1",
    ),
    "something else": (
        lambda f: without(f, "?", **{"x.lora_other_A": torch.ones(1)}),
        ValueError,
        "adapts something else than a linear layer: x.lora_other_A",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_folders_that_cannot_be_read_are_refused_by_name(tmp_path: Path, case: str) -> None:
    trained(mlp, tmp_path, target_modules=["fc1"])
    spoil, error, says = SPOILT[case]
    spoil(tmp_path)
    with pytest.raises(error, match=says) as caught:
        read_peft(tmp_path, mlp())
    assert str(tmp_path) in str(caught.value)
