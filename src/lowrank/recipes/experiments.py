"""The ancestor's experiments and ours by name, in a size for two cores and in one for a GPU.

Each function returns an :class:`~lowrank.run.experiment.Experiment`; `lowrank compare NAME` runs it, `--size paper` the
large one, `--preset as-published` what the ancestor's scripts did where that differs from what they meant. The rules
that all keep are in docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lowrank.infra.convert import Setting, nearest
from lowrank.infra.registry import Registry, register
from lowrank.recipes.gpt import gpt2_pretrain, gpt_mini
from lowrank.recipes.llama import llama_1b, llama_60m, llama_mini
from lowrank.recipes.vit import vit_finetune, vit_mini, vit_segment
from lowrank.run import own_files
from lowrank.run.experiment import Contender, Experiment
from lowrank.run.overrides import catalogue, override
from lowrank.run.run import Run

Size = Literal["small", "paper"]
Preset = Literal["as-meant", "as-published"]

EXPERIMENTS = Registry("experiment", "lowrank.recipes.experiments")

_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_FINE_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
_PAPER_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_SPACE: Mapping[str, Sequence[Setting]] = {
    "lr": _RATES,
    "method.embedding_lr": (1.0, 10.0),
    "method.head_lr": (1.0, 10.0),
    "warmup": (0.05, 0.2),
    "weight_decay": (0.0, 0.1),
}
_PAPER_SPACE: Mapping[str, Sequence[Setting]] = {
    **_SPACE,
    "lr": _PAPER_RATES,
    "method.betas": ((0.9, 0.95), (0.9, 0.999)),
    "method.vector_lr": (1.0, 0.1),
}
_LACKS: Mapping[str, tuple[str, ...]] = {  # of a model or a method: options of these spaces that it has no use for
    "gpt2": ("method.head_lr",),  # its output layer is its embedding
    "adafactor": ("method.betas",),
}
_TEXT_CAVEAT = (
    "Two layers 64 wide and five hundred steps of 512 bytes: seconds a run. It orders methods early in the training "
    "of tiny models and says nothing of models a thousand times larger, of long training, or of ranks far below the "
    "width."
)
_PAPER_CAVEAT = "The ancestor's or the papers' own size and length."


def find_experiment(name: str, **choices: str) -> Experiment | None:
    """The experiment of that name or of a file's function; None where the name is of something else.

    Args:
        name: such as ``arena-llama``, or ``file.py:function``.
        choices: ``size`` and ``preset``, and what else the function takes.

    Raises:
        ValueError: a choice that it does not have.
    """
    if name in EXPERIMENTS:
        offered = EXPERIMENTS.signature(name).kinds
        for choice, value in choices.items():
            if choice not in offered:
                raise ValueError(f"{name} has no --{choice}{nearest(choice, offered)}")
            allowed = ("small", "paper") if choice == "size" else ("as-meant", "as-published")
            if value not in allowed:
                raise ValueError(f"--{choice} {value}{nearest(value, allowed)}: it is {' or '.join(allowed)}")
        found: Experiment = EXPERIMENTS[name](**choices)
        return found
    if own_files.is_own(name):
        full, file, digest = own_files.given(name)
        made = own_files.load("experiment", full, {file: digest})
        own = made(**choices) if choices else made()
        return own if isinstance(own, Experiment) else None
    return None


# --- text ------------------------------------------------------------------------------------------------------------


@register("experiment", "heads-ranks-merge")
def heads_ranks_merge(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """Table 1 of the ancestor: LTE over heads, ranks and merge intervals, beside full training and one LoRA.

    At the small size at two lengths, 500 and 2,000 steps: what low rank costs grows with length.
    """
    base, about = _two_lengths(size, preset)
    cells = {f"lte {h}x{r} T{t}": _lte(h, r, t) for h, r, t in _TABLE_1[size]}
    others: dict[str, dict[str, Any]] = {
        "full": {"method": "full"},
        "frozen": {"method": "frozen", "method.target_modules": "all-linear"},
        "lora r16": {"method": "lora", "method.rank": 16},
        "multihead 4x4": {"method": "multihead_lora", "method.rank": 4, "method.heads": 4},
    }
    published = {} if preset == "as-meant" else {"method.target_modules": "attention", "lr": 6e-4}
    return Experiment(
        name="heads-ranks-merge",
        question="Do several small heads match full training of a GPT, and do heads, rank and merge interval matter?",
        contenders=_contenders(base, {**others, **cells}, size, preset, published),
        baseline="full",
        **about,
    )


_TABLE_1: Mapping[Size, Sequence[tuple[int, int, int]]] = {
    "small": ((2, 4, 10), (4, 1, 10), (4, 4, 10), (4, 4, 20), (4, 8, 10), (8, 4, 10)),
    "paper": (*((2, r, 10) for r in (1, 4, 8)), *((4, r, t) for r in (1, 4, 8) for t in (10, 20, 30, 40)), (8, 4, 10)),
}


@register("experiment", "sequential-parallel")
def sequential_parallel(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """Figures 5 and 6 of the ancestor: small updates one after the other, side by side, or both."""
    often = 50 if size == "small" else 100
    base, about = _two_lengths(size, preset)
    methods: dict[str, dict[str, Any]] = {
        "full": {"method": "full"},
        "lora r4": {"method": "lora", "method.rank": 4},
        "lora r16": {"method": "lora", "method.rank": 16},
        "sequential": {"method": "relora", "method.rank": 4, "method.merge_every": often},
        "parallel": {"method": "multihead_lora", "method.rank": 4, "method.heads": 4},
        "both": _lte(4, 4, 10),
    }
    return Experiment(
        name="sequential-parallel",
        question="Are several small updates better made one after the other, side by side, or both?",
        contenders=_contenders(base, methods, size, preset, {}),
        baseline="full",
        **about,
    )


@register("experiment", "layers-replaced")
def layers_replaced(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """Figure 7 of the ancestor: LoRA on attention alone, MLP alone, all; as meant at equal numbers trained.

    A layer of GPT-2 with width d has 6d·r numbers in its fused attention's factors and 10d·r in its MLP's, so ranks 40,
    24 and 15 train the same number; matrices that are not replaced are frozen.
    """
    ranks = {"attention": 40, "mlp": 24, "all-linear": 15}
    if preset == "as-published":
        ranks = dict.fromkeys(ranks, 4)
    methods: dict[str, dict[str, Any]] = {"full": {"method": "full"}}
    methods["frozen"] = {"method": "frozen", "method.target_modules": "all-linear"}
    for target, rank in ranks.items():
        own = {"method": "lora", "method.target_modules": target, "method.rank": rank}
        methods[f"lora {target}"] = own | {"method.freeze": ("*.attn.*.weight", "*.mlp.*.weight")}
    base, about = _two_lengths(size, preset)
    return Experiment(
        name="layers-replaced",
        question="Which layers should a LoRA replace: attention, MLP, or all, where each trains as many numbers?",
        contenders=_contenders(base, methods, size, preset, {}),
        baseline="lora all-linear",
        **about,
    )


@register("experiment", "adam-galore-memory")
def adam_galore_memory(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """Figure 8 of the ancestor: AdamW, AdamW in 8 bits, GaLore, GaLore in 8 bits; loss, and bytes at the peak."""
    methods: dict[str, dict[str, Any]] = {m: {"method": m} for m in ("full", "full_8bit", "galore", "galore_8bit")}
    methods["galore layer by layer"] = {"method": "galore", "per_layer": True}
    base = _llama(size) if size == "small" else llama_1b()
    return Experiment(
        name="adam-galore-memory",
        question="How much memory do GaLore and 8-bit states save, and what do they cost in loss?",
        contenders=_contenders(base, methods, size, preset, {}),
        baseline="full",
        **_about(size, preset),
    )


@register("experiment", "lte-galore")
def lte_galore(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """The ancestor's future work: LTE and GaLore together, each against its halves."""
    methods = {
        "galore": {"method": "galore"},
        "lte": _lte(4, 4, 10),
        "mixed": {"method": "lte_galore", "method.kind": "mixed", "method.rank": 4},
        "explorers": {"method": "lte_galore", "method.kind": "explorers", "method.rank": 4},
        "full": {"method": "full"},
    }
    return Experiment(
        name="lte-galore",
        question="Are LTE and GaLore together better than either half?",
        contenders=_contenders(_llama(size), methods, size, preset, {}),
        baseline="galore",
        **_about(size, preset),
    )


