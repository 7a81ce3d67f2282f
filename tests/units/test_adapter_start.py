"""Adapters of text from their folders, PEFT's and ours: scored, generated from, trained further, many on one base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.chats import saved
from tests.models import output
from tests.runs.tiny import TEXT, tiny
from torch import Tensor, nn

import lowrank
from lowrank.cli import main
from lowrank.data.text.tokenizers import train_bpe
from lowrank.evaluate.generate import generate
from lowrank.evaluate.score import score
from lowrank.interop import AdapterBank
from lowrank.interop.adapter_start import start_from_adapter_
from lowrank.run.run import Call, Run
from lowrank.run.session import restore
from lowrank.train.loop import train

peft = pytest.importorskip("peft")
TARGETS: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"]}


def say(model: nn.Module) -> Tensor:
    ids = torch.arange(12)[None]
    with torch.no_grad():
        return output(model.eval(), ids)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained model in a folder, with a tokenizer of its own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_bpe(300, [TEXT.read_text()])
    tokenizer.save(folder)
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": tokenizer.vocab_size}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


def theirs(base: Path, folder: Path, seed: int = 0, **config: Any) -> nn.Module:
    """A model that PEFT adapted and saved, as if trained."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(seed)
    model = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), peft.LoraConfig(r=2, **{**TARGETS, **config}))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


def run_on(base: Path, method: str = "lora", steps: int = 1, **args: Any) -> Run:
    """One step at a rate of zero but for what the adapter brings."""
    run = replace(tiny(method, data__tokenizer=str(base)), model=Call(name="pretrained", args={"path": str(base)}))
    own = {"target_modules": "all-linear", "rank": 4, **args}
    return replace(run, method=Call(name=method, args=own), steps=steps, warmup=0.0, lr=1e-12, eval_every=1)


