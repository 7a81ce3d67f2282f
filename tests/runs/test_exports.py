"""Exports, opened by a clean process that has the libraries they are for and not this package; its outputs are ours."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.images import medmnist_file
from tests.models import output
from tests.runs.tiny import TEXT, tiny
from torch import Tensor, nn

from lowrank.cli import main
from lowrank.data.text.tokenizers import train_bpe
from lowrank.evaluate.export import _name_classes
from lowrank.evaluate.score import score
from lowrank.run.run import Call
from lowrank.run.session import restore
from lowrank.train.loop import train

SAMPLES = ["Licensed under the Apache License, Version 2.0\n\n  (the  License)", "a\tb", "Copyright 1999 [yyyy]"]
WIDE = ["höhe, 高さ, 😀 and \u0000 and \r\n"]
IDS = list(range(2, 12))

CLEAN = """
import json, sys, warnings
import torch, timm, peft
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, GenerationConfig
root, samples = sys.argv[1], json.loads(sys.argv[2])
ids = torch.tensor([json.loads(sys.argv[3])])
made, told = {}, {}
for name in ("bytes", "chars", "bpe", "own"):
    with torch.no_grad():
        made[name] = AutoModelForCausalLM.from_pretrained(f"{root}/{name}").eval()(ids).logits
    t = AutoTokenizer.from_pretrained(f"{root}/{name}")
    texts = samples[name]
    told[name] = {"ids": [t(text, add_special_tokens=False).input_ids for text in texts], "eos": t.eos_token_id,
        "text": [t.decode(t(text, add_special_tokens=False).input_ids) for text in texts], "size": len(t),
        "pad": t.padding_side, "template": t.chat_template, "longest": t.model_max_length,
        "added": sorted(str(token) for token in t.added_tokens_decoder.values())}
told["own"]["generation"] = GenerationConfig.from_pretrained(f"{root}/own").to_diff_dict()
made["images"] = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
for name in ("vit", "timm", "hf"):
    kind = AutoModelForImageClassification if name == "hf" else timm
    place = f"{root}/hf" if name == "hf" else f"local-dir:{root}/{name}"
    model = (kind.from_pretrained(place) if name == "hf" else timm.create_model(place, pretrained=True)).eval()
    with torch.no_grad():
        made[name] = model(made["images"])
    if name == "hf":
        made[name] = made[name].logits
        told[name] = {"labels": list(model.config.id2label.values())}
    else:
        told[name] = {"labels": model.pretrained_cfg["label_names"], "mean": model.pretrained_cfg["mean"]}
with torch.no_grad():
    base = AutoModelForCausalLM.from_pretrained(f"{root}/base")
    made["peft"] = peft.PeftModel.from_pretrained(base, f"{root}/adapter").eval()(ids).logits
saved = torch.load(f"{root}/nano/ckpt.pt", weights_only=True)
told["nano"] = saved["model_args"]
F, w, n = torch.nn.functional, saved["model"], saved["model_args"]["n_head"]
def linear(x, name):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
def norm(x, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])
x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]
for i in range(saved["model_args"]["n_layer"]):
    h = f"transformer.h.{i}"
    parts = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, 2)
    q, k, v = (t.unflatten(2, (n, -1)).transpose(1, 2) for t in parts)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + linear(mixed.transpose(1, 2).flatten(2), f"{h}.attn.c_proj")
    x = x + linear(F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
made["nano"] = F.linear(norm(x, "transformer.ln_f"), w["lm_head.weight"])
assert not [name for name in sys.modules if name.split(".")[0] == "lowrank"]
save_file({name: t.clone().contiguous() for name, t in made.items()}, f"{root}/made.safetensors")
open(f"{root}/told.json", "w").write(json.dumps(told, default=str))
"""


def say(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return output(model.eval(), x)


def own_model(folder: Path) -> None:
    """A model whose tokenizer has a chat template, added tokens, a padding side, and a way to generate of its own."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    train_bpe(300, [TEXT.read_text()]).save(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    (folder / "lowrank_tokenizer.json").unlink()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"], "pad_token": "<|pad|>"})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": len(tokenizer)}
    model: Any = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    model.generation_config.update(do_sample=True, top_p=0.7, repetition_penalty=1.1)
    model.save_pretrained(folder)


