"""Fine-tuning as a user would do it: a model in a folder, examples in a file, one command each."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.chats import FAMILIES, TURNS, saved

from lowrank.cli import main
from lowrank.data.text.tokenizers import load_tokenizer
from lowrank.evaluate.chat import chat
from lowrank.recipes import find
from lowrank.run.overrides import override, resolve
from lowrank.run.run import Run
from lowrank.run.session import restore

CHAT = {
    "messages": [
        {"role": "user", "content": "What is light?"},
        {"role": "assistant", "content": "A picture on film."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "It is made by light."},
    ]
}
SHORT = ("--device", "cpu", "--steps", "4", "--batch-size", "2", "--warmup", "0", "--lr", "1e-2")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({**CHAT, "id": n}) + "\n" for n in range(40)))
    return file


def train(model: Path, data: Path, out: Path, *options: str) -> int:
    return main(
        ["train", "finetune", "--model.path", str(model), "--data", str(data), "--out", str(out), *SHORT, *options]
    )


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_one_s_own(
    family: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    model = saved(tmp_path / "model", family, dtype=torch.bfloat16 if family == "llama" else torch.float32)
    assert train(model, data, run) == 0
    said = capsys.readouterr().err
    assert "chats.jsonl: chats in 'messages', through the chat template; only the answers count" in said
    assert "packed into" in said
    assert losses(run)[-1] < losses(run)[0]
    made = Run.read(run / "run.json")
    assert made.data.args["tokenizer"] == str(model)
    session, _ = restore(run)
    assert {p.dtype for p in session.model.parameters() if not p.requires_grad} == {
        torch.bfloat16 if family == "llama" else torch.float32
    }
    assert load_tokenizer(run / "tokenizer").backend.chat_template == FAMILIES[family]
    assert main(["generate", str(run), "--prompt", "What is", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("What is")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is light?\n\nWhy?\n"))
    assert main(["chat", str(run), "--tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.count("\n") >= 2
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", str(run)]) == 0
    assert main(["eval", str(run)]) == 0
    assert "loss " in capsys.readouterr().out


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, data: Path) -> None:
    model = saved(tmp_path / "model", "llama")
    assert train(model, data, tmp_path / "whole", "--quiet") == 0
    assert train(model, data, tmp_path / "half", "--stop-at", "2", "--quiet") == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--quiet"]) == 0
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")


def test_a_run_is_scored_on_pairs_of_other_names(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = saved(tmp_path / "model", "llama"), tmp_path / "other.csv"
    other.write_text("question,answer\n" + "Why?,It is light.\n" * 40)
    assert train(model, data, tmp_path / "run", "--quiet") == 0
    words = ["eval", str(tmp_path / "run"), "--data", str(other), "--split", "train"]
    assert main(words) == 2
    assert "(of lowrank eval: --prompt, …)" in capsys.readouterr().err
    assert main([*words, "--prompt", "question", "--completion", "answer"]) == 0
    assert "loss " in capsys.readouterr().out


def test_an_exported_model_keeps_its_template_and_is_tuned_on(tmp_path: Path, data: Path) -> None:
    model = saved(tmp_path / "model", "gemma3")
    assert train(model, data, tmp_path / "run", "--quiet") == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert own.chat_template == TURNS
    assert own("light")["input_ids"][0] == own.bos_token_id
    assert train(tmp_path / "out", data, tmp_path / "again", "--method", "full", "--quiet") == 0


def test_the_model_s_path_brings_its_tokenizer() -> None:
    run = resolve(override(find("finetune"), {"model.path": "there", "data": "pairs.jsonl"}))
    assert (run.model.args["dtype"], run.data.args["tokenizer"]) == ("auto", "there")
    assert run.method.args["target_modules"] == ("all-linear",) or run.method.args["target_modules"] == "all-linear"
    assert (run.method.args["alpha"], run.lr) == (32, 2e-4)
    assert override(run, {"method": "full"}).lr == pytest.approx(run.lr / 10)
    assert resolve(override(run, {"model.path": "elsewhere"})).data.args["tokenizer"] == "elsewhere"
    told = resolve(override(find("finetune"), {"model.path": "there", "data.tokenizer": "mine"}))
    assert told.data.args["tokenizer"] == "mine"
    old = resolve(find("gpt2-finetune"))
    assert (old.model.args["path"], old.data.args["tokenizer"]) == ("gpt2", "gpt2")
    assert resolve(override(old, {"model.path": "there"})).data.args["tokenizer"] == "there"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "DATA"], "--model.path MODEL"),
        (["--model.path", "MODEL"], "give --data FILE|FOLDER|NAME"),
        (["--model.path", "MODEL", "--data", "DATA", "--data.loss", "prompt"], "one of completion, all"),
        (["--model.path", "BARE", "--data", "DATA"], "holds no tokenizer: say which by --data.tokenizer"),
        (["--model.path", "CODE", "--data", "DATA"], "which is not executed here"),
    ],
)
def test_what_a_run_lacks_is_said(
    options: list[str], message: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / "model", "llama")
    bare, code = tmp_path / "bare", tmp_path / "code"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*token*"))
    shutil.copytree(model, code)
    config: dict[str, Any] = json.loads((code / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (code / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    places = {"MODEL": str(model), "DATA": str(data), "BARE": str(bare), "CODE": str(code)}
    words = [places.get(word, word) for word in options]
    assert main(["train", "finetune", "--out", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_chat_ends_its_answers_and_forgets_what_no_longer_fits(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "llama")
    notes: list[str] = []
    answers = list(chat(str(model), ["light " * 30, "", "picture " * 30], tokens=150, device="cpu", note=notes.append))
    assert len(answers) == 2
    assert notes == ["the model's context is full: 2 of the oldest turns are left out"]
    assert not any("<|im_end|>" in answer for answer in answers)
    with pytest.raises(ValueError, match="the question has"):
        list(chat(str(model), ["light " * 300], device="cpu"))
    with pytest.raises(ValueError, match=r"has no chat template: .* lowrank generate"):
        list(chat(str(saved(tmp_path / "bare", "llama", template=None)), ["light"], device="cpu"))


def test_a_plan_opens_neither_weights_nor_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "model", "llama", dtype=torch.bfloat16)
    (model / "model.safetensors").unlink()
    assert main(["plan", "finetune", "--model.path", str(model), "--data", "none.jsonl", "--layers"]) == 0
    assert "adapter" in capsys.readouterr().out
