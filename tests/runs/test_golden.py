"""Twenty steps of every method, against committed losses: what changes a number without meaning to is seen here.

The tolerance allows for another processor's rounding. After a change that is meant, write them anew and say why in the
commit:  python -m tests.runs.test_golden
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from tests.runs.tiny import tiny

import lowrank
from lowrank.infra.log import read_log
from lowrank.train.loop import train

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = {"relora": 2e-2}  # a restart keeps the largest tenth of the state: rounding decides which entries those are


def losses(method: str, folder: Path) -> list[float]:
    train(tiny(method, steps=20, eval_every=20, checkpoint_every=20), folder, quiet=True)
    return [record["loss"] for record in read_log(folder / "log.jsonl") if "loss" in record]


@pytest.mark.parametrize("method", lowrank.METHODS)
def test_twenty_steps_are_the_committed_ones(method: str, tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())[method]
    assert losses(method, tmp_path / "run") == pytest.approx(expected, rel=TOLERANCE.get(method, 2e-3))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {method: losses(method, Path(folder) / method) for method in lowrank.METHODS}
    rounded = {method: [round(loss, 5) for loss in each] for method, each in found.items()}
    GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n")
