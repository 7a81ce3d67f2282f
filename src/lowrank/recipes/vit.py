"""Vision transformers on medical images: a small one for a laptop, fine-tuning, and the LTE paper's pre-training.

Learning rates differ by method, as in the recipes of `gpt`. From scratch everything that is not adapted trains (class
token, positions, norms, patch embedding); fine-tuning freezes what was loaded and always trains the new head
(`rest="auto"` does both; under `rest="freeze"` the head stays as it was drawn, so do not).
"""

from __future__ import annotations

from dataclasses import replace

from lowrank.run.run import Call, Run, Settings

# From scratch adapters go on all linear layers: on q and v alone they would leave those frozen as they were drawn.
# Projections are far below the width of 96: at the methods' own 128 they would compress nothing.
_MINI: dict[str, Settings] = {
    "*": {"lr": 1e-3},
    "@adapter": {"method.rank": 8, "method.target_modules": "all-linear"},
    "@projected": {"lr": 2e-3, "method.rank": 16, "method.refresh_every": 50},
    "linear_probe": {"lr": 1e-2},
    "apla": {"lr": 1e-2},
    "frozen": {"method.target_modules": "all-linear"},
    "dora": {"lr": 3e-3},
    "multihead_lora": {"lr": 3e-3, "method.rank": 4, "method.heads": 4},
    "lte": {"lr": 3e-3, "method.rank": 4, "method.heads": 4, "method.merge_every": 10},
    "relora": {"lr": 3e-3, "method.merge_every": 50},
    "apollo": {"lr": 1e-3},
    "apollo_mini": {"lr": 1e-3, "method.rank": 1},
    "lte_galore": {
        "lr": 2e-3,
        "method.rank": 4,
        "method.heads": 4,
        "method.merge_every": 10,
        "method.galore_rank": 16,
        "method.refresh_every": 50,
    },
}

_FINETUNE: dict[str, Settings] = {
    "*": {"lr": 1e-3},
    "full": {"lr": 1e-4},
    "full_8bit": {"lr": 1e-4},
    "muon": {"lr": 1e-4},
    "scale": {"lr": 1e-4},
    "linear_probe": {"lr": 1e-3},
    "apla": {"lr": 1e-4},
    "lora": {"lr": 1e-3, "method.rank": 8},
    "rslora": {"lr": 1e-3, "method.rank": 8},
    "dora": {"lr": 1e-3, "method.rank": 8},
    "pissa": {"lr": 3e-4, "method.rank": 8},
    "lora_plus": {"lr": 3e-4, "method.rank": 8},
    "galore": {"lr": 2e-4, "method.rank": 64},
    "galore_8bit": {"lr": 2e-4, "method.rank": 64},
    "apollo": {"lr": 1e-4, "method.rank": 64},
    "fira": {"lr": 2e-4, "method.rank": 64},
}


def vit_mini() -> Run:
    """Four layers 96 wide on images of 28 pixels, from scratch: digits offline, or any MedMNIST file.

    Command:  lowrank train vit-mini --data pneumoniamnist.npz --method lora --epochs 2
    Time:     under a minute on 2 cores for 2 epochs of 3,882 images
    Expected: PneumoniaMNIST, 10 epochs of full training: test AUC about 0.95
    """
    return Run(
        recipe="vit-mini",
        task="images",
        model=Call(name="vit-mini"),
        data=Call(name="images", args={"source": "digits"}),
        method=Call(name="full"),
        epochs=10,
        lr=1e-3,
        weight_decay=0.05,
        batch_size=32,
        eval_every=None,
        checkpoint_every=500,
        per_method=_MINI,
    )


def vit_finetune() -> Run:
    """ViT-B/16 at 224 pixels, pre-trained on natural images, with LoRA of rank 8 on q and v, on PathMNIST.

    Command:  lowrank train vit-finetune --device cuda --precision bf16
              lowrank train vit-finetune --model.weights FILE --data pathmnist_224.npz      (offline)
    Time:     about an hour on one recent GPU, 3 epochs of 89,996 images
    Expected: accuracy above the linear probe's 93.5 % and near full fine-tuning's 95.8 % (MedMNIST+ at 224 pixels,
              ViT-B/16)
    """
    return Run(
        recipe="vit-finetune",
        task="images",
        model=Call(name="vit", args={"name": "vit_base_patch16_224", "weights": "hub"}),
        data=Call(name="images", args={"source": "pathmnist", "size": 224}),
        method=Call(name="lora", args={"rank": 8}),
        epochs=3,
        lr=1e-3,
        weight_decay=0.0,
        batch_size=128,
        eval_every=None,
        checkpoint_every=500,
        per_method=_FINETUNE,
    )


def vit_3d() -> Run:
    """A small ViT on volumes by cubes of 7³ voxels, from scratch: any 3-D set of MedMNIST.

    Command:  lowrank train vit-3d --data organmnist3d.npz --method lora
              lowrank train vit-3d --data nodulemnist3d_64.npz --model.name vit_small_patch16_224 --model.weights FILE
                  --model.image_size 64                       (any 2-D weights; --model.by slices for the other way)
    Time:     2 minutes on 2 cores for 10 epochs of 960 volumes of 28 voxels a side; by slices five times that
    Expected: balls, rods and plates in noise are told apart (test accuracy 0.97); MedMNIST's own sets were not at hand
    """
    return replace(
        vit_mini(),
        recipe="vit-3d",
        model=Call(name="vit-3d"),
        data=Call(name="images", args={"source": "organmnist3d"}),
        method=Call(name="lora", args={"rank": 8}),
    )


def vit_pretrain() -> Run:
    """ViT-S/16 from scratch with LTE, 32 heads of rank 64 merged every 10 steps (arXiv 2402.16828, table 2).

    Command:  lowrank train vit-pretrain --data FOLDER --device cuda --precision bf16
    Time:     days on one GPU for a set of ImageNet's size; `lowrank plan vit-pretrain` costs nothing
    Expected: close to full training at the same number of steps, where 32 × 64 ranks cover the width of 384
    """
    return Run(
        recipe="vit-pretrain",
        task="images",
        model=Call(name="vit", args={"name": "vit_small_patch16_224"}),
        data=Call(
            name="images", args={"source": "pathmnist", "size": 224, "augment": ("hflip", "crop", "randaugment")}
        ),
        method=Call(name="lte", args={"target_modules": "all-linear", "rank": 64, "heads": 32, "merge_every": 10}),
        epochs=90,
        lr=1e-3,
        weight_decay=0.05,
        warmup=0.05,
        batch_size=1024,
        eval_every=None,
        checkpoint_every=1000,
        per_method={"*": {"lr": 1e-3}, "lte": {"method.rank": 64, "method.heads": 32, "method.merge_every": 10}},
    )


def vit_segment() -> Run:
    """Grey and white matter of T1 slices: four layers 96 wide with a decoder on their tokens, from scratch.

    Command:  lowrank train vit-segment --data mni152 --method lora --epochs 3
    Time:     half a minute on 2 shared cores, the report included
    Expected: mean test Dice 0.60 (grey matter 0.71, white matter 0.50) after 3 epochs of LoRA
    """
    return replace(
        vit_mini(),
        recipe="vit-segment",
        task="segmentation",
        model=Call(name="vit-mini-segment"),
        data=Call(name="masks", args={"source": "mni152"}),
        epochs=30,
        batch_size=3,
        per_method={**_MINI, **{name: {**_MINI[name], "method.heads": 3} for name in ("lte", "lte_galore")}},
    )
