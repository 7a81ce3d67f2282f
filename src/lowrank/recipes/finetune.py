"""Fine-tuning any causal language model on examples: pairs, chats or texts.

The rates are those of "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025): LoRA on every linear layer,
α = 32 at scale α/r, so that the best rate hardly depends on the rank, and is about ten times that of full training;
batches small, since LoRA bears large ones less well. Full training at 2e-5 is Alpaca's. docs/finetuning.md says more.
"""

from __future__ import annotations

from lowrank.run.run import Call, Run, Settings

FULL, LORA = 2e-5, 2e-4
_LORA: Settings = {"target_modules": "all-linear", "rank": 8, "alpha": 32}
_ADAPTER: Settings = {f"method.{name}": value for name, value in _LORA.items()}


def finetune() -> Run:
    """Your model on your examples: LoRA on all linear layers, the loss on the answers alone.

    Command:  lowrank train finetune --model.path MODEL --data pairs.jsonl
    Time:     minutes for a model of a few hundred million parameters on one GPU, 500 steps of 4 rows
    Expected: validation loss below the untouched model's (`lowrank eval` of step 0 and of the end)
    """
    return Run(
        recipe="finetune",
        task="text",
        model=Call(name="pretrained", args={"path": "", "dtype": "auto"}),
        data=Call(name="examples"),
        method=Call(name="lora", args=_LORA),
        steps=500,
        lr=LORA,
        warmup=0.03,
        weight_decay=0.0,
        batch_size=4,
        eval_every=100,
        eval_batches=50,
        checkpoint_every=100,
        per_method={
            "*": {"lr": FULL},
            "@adapter": {"lr": LORA, "method.target_modules": "all-linear", "method.rank": 8},
            "@projected": {"lr": 8e-5, "method.rank": 64},  # at GaLore's scale of 1/4 that is full training's
            "lora": _ADAPTER,
            "dora": _ADAPTER,
            "pissa": {"lr": FULL},
            "lora_plus": {"lr": FULL},  # B learns 16 times as fast
            "relora": {**_ADAPTER, "method.merge_every": 100},
            "multihead_lora": {"method.rank": 4, "method.heads": 4},
            "lte": {"method.rank": 4, "method.heads": 4},
            "apollo": {"lr": FULL},
            "apollo_mini": {"lr": FULL, "method.rank": 1},
        },
    )
