"""What any method changed in its weights, written as a LoRA that the installed PEFT opens."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.models import llama, output, tokens
from tests.runs.tiny import TEXT, tiny
from torch import Tensor, nn

import lowrank
from lowrank.cli import main
from lowrank.interop import AdapterBank, export_difference, read_peft, write_difference
from lowrank.interop.adapter_start import base_of
from lowrank.interop.peft_difference import leading_part
from lowrank.run.run import Call
from lowrank.run.session import Base, restore
from lowrank.train.loop import train

peft = pytest.importorskip("peft")


def say(model: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return output(model.eval(), tokens() if x is None else x)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained model in a folder, its vocabulary that of bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 256}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=255, eos_token_id=255)).save_pretrained(folder)
    return folder


def trained(method: str, folder: Path, base: Path, **changes: object) -> Path:
    run = tiny(method, lr=3e-2, **changes)
    train(replace(run, model=Call(name="pretrained", args={"path": str(base)})), folder, quiet=True)
    return folder


def test_a_difference_is_cut_where_it_was_asked_to_be() -> None:
    torch.manual_seed(0)
    for shape in ((9, 5), (5, 9)):
        delta = torch.randn(shape, dtype=torch.float64)
        singular = torch.linalg.svdvals(delta)
        for rank in (1, 3, 5, 8):
            A, B, whole, left = leading_part(delta, rank=rank)
            kept = min(rank, 5)
            assert (A.shape, B.shape) == ((kept, shape[1]), (shape[0], kept))
            torch.testing.assert_close((delta - B @ A).square().sum(), singular[kept:].square().sum())
            assert whole - left == pytest.approx(float(singular[:kept].square().sum()))
        for energy in (0.3, 0.9, 1.0):
            A, _, whole, left = leading_part(delta, energy=energy, rounding=1e-12)
            shares = singular.square().cumsum(0) / singular.square().sum()
            assert len(A) == 1 + int((shares < energy - 1e-9).sum())
            assert 1 - left / whole >= energy - 1e-9


def test_merged_factors_are_found_with_their_summed_rank(tmp_path: Path) -> None:
    """LTE with two heads of rank 2, merged once or more on frozen weights, changed them by no more than it added."""
    plan_of = lowrank.methods.multihead_lora("attention", rank=2, heads=2, rest="freeze")
    model, before = llama(), llama()
    lowrank.apply_(model, plan_of)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapters." in name:
                p += torch.randn_like(p)
    expected = say(model)
    kept = write_difference(lowrank.merge_and_unload(model), dict(before.named_parameters()), tmp_path, energy=1.0)
    assert set(kept.ranks.values()) == {4}
    assert kept.energy == pytest.approx(1.0)
    assert not kept.whole
    torch.testing.assert_close(say(peft.PeftModel.from_pretrained(llama(), tmp_path)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["galore", "lte", "relora", "full"])
def test_a_run_becomes_a_lora_on_its_base(
    tmp_path: Path, base: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it is kept at energy 1, norms and the tied embedding beside it; less of it at 0.9, and that is said."""
    from transformers import GPT2LMHeadModel

    run = trained(method, tmp_path / "run", base, method__rest="train")
    session, _ = restore(run)
    expected = say(session.model)
    for energy, close in (("1", True), ("0.9", False)):
        out = tmp_path / energy
        assert main(["export", str(run), "--adapter", str(out), "--format", "peft", "--energy", energy]) == 0
        said = capsys.readouterr().out
        assert "that keeps" in said.replace("\n", " ")
        assert "saved whole: lm_head, transformer.h.0.ln_1" in said.replace("\n", " ")
        theirs = say(peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), out))
        assert torch.allclose(theirs, expected, rtol=1e-4, atol=1e-4) == close
        bank = AdapterBank(GPT2LMHeadModel.from_pretrained(base))
        torch.testing.assert_close(say(bank.use(bank.load(out))), theirs, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "0.9" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    small, large = ((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("0.9", "1"))
    assert small < large


def test_an_adapter_leads_to_its_base_from_any_folder(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    run = trained("lora", tmp_path / "run", Path(base.name))
    written = ("lora", "--format peft", "--format peft --rank 1")
    for number, form in enumerate(written):
        words = form.split() if number else []
        assert main(["export", str(run), "--adapter", str(tmp_path / str(number)), *words]) == 0
    monkeypatch.chdir(tmp_path)
    for number in range(len(written)):
        assert base_of(tmp_path / str(number)) == str(base)


def test_a_base_that_is_gone_or_changed_is_refused(tmp_path: Path, base: Path) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    run = trained("galore", tmp_path / "run", own)
    assert Base.read(run).parameters.keys() == load_file(own / "model.safetensors").keys()  # type: ignore[union-attr]
    _, kept = export_difference(run, tmp_path / "first", rank=2)
    assert set(kept.ranks.values()) == {2}
    assert 0 < kept.energy < 1
    from transformers import GPT2LMHeadModel

    with torch.no_grad():
        other = GPT2LMHeadModel.from_pretrained(own)
        other.transformer.h[0].ln_1.weight += 1
        other.save_pretrained(own)
    with pytest.raises(ValueError, match=r"has changed since it was trained: 1 of \d+ weights .* transformer.h.0.ln_1"):
        export_difference(run, tmp_path / "out", rank=2)
    shutil.rmtree(own)
    with pytest.raises(FileNotFoundError, match="no folder"):
        export_difference(run, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_the_start_of_a_run_may_be_another_run(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "first", quiet=True)
    run = tiny("relora", lr=1e-2)
    train(run, tmp_path / "second", init_from=tmp_path / "first", quiet=True)
    _, kept = export_difference(tmp_path / "second", tmp_path / "out", energy=1)
    assert kept.energy == pytest.approx(1.0)
    model = lowrank.merge_and_unload(restore(tmp_path / "first")[0].model)
    info, tensors = read_peft(tmp_path / "out", model)
    bank = AdapterBank(model)
    bank.add("change", info, tensors)
    x = torch.randint(0, 256, (2, 9))
    expected = say(restore(tmp_path / "second")[0].model, x)
    torch.testing.assert_close(say(bank.use("change"), x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--format", "peft", "--energy", "1.5"], "energy=1.5 must lie above 0"),
        (["--format", "peft", "--rank", "0"], "rank=0 must be at least 1"),
        (["--format", "peft", "--rank", "2", "--energy", "1"], "one of them"),
        (["--rank", "2"], "--format peft"),
        (["--format", "peft"], "--rank N or --energy 0.9 writes what was changed"),
    ],
)
def test_bad_words(tmp_path: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    assert main(["export", str(run), "--adapter", str(tmp_path / "out"), *words]) == 2
    assert says in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert TEXT.exists()
    train(tiny("galore"), folder, quiet=True)
    return folder
