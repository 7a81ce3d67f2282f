"""Two nodes of two ranks on a link of 100 Mbit/s: FSDP over all four, against FSDP inside each node and LTE, or local
training, between them.

    python -m benchmarks.mesh

The nodes are two network namespaces of this machine with a core each (``benchmarks.link``); inside a node nothing is
throttled. In one run, on the same batches (16 × 128 bytes of text), the shape of babygpt (6 layers 384 wide, 10.7 M):

    fsdp         full training, sharded over all four ranks
    local        full training, sharded inside each node; weights averaged between the nodes every 40 steps
    attention    LTE on the attention layers, two heads a node, sharded inside it; the rest averaged every 40 steps
    all-linear   LTE on every linear layer

Reported are seconds a step, bytes that a rank sends a step in all and to the other node, and tokens per second as times
those of ``fsdp``. ProcessGroup of one node share its core, so only the ratios mean anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common import save
from benchmarks.link import MODELS, on_a_link, ours
from lowrank.distributed.process_group import joined
from lowrank.recipes.gpt import gpt_mini
from lowrank.run.overrides import override, resolve

LTE = {"method": "lte", "method.rank": 4, "method.heads": 4, "method.merge_every": 10, "workers": "nodes"}
RUNS: dict[str, dict[str, object]] = {
    "fsdp": {"method": "full"},
    "local": {"method": "full", "method.rest": "local", "workers": "nodes"},
    "attention": {**LTE, "method.target_modules": "attention"},
    "all-linear": {**LTE, "method.target_modules": "all-linear"},
}


def main() -> None:
    if "LOWRANK_LINK" not in os.environ:
        command = ["unshare", "-Urn", sys.executable, "-m", "benchmarks.mesh"]
        raise SystemExit(subprocess.run(command, env={**os.environ, "LOWRANK_LINK": "1"}, check=False).returncode)
    found = on_a_link("from benchmarks.mesh import rank; rank()", ranks_each=2)
    print(json.dumps(found, indent=2))
    print("written to", save("mesh", found).name)


def rank() -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    with joined(torch.device("cpu")) as ranks:
        assert ranks is not None
        for name, options in RUNS.items():
            common = {"steps": 1000, "batch-size": 16, "engine": "fsdp", **MODELS["6 layers 384 wide"]}
            run = resolve(override(gpt_mini(), {**common, **options}))
            few = {"before": 2, "steps": 6} if name == "fsdp" else {"before": 10, "steps": 40}
            found[name] = ours(run, ranks, **few)
            found[name]["times_fsdp"] = found["fsdp"]["step_seconds"] / found[name]["step_seconds"]
            if ranks.rank == 0:
                print(name, found[name], flush=True)
        if ranks.rank == 0:
            Path(os.environ["LOWRANK_LINK"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
