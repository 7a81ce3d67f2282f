"""LLaMA on C4, as the GaLore family reports it, and a small one for any text.

The five sizes follow GaLore's scripts (arXiv 2403.03507): bfloat16 weights, sequences of 256 tokens, one document each,
T5's tokenizer, 512 sequences a step, warm-up of a tenth, cosine to a tenth, no decay, no clipping (7B's script asks for
1.0, which has no effect on steps layer by layer). Other shapes: ``--model.size 35m``. Where the papers chose the
learning rate from a grid and printed no choice (full, LoRA, ReLoRA), ours is named in the recipe and yours to tune.
Published perplexities carry a known flaw; compare them with ``published_convention`` in the log, and judge by
``val_loss``.
"""

from __future__ import annotations

from dataclasses import replace

from lowrank.run.overrides import override
from lowrank.run.run import Call, Run, Settings

_LORA: Settings = {"lr": 3e-3, "method.target_modules": "all-linear", "method.rank": 32, "method.alpha": 32}

_RATIOS = {"embedding_lr": 10.0, "head_lr": 10.0}
_FULL: Settings = {"lr": 3e-3, "warmup": 0.2, **{f"method.{name}": ratio for name, ratio in _RATIOS.items()}}

# Learning rates of llama-mini from the grid in docs/log.md, or arena-llama's where they were better here too.
_MINI: dict[str, Settings] = {
    "*": {"lr": 1e-3, "warmup": 0.1},
    "full": _FULL,
    "full_8bit": _FULL,
    "diloco": _FULL,
    "@projected": {"lr": 3e-2, "method.rank": 32, "method.refresh_every": 50},
    "muon": {"lr": 2e-2},
    "galore_muon": {"lr": 3e-2},
    "ldadam": {"lr": 1e-2},
    "scale": {"lr": 1e-2},
    "soap": {"lr": 3e-3},
    "dion": {"lr": 3e-2, "method.rank": 32},
    "adafactor": {"lr": 1e-2},
    "lora_rite": {"lr": 1e-2, "method.rank": 32},
    "lora_muon": {"lr": 2e-2, "method.rank": 32},
    "apollo": {"lr": 1e-2},
    "apollo_mini": {"lr": 1e-2, "method.rank": 1},
    "frozen": {"method.target_modules": "all-linear"},
    "lora": _LORA,
    "relora": {**_LORA, "method.merge_every": 100},
    "multihead_lora": {"lr": 3e-3, "method.rank": 8},
    "lte": {"lr": 3e-3, "method.rank": 8},
    "lte_galore": {"lr": 3e-3, "method.rank": 8, "method.galore_rank": 32, "method.refresh_every": 50},
}


def llama_mini() -> Run:
    """Four layers 128 wide on bytes of any text: offline, minutes on two cores.

    Command:  lowrank train llama-mini --data FILE --method galore --method.rank 32
    Time:     about a minute on 2 cores, 300 steps of 16 × 128 bytes
    Expected: validation loss below 2.0 nats a byte with GaLore on news text, the unigram entropy being 3.1
    """
    return Run(
        recipe="llama-mini",
        task="text",
        model=Call(name="llama", args={"hidden": 128, "feed_forward": 352, "n_head": 4, "n_layer": 4}),
        data=Call(name="text", args={"source": "builtin", "tokenizer": "bytes", "context": 128}),
        method=Call(name="full", args=_RATIOS),
        steps=300,
        lr=3e-3,
        warmup=0.2,
        weight_decay=0.0,
        max_grad_norm=None,
        batch_size=16,
        eval_every=100,
        eval_batches=32,
        per_method=_MINI,
    )


def llama_60m() -> Run:
    """LLaMA 60M on C4, 10,000 steps (1.3 B tokens with padding).

    Command:  lowrank train llama-60m --method galore --device cuda
    Time:     some hours on one GPU
    Expected: published perplexity 34.88 for GaLore, 34.06 for full training (`published_convention`)
    """
    return _c4("60m", steps=10_000, micro_batch=256, rank=128)


