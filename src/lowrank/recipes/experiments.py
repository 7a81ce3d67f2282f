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
from lowrank.run import own_files
from lowrank.run.experiment import Contender, Experiment
from lowrank.run.overrides import catalogue, override
from lowrank.run.run import Run

Size = Literal["small", "paper"]
Preset = Literal["as-meant", "as-published"]

EXPERIMENTS = Registry("experiment", "lowrank.recipes.experiments", "lowrank.recipes.image_experiments")

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_FINE_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
PAPER_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_SPACE: Mapping[str, Sequence[Setting]] = {
    "lr": RATES,
    "method.embedding_lr": (1.0, 10.0),
    "method.head_lr": (1.0, 10.0),
    "warmup": (0.05, 0.2),
    "weight_decay": (0.0, 0.1),
}
_PAPER_SPACE: Mapping[str, Sequence[Setting]] = {
    **_SPACE,
    "lr": PAPER_RATES,
    "method.betas": ((0.9, 0.95), (0.9, 0.999)),
    "method.vector_lr": (1.0, 0.1),
}
_LACKS: Mapping[str, tuple[str, ...]] = {  # of a model or a method: options of these spaces that it has no use for
    "gpt2": ("method.head_lr",),  # its output layer is its embedding
    "adafactor": ("method.betas",),
}
_TEXT_CAVEAT = (
    "Two layers 64 wide and five hundred steps of 512 bytes: seconds a run. It orders methods early in the training of "
    "tiny models and says nothing of models a thousand times larger, of long training, or of ranks far below the width."
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
        contenders=contenders_of(base, {**others, **cells}, size, preset, published=published),
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
        contenders=contenders_of(base, methods, size, preset),
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
        contenders=contenders_of(base, methods, size, preset),
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
        contenders=contenders_of(base, methods, size, preset),
        baseline="full",
        **about_of(size, preset),
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
        contenders=contenders_of(_llama(size), methods, size, preset),
        baseline="galore",
        **about_of(size, preset),
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
        contenders=contenders_of(_llama(size), methods, size, preset),
        baseline="full",
        **about_of(size, preset),
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
        contenders=contenders_of(_llama(size), methods, size, preset),
        baseline="full",
        horizons=(0.5, 1.0),
        **about_of(size, preset),
    )


@register("experiment", "lora-rate")
def lora_rate(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """Is LoRA's best learning rate ten times that of full fine-tuning, whatever the rank?"""
    methods: dict[str, dict[str, Any]] = {"full": {"method": "full"}}
    for rank in (1, 4, 16, 32):
        methods[f"lora r{rank}"] = {"method": "lora", "method.rank": rank, "method.rest": "freeze"}
    return Experiment(
        name="lora-rate",
        question="Is LoRA's best learning rate ten times that of full fine-tuning, whatever the rank?",
        contenders=_fine_tuned(methods, size, preset),
        baseline="full",
        shrink=2,
        **about_of(size, preset),
    )


@register("experiment", "lora-variants")
def lora_variants(*, size: Size = "small", preset: Preset = "as-meant") -> Experiment:
    """Ours: is any variant of LoRA better than LoRA itself, once the rate of each is tuned?"""
    names = ("lora", "rslora", "lora_plus", "dora", "pissa", "lora_rite", "lora_muon")
    shared = {"method.target_modules": "all-linear", "method.rank": 8, "method.rest": "freeze"}
    methods: dict[str, dict[str, Any]] = {name: {"method": name, **shared} for name in names}
    methods["full"] = {"method": "full"}
    return Experiment(
        name="lora-variants",
        question="Is any variant of LoRA better than LoRA, once the learning rate of each is tuned?",
        contenders=_fine_tuned(methods, size, preset),
        baseline="lora",
        shrink=2,
        **about_of(size, preset),
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
        contenders=contenders_of(
            _llama(size), {n: {"method": "galore", **own} for n, own in methods.items()}, size, preset
        ),
        baseline="power",
        **about_of(size, preset),
    )


# --- what they have in common ----------------------------------------------------------------------------------------


def _gpt(size: Size) -> Run:
    if size == "paper":
        return gpt2_pretrain()
    return _small(gpt_mini(), {"model.n_layer": 2, "model.n_head": 2, "model.n_embd": 64})


def _two_lengths(size: Size, preset: Preset) -> tuple[Run, dict[str, Any]]:
    """The GPT, at the small size after 500 and after 2,000 steps: at 500 all places and ranks look alike."""
    base, about = _gpt(size), about_of(size, preset)
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


def _fine_tuned(methods: Mapping[str, Mapping[str, Any]], size: Size, preset: Preset) -> list[Contender]:
    """Contenders that begin from one GPT, trained on the recipe's own text; rates alone are tuned, by factors of 2."""
    base = _gpt(size)
    steps = 200 if size == "small" else 2000
    start = replace(override(base, {"method": "full"}), steps=steps, lr=3e-3, min_lr_ratio=0.0)
    return contenders_of(base, methods, size, preset, space={"lr": _FINE_RATES}, start=start)


def contenders_of(
    base: Run,
    methods: Mapping[str, Mapping[str, Any]],
    size: Size,
    preset: Preset,
    *,
    published: Mapping[str, Any] | None = None,
    space: Mapping[str, Sequence[Setting]] | None = None,
    start: Run | None = None,
) -> list[Contender]:
    """A contender a method, begun from ``start``; as published nothing is tuned, and what was ``published`` is set."""
    wide = space or (_SPACE if size == "small" else _PAPER_SPACE)
    found = []
    for name, settings in methods.items():
        run = override(base, settings)
        if run.per_layer:
            run = replace(run, max_grad_norm=None)
        if preset == "as-published":
            known = catalogue().signature("method", run.method.name).kinds
            told = (published or {}).items()
            own = {n: v for n, v in told if not n.startswith("method.") or n[7:] in known}
            found.append(Contender(name=name, run=override(run, own), start=start))
        else:
            lacks = _LACKS.get(run.model.name, ()) + _LACKS.get(run.method.name, ())
            own_space = {option: values for option, values in wide.items() if option not in lacks}
            found.append(Contender(name=name, run=run, space=own_space, start=start))
    return found


def about_of(size: Size, preset: Preset) -> dict[str, Any]:
    small = size == "small"
    found: dict[str, Any] = {"size": size, "preset": preset, "caveat": _TEXT_CAVEAT if small else _PAPER_CAVEAT}
    found |= {"seeds": (1, 2, 3, 4, 5), "test_batches": 20 if small else None}
    return found | {"trials": 12 if small else 16}