@register("experiment", "local-training")
def local_training(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """Ours: workers that talk every T steps alone, by whole weights (DiLoCo, MuLoCo) or heads of low rank (LTE)."""
    often = 30 if size == "small" else 100
    diloco = {"method": "diloco", "method.merge_every": often}
    methods: dict[str, dict[str, Any]] = {
        "full": {"method": "full"},
        "muon": {"method": "muon"},
        "diloco": diloco,
        "diloco muon": {**diloco, "method.inner": "muon"},
        "lte": _lte(4, 4, often),
        "lte outer": {**_lte(4, 4, often), "method.outer_lr": 0.7, "method.outer_momentum": 0.9},
    }
    return Experiment(
        name="local-training",
        question="What does it cost to talk every T steps alone, by whole weights or by heads of low rank?",
        contenders=_contenders(_llama(size), methods, size, preset, {}),
        baseline="full",
        **_about(size, preset),
    )


_ARENA = (
    "full",
    "full_8bit",
    "muon",
    "soap",
    "scale",
    "galore",
    "galore_muon",
    "apollo",
    "fira",
    "dion",
    "lora",
    "lte",
)


@register("experiment", "arena-llama")
def arena_llama(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """The catalogue under equal budgets: twelve methods at the small size, all of it at the papers'."""
    from lowrank.methods import METHODS

    names = [name for name in METHODS if name not in ("linear_probe", "apla")] if size == "paper" else list(_ARENA)
    methods = {name: {"method": name} for name in names if name in METHODS}
    return Experiment(
        name="arena-llama",
        question="Which method trains a LLaMA best from scratch, under equal budgets?",
        contenders=_contenders(_llama(size), methods, size, preset, {}),
        baseline="full",
        horizons=(0.5, 1.0),
        **_about(size, preset),
    )


@register("experiment", "lora-rate")
def lora_rate(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """Is LoRA's best learning rate ten times that of full fine-tuning, whatever the rank?"""
    base = _gpt(size)
    steps = 200 if size == "small" else 2000
    start = replace(override(base, {"method": "full"}), steps=steps, lr=3e-3, min_lr_ratio=0.0)
    methods: dict[str, dict[str, Any]] = {"full": {"method": "full"}}
    for rank in (1, 4, 16, 32):
        methods[f"lora r{rank}"] = {"method": "lora", "method.rank": rank, "method.rest": "freeze"}
    made = _contenders(base, methods, size, preset, {}, space={"lr": _FINE_RATES})
    return Experiment(
        name="lora-rate",
        question="Is LoRA's best learning rate ten times that of full fine-tuning, whatever the rank?",
        contenders=[replace(each, start=start) for each in made],
        baseline="full",
        shrink=2,
        **_about(size, preset),
    )


@register("experiment", "switching")
def switching(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """When to switch GaLore's subspace: at intervals, where it has moved (Q-GaLore), by exact SVD, or never."""
    every, never = (50, 500) if size == "small" else (200, 10_000)
    methods: dict[str, dict[str, Any]] = {
        "power": {"method.refresh_every": every},
        "svd": {"method.refresh_every": every, "method.basis": "svd"},
        "adaptive": {"method.refresh_every": every, "method.lazy": True},
        "adaptive svd": {"method.refresh_every": every, "method.lazy": True, "method.basis": "svd"},
        "never": {"method.refresh_every": never},
        "random": {"method.refresh_every": every, "method.basis": "gaussian"},
    }
    return Experiment(
        name="switching",
        question="Does an adaptive refresh of GaLore's subspace help, or only the exact SVD?",
        contenders=_contenders(
            _llama(size), {n: {"method": "galore", **own} for n, own in methods.items()}, size, preset, {}
        ),
        baseline="power",
        **_about(size, preset),
    )


# --- images ----------------------------------------------------------------------------------------------------------


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
    rates = (3e-4, *_RATES) if size == "small" else (1e-5, *_PAPER_RATES)
    space: dict[str, Sequence[Setting]] = {"lr": rates, "weight_decay": (0.0, 0.1), "warmup": (0.05, 0.2)}
    if preset == "as-published":
        methods = {
            "full at 0.005": {"method": "full", "lr": 5e-3},
            "lora r8 alpha 4 (a probe)": {"method": "linear_probe", "lr": 5e-3},
        }
    about = _about(size, preset) | {"metric": "test_auc", "lower": False, "unit": "AUC"}
    if size == "small":
        about["caveat"] = (
            "Four layers 64 wide, begun by 600 steps on scikit-learn's digits, 300 steps of 32 images of 28 pixels: "
            "it says nothing of a ViT-B that was pre-trained on natural images at 224 pixels."
        )
    made = _contenders(base, methods, size, preset, {}, space=space)
    return Experiment(
        name="vit-ranks",
        question="Does LoRA fine-tune a ViT better than full fine-tuning, in fewer steps, and does its rank matter?",
        contenders=[replace(each, start=start) for each in made],
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
    space: dict[str, Sequence[Setting]] = {"lr": _RATES, "weight_decay": (0.0, 0.1), "warmup": (0.05, 0.2)}
    about = _about(size, preset) | {"metric": "test_dice", "lower": False, "unit": "Dice", "test_batches": None}
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
        contenders=_contenders(base, {n: {"method": n} for n in names}, size, preset, {}, space=space),
        baseline="full",
        **about,
    )


# --- what they have in common ----------------------------------------------------------------------------------------


def _gpt(size: Size) -> Run:
    if size == "paper":
        return gpt2_pretrain()
    return _small(gpt_mini(), {"model.n_layer": 2, "model.n_head": 2, "model.n_embd": 64})


def _two_lengths(size: Size, preset: Preset) -> tuple[Run, dict[str, Any]]:
    """The GPT, at the small size after 500 and after 2,000 steps: at 500 all places and ranks look alike."""
    base, about = _gpt(size), _about(size, preset)
    if size == "small":
        base = override(base, {"steps": 2000, "eval_every": 100, "log_every": 8, "checkpoint_every": 2000})
        about |= {"horizons": (0.25, 1.0), "caveat": _TEXT_CAVEAT.replace("five hundred", "two thousand")}
    return base, about


def _llama(size: Size) -> Run:
    if size == "paper":
        return llama_60m()
    shape = {"model.n_layer": 2, "model.n_head": 2, "model.hidden": 64, "model.feed_forward": 176}
    return _small(llama_mini(), shape)


def _small(run: Run, shape: Mapping[str, Setting]) -> Run:
    run = override(run, {**shape, "data.context": 64, "steps": 500, "batch_size": 8})
    projected: dict[str, Setting] = {"method.rank": 16, "method.refresh_every": 50}
    ranks: dict[str, Any] = {
        "@projected": projected,
        "@adapter": {"method.rank": 16, "method.target_modules": "all-linear"},
    }
    own: dict[str, Any] = {
        name: {"method.target_modules": "all-linear"} for name in ("lora", "lte", "multihead_lora", "relora")
    }
    own |= {"apollo_mini": {"method.rank": 1}, "lte": {"method.rank": 4, "method.heads": 4, "method.merge_every": 10}}
    own["lte_galore"] = {"method.galore_rank": 16, "method.refresh_every": 50}
    recorded: dict[str, Any] = {"eval_every": 25, "eval_batches": 12, "checkpoint_every": 500, "keep": 1}
    return replace(run, per_method={**ranks, **own}, max_grad_norm=1.0, log_every=2, **recorded)


def _lte(heads: int, rank: int, merge_every: int) -> dict[str, Any]:
    shape = {"method.heads": heads, "method.rank": rank, "method.merge_every": merge_every}
    return {"method": "lte", "method.target_modules": "all-linear", **shape}


def _contenders(
    base: Run,
    methods: Mapping[str, Mapping[str, Any]],
    size: Size,
    preset: Preset,
    published: Mapping[str, Any],
    *,
    space: Mapping[str, Sequence[Setting]] | None = None,
) -> list[Contender]:
    """A contender a method; what was published is not tuned."""
    wide = space or (_SPACE if size == "small" else _PAPER_SPACE)
    found = []
    for name, settings in methods.items():
        run = override(base, settings)
        lacks = _LACKS.get(run.model.name, ()) + _LACKS.get(run.method.name, ())
        if run.per_layer:
            run = replace(run, max_grad_norm=None)
        if preset == "as-published":
            known = catalogue().signature("method", run.method.name).kinds
            own = {n: v for n, v in published.items() if not n.startswith("method.") or n[7:] in known}
            found.append(Contender(name=name, run=override(run, own)))
        else:
            own_space = {option: values for option, values in wide.items() if option not in lacks}
            found.append(Contender(name=name, run=run, space=own_space))
    return found


def _about(size: Size, preset: Preset) -> dict[str, Any]:
    small = size == "small"
    found: dict[str, Any] = {"size": size, "preset": preset, "caveat": _TEXT_CAVEAT if small else _PAPER_CAVEAT}
    found |= {"seeds": (1, 2, 3, 4, 5), "test_batches": 20 if small else None}
    return found | {"trials": 12 if small else 16}
