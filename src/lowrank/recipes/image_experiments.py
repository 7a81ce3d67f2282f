"""The experiments on images (``experiments`` has those on text, and what they have in common)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowrank.infra.convert import Setting
from lowrank.infra.registry import register
from lowrank.recipes.experiments import PAPER_RATES, RATES, Preset, Size, about_of, contenders_of
from lowrank.recipes.vit import vit_finetune, vit_mini, vit_segment
from lowrank.run.experiment import Experiment
from lowrank.run.overrides import override


@register("experiment", "vit-ranks")
def vit_ranks(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """Figures 9 and 10 of the ancestor: LoRA's rank on a ViT, beside full fine-tuning, the probe, and APLA.

    As published the scale was ``alpha // rank`` in whole numbers: 0 for rank 8 under alpha 4, so that what was called
    LoRA was a linear probe; and full fine-tuning had the rate 0.005.
    """
    base = vit_finetune()
    start = None
    if size == "small":
        shape: dict[str, Setting] = {"model.patch_size": 7, "model.width": 64, "model.depth": 4, "model.heads": 4}
        start = override(vit_mini(), {**shape, "data": "digits", "steps": 600, "lr": 1e-3, "eval_every": "never"})
        base = override(vit_mini(), {**shape, "data": "pneumoniamnist", "steps": 300, "checkpoint_every": 300})
        base = replace(base, eval_every=20, log_every=2, keep=1)
    methods: dict[str, dict[str, Any]] = {
        "full": {"method": "full"},
        "probe": {"method": "linear_probe"},
        "apla": {"method": "apla"},
    }
    ranks = (1, 4, 16) if size == "small" else (1, 2, 4, 8, 16, 32, 64)
    methods |= {f"lora r{rank}": {"method": "lora", "method.rank": rank} for rank in ranks}
    rates = (3e-4, *RATES) if size == "small" else (1e-5, *PAPER_RATES)
    space: dict[str, Sequence[Setting]] = {"lr": rates, "weight_decay": (0.0, 0.1), "warmup": (0.05, 0.2)}
    if preset == "as-published":
        methods = {
            "full at 0.005": {"method": "full", "lr": 5e-3},
            "lora r8 alpha 4 (a probe)": {"method": "linear_probe", "lr": 5e-3},
        }
    about = about_of(size, preset) | {"metric": "test_auc", "lower": False, "unit": "AUC"}
    if size == "small":
        about["caveat"] = (
            "Four layers 64 wide, begun by 600 steps on scikit-learn's digits, 300 steps of 32 images of 28 pixels: "
            "it says nothing of a ViT-B that was pre-trained on natural images at 224 pixels."
        )
    return Experiment(
        name="vit-ranks",
        question="Does LoRA fine-tune a ViT better than full fine-tuning, in fewer steps, and does its rank matter?",
        contenders=contenders_of(base, methods, size, preset, space=space, start=start),
        baseline=next(iter(methods)),
        **about,
    )


@register("experiment", "tissue")
def tissue(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """Ours: grey and white matter of T1 slices, segmented by six methods.

    Odd slices train, even ones are reported, and a slice lies between neighbours of different splits. The paper's size
    has longer runs on the same slices: there is one template.
    """
    steps = 240 if size == "small" else 2400
    base = override(vit_segment(), {"steps": steps, "eval_every": "never", "checkpoint_every": steps, "keep": 1})
    names = ("full", "linear_probe", "lora", "galore", "apla", "lte_galore")
    space: dict[str, Sequence[Setting]] = {"lr": RATES, "weight_decay": (0.0, 0.1), "warmup": (0.05, 0.2)}
    about = about_of(size, preset) | {"metric": "test_dice", "lower": False, "unit": "Dice", "test_batches": None}
    about["trials"] = 8
    if size == "small":
        about["seeds"] = (1, 2, 3)
    about["caveat"] = (
        "One head, an averaged template of 152 of them, and an encoder of four layers 96 wide that starts from "
        "scratch: what is frozen was drawn, not learnt. It says nothing of a pre-trained encoder or of patients."
    )
    return Experiment(
        name="tissue",
        question="Which method segments tissue best with a small ViT from scratch, and what does it train and hold?",
        contenders=contenders_of(base, {n: {"method": n} for n in names}, size, preset, space=space),
        baseline="full",
        **about,
    )
