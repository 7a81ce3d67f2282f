"""Runs so small that a test can afford them, on text that is committed."""

from __future__ import annotations

from pathlib import Path

from lowrank.recipes.gpt import gpt_mini
from lowrank.run.overrides import override, resolve
from lowrank.run.run import Run

TEXT = Path(__file__).with_name("text.txt")  # the Apache licence, 11 KB of English

SMALL = {
    "frozen": {},
    "apla": {"method.target_modules": "o"},
    "lora": {"method.rank": 2},
    "rslora": {"method.rank": 2},
    "dora": {"method.rank": 2},
    "pissa": {"method.rank": 2},
    "lora_plus": {"method.rank": 2},
    "multihead_lora": {"method.rank": 2, "method.heads": 2},
    "lte": {"method.rank": 2, "method.heads": 2, "method.merge_every": 4},
    "relora": {"method.rank": 2, "method.merge_every": 4},
    "galore": {"method.rank": 4, "method.refresh_every": 4},
    "galore_8bit": {"method.rank": 4, "method.refresh_every": 4},
    "galore_adafactor": {"method.rank": 4, "method.refresh_every": 4},
    "apollo": {"method.rank": 4, "method.refresh_every": 4},
    "apollo_mini": {"method.refresh_every": 4},
    "fira": {"method.rank": 4, "method.refresh_every": 4},
    "galore_muon": {"method.rank": 4, "method.refresh_every": 4},
    "ldadam": {"method.rank": 4},
    "diloco": {"method.heads": 2, "method.merge_every": 4},
    "lte_galore": {"method.rank": 2, "method.heads": 2, "method.merge_every": 4, "method.galore_rank": 4},
}


def tiny(method: str = "full", **changes: object) -> Run:
    """gpt-mini shrunk to 2 layers × 32, context 16, batches of 4, 8 steps of ``method``."""
    base = {
        "data": str(TEXT),
        "data.context": 16,
        "model.n_layer": 2,
        "model.n_head": 2,
        "model.n_embd": 32,
        "batch-size": 4,
        "steps": 8,
        "eval-every": 4,
        "eval-batches": 4,
        "checkpoint-every": 4,
        "warmup": 2,
        "device": "cpu",
        "method": method,
        **SMALL.get(method, {}),
    }
    named = {name.replace("__", ".") if "__" in name else name.replace("_", "-"): v for name, v in changes.items()}
    return resolve(override(gpt_mini(), base | named))
