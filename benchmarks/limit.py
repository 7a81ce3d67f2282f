"""Is the prediction what a run needs? The operating system limits a process: with 15 % more than predicted the
run trains, with 15 % less it does not. GPT-2 of 124M parameters: full, lora and galore, each predicted at over 2 GiB.

The limit is RLIMIT_DATA, which Linux (since 4.7) checks against the private writable memory of a process, its heap and
its anonymous mappings: all that an allocator has taken, and nothing of libraries' code. RLIMIT_AS would count those as
well, and 64 MiB of address space for each thread's arena, used or not; RLIMIT_RSS does nothing; a control group's limit
is the administrator's. What counts is taken after the imports, and so is the base that the limit is set from: VmData,
which holds what is resident but for libraries' files (both are in the result).

Memory that glibc keeps after it was freed counts too: blocks of up to 32 MiB come from its heap once blocks as large
have been freed (the threshold for mappings moves), and the heap has gaps. ``--threshold`` is MALLOC_MMAP_THRESHOLD_,
by which freed blocks go back at once; 0 leaves glibc as it is, which is what is measured.

python -m benchmarks.limit             about five minutes on two idle cores, 4 GiB; writes results/limit_….json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import save
from lowrank.recipes import find
from lowrank.run.memory_estimate import estimate
from lowrank.run.overrides import override, resolve
from lowrank.run.run import Run

SHAPE = {"model.n_layer": 12, "model.n_embd": 768, "model.n_head": 12, "model.vocab_size": 50257}
COMMON = {"data.context": 512, "batch_size": 2, "steps": 2, "eval_every": "never", "device": "cpu"}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"method.rest": "freeze", "batch_size": 3},
    "galore": {"method.rank": 128},
}
FACTORS = (1.15, 0.85)
LEAST = 2 << 30


def run_of(method: str) -> Run:
    return resolve(override(find("gpt-mini"), {**SHAPE, **COMMON, "method": method, **METHODS[method]}))


def held(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def child(method: str, extra: int, out: Path) -> None:
    """Import all, limit what may be taken beside it, and train."""
    import torch
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    from lowrank.train.loop import train

    torch.ones(64, 64) @ torch.ones(64, 64)  # the libraries' own buffers
    base = {"VmData": held("VmData"), "VmRSS": held("VmRSS")}
    limit = base["VmData"] + extra
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    told = {"base": base, "limit": limit, "trained": False, "why": ""}
    try:
        told["trained"] = train(run_of(method), out, quiet=True)["steps"] == COMMON["steps"]
    except (RuntimeError, MemoryError) as error:
        told["why"] = str(error).splitlines()[0][:200] or type(error).__name__
    told["most_resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(told))


def tried(method: str, extra: int, threshold: int) -> dict[str, Any]:
    """What became of a run that may take ``extra`` bytes."""
    settings = {"MALLOC_MMAP_THRESHOLD_": str(threshold)} if threshold else {}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "benchmarks.limit", "--child", method, str(extra), f"{folder}/run"]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **settings})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    return {"trained": False, "why": f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, metavar=("METHOD", "BYTES", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--threshold", type=int, default=0)
    parser.add_argument("--methods", default=",".join(METHODS))
    asked = parser.parse_args()
    if asked.child:
        child(asked.child[0], int(asked.child[1]), Path(asked.child[2]))
        return
    rows = []
    for method in asked.methods.split(","):
        predicted = estimate(run_of(method), on_card=False).total
        assert predicted >= LEAST, f"{method} is predicted at {predicted} bytes only"
        for factor in FACTORS:
            found = tried(method, round(factor * predicted), asked.threshold)
            as_wanted = found["trained"] == (factor > 1)
            rows.append({"method": method, "predicted": predicted, "factor": factor, "as_wanted": as_wanted, **found})
            print(json.dumps(rows[-1]), flush=True)
    if asked.methods == ",".join(METHODS):
        print(save("limit", {"threshold": asked.threshold, "rows": rows}))


if __name__ == "__main__":
    main()
