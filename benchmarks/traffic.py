"""Bytes on the wire, computed for GPT-2 124M and counted on a small model, against DDP.

    python -m benchmarks.traffic

Computed: GPT-2 124M on the meta device, LTE with 4 heads of rank 4 merged every 10 steps, on the attention layers and
on every linear layer, the rest averaged every 40 steps (the default) or more rarely. Counted: the same arithmetic held
to two processes of this machine that train a small GPT-2 (gloo, loopback); the two must agree to the byte.

Every figure is what one rank sends, as a ring does. Goals: the adapted attention matrices at least 500 times less than
DDP's, the whole model with its default interval at least 30 times, with every linear layer adapted and the embeddings
averaged rarely at least 100 times.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch

import lowrank
from benchmarks.common import save
from lowrank.adapters.compression import Compression
from lowrank.infra.progress import short_bytes
from lowrank.plan.communication import forecast, merge_words

STEPS, RANKS = 8, 2
SMALL = {"method.merge_every": 2, "method.rest_every": 4, "model.n_layer": 2, "model.n_embd": 32, "model.n_head": 2}


def main() -> None:
    slow: dict[str, Any] = {"target_modules": "all-linear", "rest_every": 100}
    computed: dict[str, dict[str, Any]] = {
        "attention": {"target_modules": "attention"},
        "all-linear": {"target_modules": "all-linear"},
        "all-linear, embeddings averaged every 400 steps": {"target_modules": "all-linear", "rest_every": 400},
        "attention, int8": {"target_modules": "attention", "exchange": "int8"},
        "all-linear, embeddings every 100 steps": slow,
        "all-linear, embeddings every 100 steps, bfloat16": {**slow, "exchange": "bfloat16"},
        "all-linear, embeddings every 100 steps, int8": {**slow, "exchange": "int8"},
        "all-linear, embeddings every 100 steps, 2bit": {**slow, "exchange": "2bit"},
        "all-linear, embeddings every 100 steps, topk3": {**slow, "exchange": "topk3"},
        "all-linear, embeddings every 100 steps, topk1": {**slow, "exchange": "topk1"},
        "all-linear, embeddings every 100 steps, 4 fragments": {**slow, "fragments": 4},
        "all-linear, embeddings every 100 steps, 2bit, 4 fragments": {**slow, "exchange": "2bit", "fragments": 4},
    }
    result: dict[str, Any] = {"model": "GPT-2 124M", "heads": 4, "rank": 4, "merge_every": 10, "computed": {}}
    for ranks in (2, 4):
        for name, options in computed.items():
            figures = _figures(_gpt2_plan(**options), ranks)
            result["computed"][f"{name}, {ranks} ranks"] = figures
            print(
                f"{name}, {ranks} ranks: DDP {short_bytes(figures['ddp_per_step'])} a step; adapted matrices "
                f"{figures['adapted_ratio']:.0f} times less, whole model {figures['whole_ratio']:.1f} times less; "
                f"at most {short_bytes(figures['most_at_one_step'])} at one step"
            )
    result["counted"] = {exchange: _counted(exchange) for exchange in get_args(Compression)}
    result["counted"]["2bit, 2 fragments"] = _counted("2bit", fragments=2)
    print("counted:", result["counted"])
    print("written to", save("traffic", result).name)


def _gpt2_plan(**options: Any) -> lowrank.Plan:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    return lowrank.apply_(model, lowrank.methods.lte(rank=4, heads=4, merge_every=10, **options))


def _figures(plan: lowrank.Plan, ranks: int) -> dict[str, float]:
    found = forecast(plan, ranks)
    words = merge_words(plan, ranks) * len(found.merges) / (found.merge_every or 1)
    return {
        "ddp_per_step": found.ddp,
        "ddp_adapted_per_step": found.ddp_adapted,
        "merge": found.merge,
        "average": found.average,
        "rest_every": found.rest_every,
        "most_at_one_step": found.most,
        "per_step": found.per_step + words,
        "adapted_ratio": found.ddp_adapted / found.adapted_per_step,
        "whole_ratio": found.ddp / (found.per_step + words),
    }


def _counted(exchange: str, fragments: int = 1) -> dict[str, Any]:
    """Two processes train a small model; their log's bytes beside what is computed for each step."""
    from lowrank.recipes.gpt import gpt_mini
    from lowrank.run.overrides import override, resolve
    from lowrank.run.session import open_session

    settings = {"method": "lte", "steps": STEPS, "eval-batches": 1, "eval-every": 100, "batch-size": 4, **SMALL}
    settings |= {"method.exchange": exchange, "method.fragments": fragments}
    plan = open_session(resolve(override(gpt_mini(), settings))).plan
    found = forecast(plan, RANKS)
    synchronised = [found.synchronisation(step) for step in range(1, STEPS + 1)]
    expected = [sent + merge_words(plan, RANKS) if sent else 0 for sent in synchronised]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        launch([f"--{name}={value}" for name, value in settings.items()], out)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    sent = [record["bytes_sent"] for record in log if "loss" in record]
    if sent != expected:
        raise SystemExit(f"computed {expected} and counted {sent} differ")
    return {"model": "gpt-mini, 2 layers 32 wide", "ranks": RANKS, "bytes_sent": sent, "computed": expected}


def launch(options: list[str], out: Path) -> None:
    """Train ``gpt-mini`` with these options on two ranks of this machine into ``out``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lowrank", "train", "gpt-mini", *options, f"--out={out}", "--quiet"]
    started = [
        subprocess.Popen(command, env={**os.environ, **group, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(RANKS)
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit("a rank has failed")


if __name__ == "__main__":
    main()