def hf_vit_model(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(image_size=28, patch_size=14, num_labels=3, **shape)).save_pretrained(folder)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The folder with runs and exports, and what the clean process made of the exports."""
    root = tmp_path_factory.mktemp("exports")
    (root / "base").mkdir()
    own_model(root / "base")
    image_file = medmnist_file(root / "pneumoniamnist.npz")
    for kind in ("bytes", "chars", "bpe:300"):
        train(tiny("full", data__tokenizer=kind, steps=2), root / f"run-{kind.partition(':')[0]}", quiet=True)
    run = replace(tiny("lora", data__tokenizer=str(root / "base"), steps=4, lr=1e-2), warmup=0.0)
    train(replace(run, model=Call(name="pretrained", args={"path": str(root / "base")})), root / "run-own", quiet=True)
    small = ["--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.patch_size", "14"]
    words = ["train", "vit-mini", "--data", str(image_file), "--steps", "2", "--batch-size", "8", *small]
    assert main([*words, "--out", str(root / "run-vit"), "--quiet"]) == 0
    by_name = ["--model", "vit", "--model.name", "deit3_small_patch16_224", "--model.image_size", "28", *small]
    assert main([*words[:8], *by_name, "--out", str(root / "run-timm"), "--quiet"]) == 0
    hf_vit_model(root / "hf-base")
    theirs = ["--model", "hf-vit", "--model.path", str(root / "hf-base")]
    assert main([*words[:8], *theirs, "--out", str(root / "run-hf"), "--quiet"]) == 0
    for name in ("bytes", "chars", "bpe", "own", "vit", "timm", "hf"):
        assert main(["export", str(root / f"run-{name}"), str(root / name)]) == 0
    assert main(["export", str(root / "run-bytes"), str(root / "nano"), "--format", "nanogpt"]) == 0
    words = ["export", str(root / "run-own"), "--adapter", str(root / "adapter"), "--format", "peft"]
    assert main(words) == 0
    samples = {name: SAMPLES + ([] if name == "chars" else WIDE) for name in ("bytes", "chars", "bpe", "own")}
    samples["chars"] = [text for text in SAMPLES if not set(text) - set(TEXT.read_text())]
    command = [sys.executable, "-W", "ignore", "-c", CLEAN, str(root), json.dumps(samples), json.dumps(IDS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=_without_us(), check=False)
    assert done.returncode == 0, done.stderr
    return root, load_file(root / "made.safetensors"), json.loads((root / "told.json").read_text())


def _without_us() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


Opened = tuple[Path, dict[str, Tensor], dict[str, Any]]


@pytest.mark.parametrize("name", ["bytes", "chars", "bpe", "own"])
def test_a_language_model_and_its_tokenizer(opened: Opened, name: str) -> None:
    root, made, told = opened
    session, _ = restore(root / f"run-{name}")
    torch.testing.assert_close(made[name], say(session.model, torch.tensor([IDS])), rtol=1e-5, atol=1e-5)
    ours, theirs = session.data.tokenizer, told[name]
    samples = SAMPLES + ([] if name == "chars" else WIDE)
    if name == "chars":
        samples = [text for text in SAMPLES if not set(text) - set(TEXT.read_text())]
    assert samples
    assert theirs["ids"] == [ours.encode(text) for text in samples]
    assert theirs["text"] == samples
    assert theirs["eos"] == ours.end_of_document
    assert theirs["size"] == ours.vocab_size


def test_everything_that_a_tokenizer_came_with(opened: Opened) -> None:
    told = opened[2]["own"]
    assert told["pad"] == "left"
    assert told["template"].startswith("{% for m in messages %}")
    assert told["added"] == ["<|endoftext|>", "<|pad|>", "<|user|>"]
    assert (told["generation"]["top_p"], told["generation"]["repetition_penalty"]) == (0.7, 1.1)
    assert opened[2]["bytes"]["longest"] == opened[2]["chars"]["longest"] == 16


def test_an_adapter_of_a_run(opened: Opened) -> None:
    root, made, _ = opened
    torch.testing.assert_close(made["peft"], made["own"], rtol=1e-5, atol=1e-5)
    assert not torch.equal(made["peft"], say(restore(root / "run-bpe")[0].model, torch.tensor([IDS])))


@pytest.mark.parametrize("name", ["vit", "timm", "hf"])
def test_a_vision_transformer_by_its_library(opened: Opened, name: str) -> None:
    root, made, told = opened
    session, _ = restore(root / f"run-{name}")
    torch.testing.assert_close(made[name], say(session.model, made["images"]), rtol=1e-5, atol=1e-5)
    assert told[name]["labels"] == list(session.data.classes)
    assert told[name].get("mean") in (None, list(session.model.image_spec.mean))


def test_nanogpt_out_and_in(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    """Out: what nanoGPT computes, its GELU being exact; in again: the very same; and what is no such file."""
    root, made, told = opened
    assert told["nano"] == {
        **{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16},
        **{"vocab_size": 256, "bias": True, "dropout": 0.0},
    }
    ours = say(restore(root / "run-bytes")[0].model, torch.tensor([IDS]))
    torch.testing.assert_close(made["nano"], ours, rtol=0, atol=5e-3)
    from lowrank.models.text import load_pretrained

    again = load_pretrained(str(root / "nano" / "ckpt.pt"))
    torch.testing.assert_close(say(again, torch.tensor([IDS])), made["nano"], rtol=1e-5, atol=1e-5)
    file = str(root / "nano" / "ckpt.pt")
    words = ["--tokenizer", "bytes", "--device", "cpu"]
    assert main(["eval", file, "--data", str(TEXT), *words]) == 0
    assert main(["generate", file, *words]) == 0
    loss = score(str(root / "run-bytes"), data=str(TEXT), device="cpu")["loss"]
    assert score(file, data=str(TEXT), tokenizer="bytes", device="cpu")["loss"] == pytest.approx(loss, abs=1e-3)
    capsys.readouterr()
    for command, says in (
        (["generate", file], "brings no tokenizer: give --tokenizer"),
        (["export", str(root / "run-vit"), str(root / "x"), "--format", "nanogpt"], "holds a GPT-2 with tied"),
        (["export", str(root / "run-own"), str(root / "x"), "--format", "peft"], "nanogpt with a whole model"),
    ):
        assert main(command) == 2
        assert says in capsys.readouterr().err


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    from lowrank.models.nanogpt import read_nanogpt

    file = tmp_path / "ckpt.pt"
    torch.save({"model": {}, "model_args": {"n_layer": 1}}, file)
    with pytest.raises(ValueError, match="model_args have no n_head, n_embd, block_size, vocab_size"):
        read_nanogpt(str(file))
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "vocab_size": 5}
    torch.save({"model": {"_orig_mod.lm_head.weight": torch.ones(2, 2)}, "model_args": sizes}, file)
    with pytest.raises(ValueError, match="do not fit its model_args at "):
        read_nanogpt(str(file))
    torch.save({"model": Path("code")}, file)
    with pytest.raises(ValueError, match="cannot be read safely"):
        read_nanogpt(str(file))


def test_a_model_of_images_has_its_classes_and_how_they_are_read(tmp_path: Path) -> None:
    model = SimpleNamespace(config=SimpleNamespace())
    for folder in ("base", "bare", "out"):
        (tmp_path / folder).mkdir()
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    _name_classes(model, ("ill", "well"), tmp_path / "bare", tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
    _name_classes(model, ("ill", "well"), tmp_path / "base", tmp_path / "out")
    assert [file.read_text() for file in (tmp_path / "out").iterdir()] == ['{"image_mean": [0.5]}']
    assert (model.config.id2label, model.config.label2id) == ({0: "ill", 1: "well"}, {"ill": 0, "well": 1})
