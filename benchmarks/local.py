"""What it costs not to talk: a step of local LTE between merges, on two ranks and in two processes that know nothing of
each other.

    python -m benchmarks.local

Two processes, each pinned to a core of its own and on one thread, train `gpt-mini` by LTE on 8 sequences a step with
two heads each: as two ranks of one run (4 heads, batches of 16), and as two runs. The two ways take turns; compared are
the medians over the steps between merges of the loop's own step times, round by round. Goal: at most 1.03 times.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.common import save

STEPS, MERGE_EVERY, ROUNDS, WARMUP = 60, 20, 5, 5
COMMON = {"method": "lte", "method.merge_every": MERGE_EVERY, "steps": STEPS, "eval-every": 1000, "eval-batches": 1}


def seconds(ranks: bool, folder: Path) -> float:
    """The median step between merges, in seconds: the mean of both processes', or rank 0's, who waits for rank 1."""
    ours = {"method.heads": 4, "batch-size": 16} if ranks else {"method.heads": 2, "batch-size": 8}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    started = []
    for number, core in enumerate(sorted(os.sched_getaffinity(0))[:2]):
        out = folder / ("ranks" if ranks else f"alone-{number}")
        options = [f"--{name}={value}" for name, value in {**COMMON, **ours}.items()]
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(number)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "lowrank", "train", "gpt-mini", *options, f"--out={out}", "--quiet"],
                env={**os.environ, "OMP_NUM_THREADS": "1", **(group if ranks else {})},
                stdout=subprocess.DEVNULL,
                preexec_fn=partial(os.sched_setaffinity, 0, {core}),
            )
        )
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit("a process has failed")
    return statistics.fmean(map(between_merges, folder.glob("*/log.jsonl")))


def between_merges(log: Path) -> float:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [r for r in records if "step_seconds" in r and r["step"] > WARMUP and r["step"] % MERGE_EVERY]
    assert not any(r.get("bytes_sent") for r in steps), "ranks have talked between merges"
    return statistics.median(r["step_seconds"] for r in steps)


def main() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed, one for each process")
    found: dict[str, list[float]] = {"two ranks": [], "two processes": []}
    for turn in range(ROUNDS):
        for name in list(found)[:: 1 if turn % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(seconds(name == "two ranks", Path(folder)))
    ratios = [a / b for a, b in zip(found["two ranks"], found["two processes"], strict=True)]
    print(f"a step between merges, two ranks / two processes: {statistics.median(ratios):.3f} ({ratios})")
    result = {
        "recipe": "gpt-mini",
        "seconds": found,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "goal": 1.03,
    }
    print("written to", save("local", result).name)


if __name__ == "__main__":
    main()
