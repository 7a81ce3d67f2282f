"""What a run has learnt from text belongs to it: with the text changed or gone, everything but training goes on."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank.cli.app import main
from lowrank.data import open_run_tokenizer, prepare, save_run_tokenizer
from lowrank.data.cache import cache_root
from lowrank.data.text.tokenizers import Bytes, Characters, train_bpe
from lowrank.evaluate.export import export
from lowrank.evaluate.generate import generate
from lowrank.evaluate.score import score
from lowrank.infra import checkpoint
from lowrank.recipes import RECIPES
from lowrank.report.runs import find_results
from lowrank.report.table import groups
from lowrank.report.variants import Planned, execute
from lowrank.run import Run
from lowrank.run.overrides import override, resolve
from lowrank.train import train
from lowrank.train.changed_data import ChangedDataError

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


def test_a_run_of_before_warns_once_and_goes_on(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = trained
    text = generate(str(folder), "The ", tokens=20, device="cpu")
    shutil.rmtree(folder / "tokenizer")
    for step in checkpoint.saved(folder / "checkpoints"):
        shutil.rmtree(step / "tokenizer")
        known = json.loads((step / "manifest.json").read_text())
        known["files"] = {name: size for name, size in known["files"].items() if not name.startswith("tokenizer")}
        (step / "manifest.json").write_text(json.dumps(known))
    with pytest.warns(UserWarning, match="written before runs kept what they learn") as told:
        assert generate(str(folder), "The ", tokens=20, device="cpu") == text
    assert len(told) == 1
    capsys.readouterr()
    train(replace(Run.read(folder / "run.json"), steps=3), folder, resume=True)
    assert capsys.readouterr().err.count("written before runs kept what they learn") == 1


@pytest.mark.parametrize("inside", [True, False])
def test_a_checkpoint_that_leaves_the_run_stands_by_itself(
    trained: tuple[Path, Path], tmp_path: Path, inside: bool
) -> None:
    """Copied out with its run.json, the text gone: evaluated, used and exported as in the run."""
    folder, text = trained
    (tmp_path / "other.txt").write_text("line of that text\n" * 200)
    other = {"data": str(tmp_path / "other.txt"), "device": "cpu"}
    before = generate(str(folder), "The ", tokens=20, device="cpu"), score(str(folder), **other)  # type: ignore[arg-type]
    copied = Path(shutil.copytree(checkpoint.latest(folder / "checkpoints"), tmp_path / "away" / "step-00000002"))
    shutil.copy(folder / "run.json", copied if inside else copied.parent)
    shutil.rmtree(folder)
    text.unlink()
    assert generate(str(copied), "The ", tokens=20, device="cpu") == before[0]
    assert score(str(copied), **other) == before[1]  # type: ignore[arg-type]
    export(copied, tmp_path / "plain")
    assert generate(str(tmp_path / "plain"), "The ", tokens=20, device="cpu") == before[0]


def test_a_run_goes_on_with_its_own_data_alone(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its content, whatever it is called; other data is refused by name, unless it is said to be meant; as a new run
    any data will do."""
    folder, text = trained
    written = json.loads((folder / "run.json").read_text())
    saved = checkpoint.load(checkpoint.latest(folder / "checkpoints"))
    assert written["data"]["fingerprint"] == saved.meta["learnt"]["fingerprint"] == saved.meta["data_of_ranks"][0]
    text.write_text(TEXT.replace("long", "fine"))
    longer = replace(Run.read(folder / "run.json"), steps=3)
    message = rf"--data {re.escape(str(text))} is not what the run was trained on \(content \w{{8}}, it was \w{{8}}\)"
    with pytest.raises(ChangedDataError, match=message + ".*--allow-changed-data"):
        train(longer, folder, resume=True, quiet=True)
    (folder / "summary.json").unlink()  # as if it had been killed
    planned = Planned(name="full", run=replace(longer, steps=2))
    outcomes = execute([planned], tmp_path, lambda run, out, resume: train(run, out, resume=resume, quiet=True))
    assert "is not what the run was trained on" in str(outcomes[0].error)
    assert main(["train", str(folder / "run.json"), "--out", str(tmp_path / "new")]) == 0
    assert "is not what that run.json was trained on" in capsys.readouterr().err
    assert main(["train", "--resume", str(folder), "--steps", "3", "--allow-changed-data"]) == 0
    assert "is not what the run was trained on" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text())["data"]["fingerprint"] != written["data"]["fingerprint"]
    assert train(replace(longer, steps=4), folder, resume=True, quiet=True)["steps"] == 4
    found = find_results([tmp_path])
    assert len(groups(found)) == 2  # of 4 and of 2 steps, and their content would tell them apart too
    assert all("data.fingerprint" in each.settings for each in found)


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
