"""GPT-2 shapes: from minutes on a laptop's processor to the 124M model.

Learning rates and other settings differ by method: they stand in `per_method`, in the words of the command line, and go
into `run.json` with the rest. From scratch the rest of the model (embeddings, norms, biases) trains under every method;
fine-tuning freezes it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowrank.infra.convert import Setting
from lowrank.run.run import Call, Run, Settings

# What the methods want in a run of a few hundred steps; the rates are those of docs/log.md.
_MINI: dict[str, Settings] = {
    "*": {"lr": 1e-3},
    "@adapter": {"method.rank": 8, "method.target_modules": "all-linear"},
    "@projected": {"lr": 3e-2, "method.rank": 32, "method.refresh_every": 50},
    "muon": {"lr": 1e-2},
    "scale": {"lr": 1e-2},
    "frozen": {"lr": 3e-3, "method.target_modules": "all-linear"},
    "lora": {"lr": 3e-3},
    "dora": {"lr": 3e-3},
    "multihead_lora": {"method.rank": 4, "method.heads": 4},
    "lte": {"lr": 3e-3, "method.rank": 4, "method.heads": 4, "method.merge_every": 10},
    "relora": {"method.merge_every": 100},
    "apollo": {"lr": 1e-2},
    "apollo_mini": {"lr": 3e-3, "method.rank": 1},
    "lte_galore": {"lr": 3e-3, "method.galore_rank": 32, "method.refresh_every": 50},
}


def gpt_mini() -> Run:
    """Four layers 128 wide on bytes of Python's own documentation: offline, minutes on two cores.

    Command:  lowrank train gpt-mini --method lte
    Time:     about half a minute on 2 cores, 400 steps of 16 × 128 bytes
    Expected: validation loss about 2.3 nats a byte with full training; the unigram entropy is 3.3
    """
    return _mini("gpt-mini", source="builtin", tokenizer="bytes", context=128, steps=400)


def shakespeare_char() -> Run:
    """nanoGPT's tiny Shakespeare by characters on a processor: 4 layers 128 wide, context 64.

    Command:  lowrank train shakespeare-char
    Time:     a few minutes on 2 cores, 2,000 steps of 12 × 64 characters
    Expected: validation loss about 1.9 nats a character (nanoGPT reports 1.88 for the same shape and budget)
    """
    run = _mini("shakespeare-char", **_SHAKESPEARE, context=64, steps=2000)
    return replace(run, warmup=100, batch_size=12, eval_every=250, eval_batches=20, checkpoint_every=500)


def babygpt() -> Run:
    """nanoGPT's baby GPT, 6 layers × 6 heads × 384, on tiny Shakespeare by characters.

    Command:  lowrank train babygpt --device cuda --precision bf16
    Time:     a few minutes on one GPU, 5,000 steps of 64 × 256 characters; hours on a processor
    Expected: best validation loss about 1.47 nats a character (nanoGPT's figure), after which it overfits
    """
    run = _mini("babygpt", **_SHAKESPEARE, context=256, steps=5000)
    model = Call(name="gpt2", args=_shape(layers=6, heads=6, width=384) | {"dropout": 0.2})
    return replace(run, model=model, warmup=100, batch_size=64, eval_every=250, eval_batches=50, checkpoint_every=500)


def gpt2_pretrain() -> Run:
    """GPT-2 124M from scratch on CNN/DailyMail with LTE on the attention layers, 4 heads of rank 4, merged every 10.

    Command:  lowrank train gpt2-pretrain --device cuda --precision bf16
    Time:     minutes on one recent GPU, 500 steps of 8 × 512 tokens; `lowrank plan gpt2-pretrain` costs nothing
    Expected: 96.619 M of 124.083 M parameters train with the attention biases frozen, and the loss falls from 10.9
              towards 6.5 (a budget for comparing methods, not a finished model)
    """
    lte: Settings = {"target_modules": "attention", "rank": 4, "heads": 4, "merge_every": 10}
    return Run(
        recipe="gpt2-pretrain",
        task="text",
        model=Call(name="gpt2", args=_shape(layers=12, heads=12, width=768) | {"vocab_size": 50304}),
        data=Call(name="text", args={"source": "cnn_dailymail", "tokenizer": "gpt2", "context": 512}),
        method=Call(name="lte", args=lte),
        steps=500,
        lr=6e-4,
        weight_decay=0.1,
        batch_size=8,
        eval_every=100,
        eval_batches=50,
        checkpoint_every=250,
        per_method={
            "*": {"lr": 6e-4},
            "frozen": {"method.target_modules": "attention"},
            "lora": {"method.target_modules": "attention", "method.rank": 4},
            "multihead_lora": {"method.target_modules": "attention", "method.rank": 4, "method.heads": 4},
            "lte": {f"method.{name}": value for name, value in lte.items()},
            "relora": {"method.target_modules": "attention", "method.rank": 4, "method.merge_every": 100},
        },
    )


def gpt2_slow_link() -> Run:
    """The run of gpt2-pretrain for ranks with a slow link between them: heads on every linear layer, so that only
    embeddings and norms are left to be averaged whole, every 100 steps; all of it travels as int8.

    Command:  torchrun --nproc-per-node 2 -m lowrank train gpt2-slow-link --data articles.csv
    Time:     that of gpt2-pretrain; `lowrank plan gpt2-slow-link` costs nothing
    Expected: between two ranks about half a megabyte a step on average, where DDP would send 498 MB
    """
    base = gpt2_pretrain()
    slow: Settings = {**base.method.args, "target_modules": "all-linear", "rest_every": 100, "exchange": "int8"}
    own: Settings = {f"method.{name}": value for name, value in slow.items()}
    method = Call(name="lte", args=slow)
    return replace(base, recipe="gpt2-slow-link", method=method, per_method={**base.per_method, "lte": own})


def gpt2_finetune() -> Run:
    """Pre-trained GPT-2 (the hub's, or any causal LM in a folder) with LoRA of rank 8 on CNN/DailyMail.

    Command:  lowrank train gpt2-finetune --model.path FOLDER --data articles.csv --device cuda --precision bf16
    Time:     minutes on one GPU, 500 steps of 8 × 512 tokens
    Expected: validation loss a little below the untouched model's (`lowrank eval gpt2 --data articles.csv`)
    """
    return Run(
        recipe="gpt2-finetune",
        task="text",
        model=Call(name="pretrained", args={"path": "gpt2"}),
        data=Call(name="text", args={"source": "cnn_dailymail", "tokenizer": "gpt2", "context": 512}),
        method=Call(name="lora", args={"target_modules": "attention", "rank": 8}),
        steps=500,
        lr=2e-4,
        weight_decay=0.0,
        batch_size=8,
        eval_every=100,
        eval_batches=50,
        checkpoint_every=250,
        per_method={
            "*": {"lr": 2e-4},
            "full": {"lr": 2e-5},
            "full_8bit": {"lr": 2e-5},
            "muon": {"lr": 2e-5},
            "scale": {"lr": 2e-5},
            "lora": {"method.target_modules": "attention", "method.rank": 8},
            "dora": {"method.target_modules": "attention", "method.rank": 8},
            "relora": {"method.target_modules": "attention", "method.rank": 8, "method.merge_every": 100},
        },
    )


_SHAKESPEARE: dict[str, Any] = {"source": "tiny-shakespeare", "tokenizer": "chars", "val_fraction": 0.1}


def _mini(recipe: str, *, steps: int, **data: Setting) -> Run:
    """A small GPT from scratch."""
    return Run(
        recipe=recipe,
        task="text",
        model=Call(name="gpt2", args=_shape(layers=4, heads=4, width=128)),
        data=Call(name="text", args=data),
        method=Call(name="full"),
        steps=steps,
        eval_batches=32,
        per_method=_MINI,
    )


def _shape(*, layers: int, heads: int, width: int) -> dict[str, int]:
    return {"n_layer": layers, "n_head": heads, "n_embd": width}
