"""GLUE on RoBERTa: GaLore's second benchmark (arXiv 2403.03507, table 4), with the settings of the papers.

LoRA as in its paper (arXiv 2106.09685: rank and α 8 on q and v, 6 % warm-up, linear decay); GaLore at rank 4, scale 4
and 3e-5, as in its paper; full training at 2e-5. `dev` is reported, once, at the end; the checkpoint is chosen by a
tenth of `train`, where the papers choose by `dev` itself, so that their averages over eight tasks (full 86.28, GaLore
85.89, LoRA 85.61, both at rank 4) are a little higher for that alone. Without --data the tables come from the hub.
"""

from __future__ import annotations

from lowrank.run.run import Call, Run, Settings

_GALORE: Settings = {"lr": 3e-5, "method.rank": 4, "method.scale": 4.0, "method.refresh_every": 500}
_PER_METHOD: dict[str, Settings] = {
    "*": {"lr": 2e-5},
    "@adapter": {"lr": 4e-4, "method.rank": 8},
    "@projected": {"lr": 3e-5, "method.rank": 4},
    "linear_probe": {"lr": 1e-3},
    "pissa": {"lr": 1e-4},
    "lora_plus": {"lr": 5e-5},
    "galore": _GALORE,
    "galore_8bit": _GALORE,
    "apollo_mini": {"method.rank": 1},
}


def _glue(name: str, *, batch_size: int = 16) -> Run:
    return Run(
        recipe=f"glue-{name}",
        task="sequences",
        model=Call(name="sequence-classifier", args={"path": "FacebookAI/roberta-base"}),
        data=Call(name="glue", args={"name": name}),
        method=Call(name="lora", args={"rank": 8, "alpha": 8}),
        epochs=30,
        lr=4e-4,
        warmup=0.06,
        schedule="linear",
        min_lr_ratio=0.0,
        weight_decay=0.01,
        batch_size=batch_size,
        eval_every=None,
        checkpoint_every=500,
        per_method={**_PER_METHOD, "lora": {"method.alpha": 8}},
    )


def glue_cola() -> Run:
    """Is a sentence acceptable English? 8,551 sentences; Matthews' correlation.

    Command:  lowrank train glue-cola --data CoLA --model.path roberta-base --method galore
    Time:     30 epochs: not measured
    Expected: not measured here; see the module for the paper's average
    """
    return _glue("cola", batch_size=32)


def glue_sst2() -> Run:
    """Is a review positive? 67,349 sentences; accuracy.

    Command:  lowrank train glue-sst2 --data SST-2 --model.path roberta-base
    Time:     30 epochs: not measured
    Expected: not measured here; see the module for the paper's average
    """
    return _glue("sst2")


def glue_mrpc() -> Run:
    """Do two sentences say the same? 3,668 pairs; F1.

    Command:  lowrank train glue-mrpc --data MRPC --model.path roberta-base
    Time:     30 epochs: not measured
    Expected: not measured here; see the module for the paper's average
    """
    return _glue("mrpc")


def glue_stsb() -> Run:
    """How alike are two sentences, from 0 to 5? 5,749 pairs; Pearson's and Spearman's correlation.

    Command:  lowrank train glue-stsb --data STS-B --model.path roberta-base
    Time:     30 epochs: not measured
    Expected: not measured here; see the module for the paper's average
    """
    return _glue("stsb")


def glue_qqp() -> Run:
    """Do two questions ask the same? 363,846 pairs; accuracy and F1.

    Command:  lowrank train glue-qqp --data QQP --model.path roberta-base
    Time:     30 epochs: not measured
    Expected: not measured here; see the module for the paper's average
    """
    return _glue("qqp")


def glue_mnli() -> Run:
    """Does one sentence follow from another, contradict it, or neither? 392,702 pairs; accuracy on the matched half.

    Command:  lowrank train glue-mnli --data MNLI --model.path roberta-base
    Time:     30 epochs: not measured
    Expected: not measured here; see the module for the paper's average
    """
    return _glue("mnli")


def glue_qnli() -> Run:
    """Does a sentence answer a question? 104,743 pairs; accuracy.

    Command:  lowrank train glue-qnli --data QNLI --model.path roberta-base
    Time:     30 epochs: not measured
    Expected: not measured here; see the module for the paper's average
    """
    return _glue("qnli")


def glue_rte() -> Run:
    """Does one sentence follow from another? 2,490 pairs; accuracy.

    Command:  lowrank train glue-rte --data RTE --model.path roberta-base
    Time:     30 epochs: not measured
    Expected: not measured here; see the module for the paper's average
    """
    return _glue("rte")


def glue_wnli() -> Run:
    """Which noun does a pronoun stand for? 635 pairs; accuracy, which few models raise above the majority's 56 %.

    Command:  lowrank train glue-wnli --data WNLI --model.path roberta-base
    Time:     30 epochs: not measured
    Expected: accuracy 0.56, the majority's
    """
    return _glue("wnli")
