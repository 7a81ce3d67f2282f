"""The examples of other people's loops run to their end, and learn."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("accelerate", "lightning", "nanogpt", "trainer", "trl_sft")
# One process imports what is heavy; each example then runs in a fork of it, as a script does.
FORKS = """
import os, runpy, sys
import torch, transformers, datasets, lowrank
from transformers import GPT2LMHeadModel, LlamaForCausalLM, Trainer
for script in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.argv = [script]
        sys.path[0] = os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, script
"""


def test_they_run_and_learn() -> None:
    for library in ("accelerate", "lightning", "trl"):
        pytest.importorskip(library)
    scripts = [EXAMPLES / f"{name}.py" for name in NAMES]
    assert all(len(script.read_text().splitlines()) < 60 for script in scripts)
    command = [sys.executable, "-c", FORKS, *scripts]
    said = subprocess.run(command, check=True, timeout=200, capture_output=True, text=True).stdout
    ((first, last),) = re.findall(r"loss (\S+) at first, (\S+) at the end; merged: Linear", said)  # accelerate
    assert float(last) < 0.7 * float(first)
    ((first, last),) = re.findall(r"loss (\S+) at first, (\S+) over the last", said)  # lightning
    assert float(last) < 0.95 * float(first)
    iterations = re.findall(r"iter \d+: loss (\S+)", said)  # nanogpt
    assert float(iterations[-1]) < 0.8 * float(iterations[0])
    ((here, there),) = re.findall(r"loss of the model (\S+), of its checkpoint, .* (\S+)", said)  # trainer
    assert here == there
    *_, last = re.findall(r"'loss': '(\S+)'", said)  # trl_sft
    assert float(last) < 1.6
