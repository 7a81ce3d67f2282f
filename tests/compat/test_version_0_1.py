"""What version 0.1 has written opens: runs are scored, resumed and generated from, adapters load; the same figures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank.evaluate.generate import generate
from lowrank.evaluate.score import score
from lowrank.interop import read_adapter
from lowrank.run import Run
from lowrank.train import train

WRITTEN = Path(__file__).parent / "version_0_1"
FACTS = json.loads((WRITTEN / "facts.json").read_text())

pytestmark = pytest.mark.filterwarnings("ignore:.*written before:UserWarning")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """A copy of a run of then; the data that its run.json names lie under the repository's root."""
    monkeypatch.chdir(WRITTEN.parents[2])
    return Path(shutil.copytree(WRITTEN / name, tmp_path / name))


@pytest.mark.parametrize("name", list(FACTS))
def test_scores_are_those_of_then(folder: Path, name: str) -> None:
    found = score(folder, device="cpu")
    for metric, value in FACTS[name]["score"].items():
        assert found[metric] == pytest.approx(value, rel=1e-5), metric


@pytest.mark.parametrize("name", list(FACTS))
def test_a_run_of_then_goes_on(folder: Path, name: str) -> None:
    run = Run.read(folder / "run.json")
    summary = train(replace(run, steps=6), folder, resume=True, quiet=True)
    assert summary["steps"] == 6
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"] == 6


@pytest.mark.parametrize("name", ["lte"])
def test_text_is_that_of_then(folder: Path, name: str) -> None:
    assert generate(str(folder), prompt="The", tokens=12, temperature=0.0) == FACTS[name]["generate"]


def test_an_adapter_of_then_is_read() -> None:
    info, tensors = read_adapter(WRITTEN / "adapter")
    assert info.method.name == "lora"
    assert any(name.endswith(".A") for name in tensors)