def llama_130m() -> Run:
    """LLaMA 130M on C4, 20,000 steps.

    Command:  lowrank train llama-130m --method galore --device cuda
    Time:     about a day on one GPU
    Expected: published perplexity 25.36 for GaLore, 25.08 for full training
    """
    return _c4("130m", steps=20_000, micro_batch=256, rank=256, apollo_rank=192, mini_scale=192.0)


def llama_350m() -> Run:
    """LLaMA 350M on C4, 60,000 steps.

    Command:  lowrank train llama-350m --method galore --device cuda
    Time:     days on one GPU
    Expected: published perplexity 18.95 for GaLore, 18.80 for full training
    """
    return _c4("350m", steps=60_000, micro_batch=128, rank=256)


def llama_1b() -> Run:
    """LLaMA 1B on C4, 100,000 steps; GaLore's rank is the paper's 512 (its script says 1024).

    Command:  lowrank train llama-1b --method galore --device cuda
    Time:     weeks on one GPU
    Expected: published perplexity 15.64 for GaLore, 15.56 for full training
    """
    return _c4("1b", steps=100_000, micro_batch=16, rank=512, apollo_rank=256, fira_scale=0.0625)


def llama_7b() -> Run:
    """LLaMA 7B on C4, 150,000 steps, 8-bit GaLore with per-layer updates.

    Command:  lowrank train llama-7b --device cuda
    Time:     months on one GPU; the point is the memory, which lowrank plan llama-7b predicts: accumulation over
              micro-batches keeps whole gradients in a refresh, and a step of one micro-batch (--grad-accum 1) does not.
              Other methods step all layers at once, unless --per-layer asks for it
    Expected: published perplexity 14.65 for 8-bit GaLore, 14.61 for 8-bit Adam
    """
    base = _c4(
        "7b",
        steps=150_000,
        micro_batch=1,
        rank=1024,
        apollo_rank=256,
        fira_rank=64,
        fira_scale=0.0625,
        lr=5e-3,
        refresh=500,
    )
    layers: dict[str, Settings] = {"*": {"lr": 1e-3, "per_layer": False}, "galore_8bit": {"per_layer": True}}
    return override(replace(base, per_method={**base.per_method, **layers}), {"method": "galore_8bit"})


def _c4(
    size: str,
    *,
    steps: int,
    micro_batch: int,
    rank: int,
    apollo_rank: int | None = None,
    fira_rank: int | None = None,
    fira_scale: float = 0.25,
    mini_scale: float = 128.0,
    lr: float = 1e-2,
    refresh: int = 200,
) -> Run:
    adapter: Settings = {
        "lr": 1e-3,
        "method.target_modules": "all-linear",
        "method.rank": rank,
        "method.alpha": 32,
        "method.dropout": 0.05,
    }
    return Run(
        recipe=f"llama-{size}",
        task="text",
        model=Call(name="llama", args={"size": size, "vocab_size": 32_000}),
        data=Call(name="stream", args={"source": "c4", "tokenizer": "t5-base", "context": 256, "packing": "documents"}),
        method=Call(name="full"),
        steps=steps,
        lr=1e-3,
        warmup=0.1,
        weight_decay=0.0,
        max_grad_norm=None,
        batch_size=micro_batch,
        grad_accum=512 // micro_batch,
        precision="bf16-weights",
        eval_every=1000,
        eval_batches=max(1, 38_400 // micro_batch),
        log_every=10,
        checkpoint_every=1000,
        per_method={
            "*": {"lr": 1e-3},
            "@projected": {"lr": lr, "method.rank": rank, "method.refresh_every": refresh},
            "apollo": {"method.rank": apollo_rank or rank},
            "apollo_mini": {"method.rank": 1, "method.scale": mini_scale},
            "fira": {"method.rank": fira_rank or rank, "method.scale": fira_scale},
            "lora": adapter,
            "relora": {**adapter, "method.merge_every": 1000},
        },
    )