def test_a_folder_of_peft_is_scored_and_generated_from(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = theirs(base, tmp_path / "theirs")
    merged = tmp_path / "merged"
    model.merge_and_unload().save_pretrained(merged)  # type: ignore[operator]
    words = ["--data", str(TEXT), "--context", "8", "--tokenizer", str(base), "--device", "cpu"]
    figures = []
    for source in (tmp_path / "theirs", merged, base):
        assert main(["eval", str(source), *words]) == 0
        figures.append(capsys.readouterr().out.splitlines()[0])
    assert figures[0] == figures[1] != figures[2]
    options: dict[str, Any] = {"tokens": 9, "temperature": 0, "device": "cpu"}
    said = generate(str(tmp_path / "theirs"), "The", **options)
    assert said == generate(str(merged), "The", tokenizer=str(base), **options)
    assert said == generate(str(tmp_path / "theirs"), "The", base=str(base), **options)


@pytest.mark.parametrize(
    ("method", "args", "config"),
    [
        ("lora", {"rank": 4, "alpha": 16}, {}),
        ("rslora", {"rank": 2}, {"lora_alpha": 5}),
        ("lora", {"target_modules": "q,k,v,mlp"}, {"use_rslora": True}),
        ("dora", {"rank": 3}, {"use_dora": True}),
        ("lora", {}, {"modules_to_save": ["ln_f"]}),
    ],
)
def test_peft_is_trained_further(
    tmp_path: Path, base: Path, method: str, args: dict[str, Any], config: dict[str, Any]
) -> None:
    """At rank, scale and layers of one's own the start computes what PEFT's model does."""
    model = theirs(base, tmp_path / "theirs", **config)
    train(run_on(base, method, **args), tmp_path / "run", init_adapter=tmp_path / "theirs", quiet=True)
    ours = restore(tmp_path / "run")[0].model
    torch.testing.assert_close(say(ours), say(model), rtol=1e-4, atol=1e-5)


def test_what_was_trained_further_resumes_and_learns(tmp_path: Path, base: Path) -> None:
    theirs(base, tmp_path / "theirs")
    run = replace(run_on(base, steps=6), lr=1e-2)
    whole = train(run, tmp_path / "whole", init_adapter=tmp_path / "theirs", quiet=True)
    train(replace(run, stop_at=3), tmp_path / "parts", init_adapter=tmp_path / "theirs", quiet=True)
    again = train(run, tmp_path / "parts", resume=True, quiet=True)
    assert whole["val_loss"] == again["val_loss"]


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "rank": ("lora", {"rank": 1}, {}, "has rank 2 on .* and the run 1: use --method.rank 2"),
    "layers": ("lora", {"target_modules": "attention"}, {}, "--method.target_modules c_attn,c_fc"),
    "parts": ("lora", {"target_modules": "q,mlp"}, {}, "changes parts of .*c_attn that the run does not adapt"),
    "kind": ("lora", {}, {"use_dora": True}, "is DoRA, and the run is not: use --method dora"),
    "no adapters": ("full", {}, {}, "and full does not"),
    "heads": ("multihead_lora", {"heads": 2}, {}, "has several heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_take_an_adapter(tmp_path: Path, base: Path, case: str) -> None:
    from transformers import GPT2LMHeadModel

    method, args, config, says = REFUSED[case]
    theirs(base, tmp_path / "theirs", **config)
    own: dict[str, Any] = {} if method == "full" else {"target_modules": "all-linear", "rank": 4, **args}
    model = GPT2LMHeadModel.from_pretrained(base)
    plan = lowrank.apply_(model, lowrank.METHODS[method](**own))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        start_from_adapter_(plan, tmp_path / "theirs")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_many_adapters_of_text_on_one_base(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of a run as we write it, and two of PEFT; each as if it were alone, and each scored by its folder."""
    from transformers import GPT2LMHeadModel

    train(replace(run_on(base, steps=4), lr=1e-2), tmp_path / "run", quiet=True)
    assert main(["export", str(tmp_path / "run"), "--adapter", str(tmp_path / "ours")]) == 0
    expected = {"ours": say(restore(tmp_path / "run")[0].model)}
    for seed, name in enumerate(("first", "second")):
        expected[name] = say(theirs(base, tmp_path / name, seed=seed, use_dora=name == "second"))
    bank = AdapterBank(GPT2LMHeadModel.from_pretrained(base))
    plain = say(bank.model)
    for name in expected:
        bank.load(tmp_path / name)
    for name in ("second", "ours", "first", "ours"):
        torch.testing.assert_close(say(bank.use(name)), expected[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(say(bank.use(None)), plain)
    known = score(str(tmp_path / "run"), data=str(TEXT), device="cpu")
    alone = score(str(tmp_path / "ours"), data=str(TEXT), context=16, device="cpu")
    assert alone["loss"] == pytest.approx(known["loss"])


def test_where_the_base_is(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs(base, tmp_path / "theirs")
    train(run_on(base), tmp_path / "run", quiet=True)
    config = tmp_path / "theirs" / "adapter_config.json"
    for words, says in (
        (["eval", str(base), "--data", str(TEXT), "--base", str(base)], "--base goes with the folder of an adapter"),
        (["generate", str(tmp_path / "run"), "--base", str(base)], "--base goes with the folder of an adapter"),
        (["generate", str(tmp_path / "theirs"), "--base", str(tmp_path / "run")], "is a run: lowrank export"),
        (["generate", str(tmp_path / "theirs"), "--base", "./nowhere"], "nowhere"),
    ):
        assert main(words) == 2
        assert says in capsys.readouterr().err
    config.write_text(config.read_text().replace(str(base), ""))
    assert main(["generate", str(tmp_path / "theirs")]) == 2
    assert "does not say where its base is: give --base" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [("prompt", "completion"), ("question", "answer"), ("messages",)])
def test_an_adapter_is_scored_on_examples_as_its_run_is(tmp_path: Path, columns: tuple[str, ...]) -> None:
    """And its untrained base on the same: chats and pairs are recognised, their answers alone count."""
    own, file = saved(tmp_path / "own"), tmp_path / "examples.jsonl"
    with file.open("w") as lines:
        for n in range(60):
            pair = (f"{n} and", " light")
            turns = [{"role": r, "content": text} for r, text in zip(("user", "assistant"), pair, strict=True)]
            row = {columns[0]: turns} if len(columns) == 1 else dict(zip(columns, pair, strict=True))
            lines.write(json.dumps(row) + "\n")
    names = dict(zip(("prompt", "completion"), columns, strict=True)) if columns[0] == "question" else {}
    options = [word for name, column in names.items() for word in (f"--data.{name}", column)]
    told = ["--model.path", str(own), "--data", str(file), "--steps", "2", "--lr", "0.01", "--device", "cpu", "--quiet"]
    assert main(["train", "finetune", *told, *options, "--out", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--adapter", str(tmp_path / "peft"), "--format", "peft"]) == 0
    found = score(str(tmp_path / "peft"), data=str(file), **names, device="cpu")
    trained = score(str(tmp_path / "run"), device="cpu")
    assert found["tokens"] == trained["tokens"]
    assert found["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert score(str(own), data=str(file), **names, device="cpu")["loss"] > found["loss"]
