"""What a run has learnt from text belongs to it: with the text changed or gone, everything but training goes on."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank.data import open_run_tokenizer, prepare, save_run_tokenizer
from lowrank.data.cache import cache_root
from lowrank.data.text.tokenizers import Bytes, Characters, train_bpe
from lowrank.evaluate.generate import generate
from lowrank.evaluate.score import export, score
from lowrank.infra import checkpoint
from lowrank.recipes import RECIPES
from lowrank.run import Run
from lowrank.run.overrides import override, resolve
from lowrank.train import train

TEXT = "".join(f"The {n}th line of a text that is long enough.\n" for n in range(300))


@pytest.fixture(params=["chars", "bpe:300"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """(a run's folder, its text)."""
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    small = {"model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16, "data.context": 16, "steps": 2, "batch-size": 2}
    options = {"data": str(text), "data.tokenizer": request.param, "method": "full", "eval-batches": 1, **small}
    train(resolve(override(RECIPES["gpt-mini"](), options)), tmp_path / "run", quiet=True)
    return tmp_path / "run", text


def test_a_run_needs_its_text_for_training_alone(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, text = trained
    kept = open_run_tokenizer(folder)
    assert kept is not None
    before = generate(str(folder), "The ", tokens=20, device="cpu"), score(str(folder), device="cpu")
    changed = TEXT.replace("T", "t")  # another alphabet, other merges
    text.write_text(changed)
    assert generate(str(folder), "The ", tokens=20, device="cpu") == before[0]
    assert score(str(folder), device="cpu")["loss"] != before[1]["loss"]
    run = Run.read(folder / "run.json")
    (tmp_path / "other.txt").write_text("line of that text\n" * 200)
    found = score(str(folder), data=str(tmp_path / "other.txt"), device="cpu")
    text.unlink()
    shutil.rmtree(cache_root() / "tokens")
    assert generate(str(folder), "The ", tokens=20, device="cpu") == before[0]
    assert score(str(folder), data=str(tmp_path / "other.txt"), device="cpu") == found
    export(folder, tmp_path / "plain")
    assert open_run_tokenizer(folder).fingerprint == kept.fingerprint  # type: ignore[union-attr]
    assert generate(str(tmp_path / "plain"), "The ", tokens=20, device="cpu") == before[0]
    text.write_text(TEXT)
    assert train(replace(run, steps=3), folder, resume=True, quiet=True)["steps"] == 3
    learnt = checkpoint.load(checkpoint.latest(folder / "checkpoints")).meta["learnt"]
    assert learnt["fingerprint"] == prepare(text, tokenizer=str(run.data.args["tokenizer"])).fingerprint


def test_a_run_of_before_warns_once_and_goes_on(trained: tuple[Path, Path]) -> None:
    folder, _ = trained
    text = generate(str(folder), "The ", tokens=20, device="cpu")
    shutil.rmtree(folder / "tokenizer")
    with pytest.warns(UserWarning, match="written before runs kept their tokenizer") as told:
        assert generate(str(folder), "The ", tokens=20, device="cpu") == text
    assert len(told) == 1


@pytest.mark.parametrize("tokenizer", [Bytes(), Characters("abcT\n", True), train_bpe(270, [TEXT])])
def test_a_tokenizer_is_kept_exactly(tokenizer: Bytes, tmp_path: Path) -> None:
    assert open_run_tokenizer(tmp_path) is None
    save_run_tokenizer(tokenizer, tmp_path)
    again = open_run_tokenizer(tmp_path)
    assert again is not None
    assert again.described() == tokenizer.described()
    assert again.fingerprint == tokenizer.fingerprint
    save_run_tokenizer(Characters("z", False), tmp_path)  # what lies there stays
    assert open_run_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint  # type: ignore[union-attr]
    next((tmp_path / "tokenizer").glob("lowrank*.json")).write_text("{")
    with pytest.raises(ValueError, match="damaged or incomplete"):
        open_run_tokenizer(tmp_path)
