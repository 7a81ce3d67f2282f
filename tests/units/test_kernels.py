"""The Triton kernels, in Triton's interpreter: equal to the plain operations and to float64, at shapes that are no
multiples of anything.

The interpreter is chosen when Triton is imported, so all of it runs in one child process; here its findings are looked
at one by one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.linalg import kernels

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {  # relative error of what changed
    "projected": 1e-5,
    "projected, bfloat16": 3e-2,
    "layer": 1e-5,
    "layer, bfloat16": 2e-2,
    "int8": 1e-5,
    "newton_schulz": 1e-5,
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": "src", "TRITON_INTERPRET": "1", "LOWRANK_KERNELS": "on"}
    command = [sys.executable, "-m", "tests.units.kernels_interpreted"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", ALLOWED)
def test_a_kernel_computes_what_the_plain_operations_do(name: str, found: dict[str, Any]) -> None:
    cases = {case: error for case, error in found["errors"].items() if case.partition(":")[0] == name}
    assert cases
    assert not {case: error for case, error in cases.items() if not error <= ALLOWED[name]}


def test_each_seam_reached_its_kernel(found: dict[str, Any]) -> None:
    assert found["calls"] == {"projected_adam_": 3, "linear": 4, "adamw_int8_": 4, "symmetric": 20}


def test_codes_are_those_of_quantise(found: dict[str, Any]) -> None:
    assert found["codes apart"] == 0


def test_bfloat16_weights_are_rounded_to_their_mean(found: dict[str, Any]) -> None:
    """A step of an eighth of the distance to the next number is taken by an eighth of the weights."""
    assert found["rounded up"] == pytest.approx(0.125, abs=0.03)
    assert found["rounded alike in two steps"] < 0.9


def test_without_a_device_plain_operations_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_KERNELS", "on")
    assert not kernels.chosen("projected", torch.ones(2))
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert kernels.chosen("projected", torch.ones(2))
    monkeypatch.setenv("LOWRANK_KERNELS", "auto")
    assert not kernels.chosen("projected", torch.ones(2))  # measured on no device yet
    monkeypatch.setenv("LOWRANK_KERNELS", "yes")
    with pytest.raises(ValueError, match="LOWRANK_KERNELS='yes' is unknown; it is one of off, on, auto"):
        kernels.chosen("projected", torch.ones(2))
