"""Four ranks as two workers of two: ``python -m tests.ranks.mesh FOLDER [start]``.

The scenarios are those of ``worker``, which two ranks run as two workers of one each: the numbers must be the same,
whether the ranks of a worker hold its model whole or in parts.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.ranks import worker
from tests.ranks.launch import as_rank, message_of
from tests.ranks.planned import counted
from tests.ranks.worker import Result, lte

import lowrank
from lowrank.distributed.collectives import share
from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.workers import process_layout

WORKERS = 2
NAMES = [  # of those with one head a worker: with more, each rank's rows are split otherwise than two ranks' are
    *("lte", "lte-train", "lte-reset", "lte-reset-train", "lte-per-layer", "lte-local", "lte-outer", "lte-tokens-even"),
    *("lte-bfloat16", "lte-int8", "lte-int8-reset", "lte-overlap", "lte-overlap-int8", "lte-overlap-nan", "lte-nan"),
    *("full-local", "explorers", "explorers-svd-two", "explorers-per-layer", "explorers-nan"),
    *("full", "lora", "dora", "relora", "galore", "galore-per-layer", "apollo"),
]
EXTRA = {"explorers-svd-two": partial(worker.trained, method=worker.explorers(basis="svd"))}


# What resumes bitwise, and what one process does too; GPT-2 keeps its weights transposed, and so the outer momentum.
TOGETHER = {"method.rest": "train", "method.rest_every": None, "method.outer_momentum": 0.5}
FROZEN = {"method.rest": "freeze", "method.rest_every": None, "batch-size": 6}  # six rows: one and two a rank


def scenario(name: str) -> Any:
    return EXTRA.get(name) or worker.SCENARIOS[name][0]


def talking(ranks: ProcessGroup) -> Result:
    """Workers that speak as one: sums and gatherings of sizes that do and do not go round the ranks of one."""
    layout = process_layout(ranks, WORKERS)
    workers, intra_worker = layout.workers, layout.intra_worker
    assert workers is not None
    assert intra_worker is not None
    before = torch.tensor([ranks.traffic.sent, ranks.traffic.between])
    tensors = [torch.arange(n, dtype=torch.float64) + 10 * workers.rank for n in (1, 3, 4)]
    gathered = workers.gather(tensors)
    later = workers.start_gather(tensors)
    workers.sum_(tensors)
    objects = workers.gather_objects({"worker": workers.rank})
    told = torch.full((2,), float(ranks.rank))
    intra_worker.broadcast_([told], 1)
    after = torch.tensor([ranks.traffic.sent, ranks.traffic.between])
    return {
        "place": (
            workers.rank,
            intra_worker.rank,
            [*intra_worker.numbers],
            [*(layout.cross_worker.numbers if layout.cross_worker else ())],
        ),
        "gathered": gathered,
        "later": later(),
        "sums": tensors,
        "objects": objects,
        "told": told,
        "sent": (after - before).tolist(),
    }


def refused(ranks: ProcessGroup) -> Result:
    """What cannot be, each with its message."""
    return {
        "three": message_of(lambda: process_layout(ranks, 3)),
        "none": message_of(lambda: process_layout(ranks, 0)),
        "heads": message_of(lambda: lowrank.apply_(worker.mlp(), lte(heads=2, rest="freeze"), ranks=ranks)),
    }


def mesh_run(**options: Any) -> Any:
    """Nine steps of LTE with a local rest, two workers of two ranks that hold their model in parts."""
    from lowrank.run.overrides import override, resolve

    mesh = {"engine": "fsdp", "workers": 2, "batch-size": 8, "method.heads": 2, "device": "cpu", "method.rest": "local"}
    often = {"method.rest_every": 3, "checkpoint-every": 3, "eval-every": 3}
    return resolve(override(worker.tiny_run(), {**mesh, **often, **options}))


def runs(ranks: ProcessGroup, folder: Path) -> Result:
    """The loop on the mesh: straight, and stopped by one rank and gone on with."""
    from lowrank.train.loop import train

    seldom = {"eval-every": 9, "checkpoint-every": 9}  # what they say is in the next record
    found = {"local": train(mesh_run(**seldom), folder / "local", quiet=True)}
    found["straight"] = train(mesh_run(**TOGETHER), folder / "straight", quiet=True)
    train(mesh_run(**TOGETHER, **{"stop-at": 6}), folder / "stopped", quiet=True)
    train(mesh_run(**TOGETHER), folder / "stopped", resume=True, quiet=True)
    text = folder / f"text-{share(2, 0, 1)[ranks.rank // 2]}.txt"
    if ranks.rank % 2 == 0:
        text.write_text(f"Node {ranks.rank // 2} reads this. " * (200 + 100 * ranks.rank))
    ranks.total(0.0)
    own = {"own-data": True, "data": str(text), "method.weigh": "tokens", "eval-batches": None, "batch-size": 9}
    found["own"] = train(mesh_run(**own), folder / "own", quiet=True)
    found["frozen"] = train(mesh_run(**FROZEN), folder / "frozen", quiet=True)
    messages = {
        "own-refused": {**own, "data": str(folder / f"text-{ranks.rank % 2}.txt")},
        "heads": {"method.heads": 5},
    }
    for name, options in messages.items():
        refused_run = partial(train, mesh_run(**options), folder / "refused", quiet=True)
        found[name] = {"message": message_of(refused_run)}
    return found


def found(ranks: ProcessGroup, folder: Path) -> Result:
    found: Result = {"talking": talking(ranks), "refused": refused(ranks)}
    found["planned"] = counted(ranks, ("lte", "lte-mesh"))
    for name in NAMES:
        poison = {"poison": 3} if "nan" in name else {}
        for sharded in (True, False) if name in ("lte-local", "lte-train", "galore") else (True,):
            function = partial(scenario(name), workers=WORKERS, sharded=sharded, **poison)
            found[name if sharded else f"{name}-whole"] = function(ranks)
    return {**found, "runs": runs(ranks, folder)}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    as_rank(place, "mesh", partial(found, folder=place))
