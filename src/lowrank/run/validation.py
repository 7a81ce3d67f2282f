"""What is refused before any work: settings that contradict each other or cannot be meant.

Whether each setting exists and has the right kind is seen where it is set (`lowrank.run.overrides`); here they are
looked at together. Every message names the option, the values and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowrank.infra.convert import as_option, describe
from lowrank.run.overrides import Catalogue, catalogue, identified, resolve, with_whole_paths
from lowrank.run.own_files import is_own
from lowrank.run.run import Run, flat, names_that

_MOST = 2**31 - 1  # of any count of steps or rows


def validate(run: Run, offer: Catalogue | None = None) -> None:
    """Refuse a run that could not do what it says.

    Raises:
        ValueError: with every objection, one a line.
    """
    offer = offer or catalogue()
    run = resolve(run, offer)
    objections = [
        *_lengths(run),
        *_rates(run),
        *_batches(run),
        *_clipping(run),
        *_intervals(run),
        *_sizes(run, offer),
        *_context(run),
        *_task(run, offer),
        *_packages(run),
        *_engine(run),
    ]
    try:
        method = offer.make("method", run)
        if run.model.args.get("quantise") is not None:
            method.check_quantised()
    except (ValueError, PermissionError) as error:
        objections.append(f"--method {run.method.name}: {error}")
    if objections:
        raise ValueError("\n".join(objections))


def validated(run: Run) -> Run:
    """The run with every setting written out, if it could do what it says.

    Raises:
        ValueError: as ``validate``.
    """
    run = resolve(run)
    validate(run)
    return run


def refuse_occupied(out: Path) -> None:
    """Refuse to write a new run where one already is.

    Raises:
        FileExistsError: the folder holds a run; the message names the ways out.
    """
    if any(any(out.glob(name)) for name in ("run.json", "log.jsonl", "checkpoints/step-*")):
        raise FileExistsError(
            f"{out} already holds a run: go on with it by --resume {out} (torchrun's restarts: --elastic), or "
            "choose another --out"
        )


def refuse_few(run: Run, ranks: int) -> None:
    """Refuse more ranks than a run has rows, or more workers than it has heads.

    Raises:
        ValueError: naming what is too few.
    """
    workers = ranks if run.engine == "auto" else run.workers if isinstance(run.workers, int) else 1
    few = []
    if run.split_heads is not None and run.split_heads < workers:
        few.append((f"{run.split_heads} heads", f"--method.heads {workers}"))
    if run.batch_size < ranks:
        few.append((f"a batch of {run.batch_size}", f"--batch-size {ranks}"))
    if few:
        what, remedy = (" and ".join(texts) for texts in zip(*few, strict=True))
        raise ValueError(f"{what} cannot be divided between {ranks} ranks: give {remedy}, or more")


def refuse_changed(old: Run, new: Run) -> None:
    """Refuse to resume under settings that the checkpoint was not made with.

    Lengths, evaluation, logging and the device may change; what the model is, what it sees and how it learns may not.

    Raises:
        ValueError: naming each setting with its old and its new value.
    """
    free = names_that("may_change") | ({"data.source"} if new.own_data else set())
    before, after = _compared(old), _compared(new)
    changed = [
        f"{as_option(name)} ({before.get(name)} -> {after.get(name)})"
        for name in {**before, **after}
        if before.get(name) != after.get(name) and name not in free and not _of_another(name, before, after)
    ]
    if changed:
        raise ValueError(
            f"resuming goes on with the same run, and this would change {', '.join(changed)}: "
            "leave that out, or start a new run with another --out"
        )


def _compared(run: Run) -> dict[str, Any]:
    """Settings by name; DDP and FSDP keep the same ranks in step."""
    found = flat(with_whole_paths(identified(run)).to_json())
    return found | {"engine": "ddp or fsdp"} if run.engine != "auto" else found


def _of_another(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a setting is an argument of a call that is another function now, which says it all."""
    kind, dot, _ = name.partition(".")
    return bool(dot) and before[kind] != after[kind]


def _lengths(run: Run) -> Iterator[str]:
    if (run.steps is None) == (run.epochs is None):
        yield "a run needs --steps or --epochs, and not both"
    if run.steps is not None and run.steps < 1:
        yield f"--steps {run.steps}: at least 1 step is needed"
    if run.epochs is not None and run.epochs <= 0:
        yield f"--epochs {run.epochs:g} must be above 0"
    for name in ("steps", "epochs", "stop_at"):
        if (getattr(run, name) or 0) > _MOST:
            yield f"{as_option(name)} {getattr(run, name):g}: at most {_MOST} can be meant"
    if run.stop_at is not None and not 1 <= run.stop_at <= (run.steps or run.stop_at):
        beyond = f" and at most --steps {run.steps}" if run.steps else ""
        yield f"--stop-at {run.stop_at} must be at least 1{beyond}"
    if run.warmup < 0:
        yield f"--warmup {run.warmup:g} must not be negative"
    elif run.warmup > 1 and run.warmup != int(run.warmup):
        yield f"--warmup {run.warmup:g} is neither a share of the steps (below 1) nor a whole number of steps"
    elif run.steps is not None and run.warmup_steps(run.steps) > run.steps:
        yield f"--warmup {run.warmup:g} is longer than the run, --steps {run.steps}"


def _rates(run: Run) -> Iterator[str]:
    if run.lr <= 0:
        yield f"--lr {run.lr:g} must be above 0"
    if not 0 <= run.min_lr_ratio <= 1:
        yield f"--min-lr-ratio {run.min_lr_ratio:g} must lie between 0 and 1"
    if run.weight_decay < 0:
        yield f"--weight-decay {run.weight_decay:g} must not be negative"


def _batches(run: Run) -> Iterator[str]:
    for name in ("batch_size", "grad_accum", "eval_every", "eval_batches", "log_every", "checkpoint_every", "keep"):
        value = getattr(run, name)
        if value == "never":
            continue
        if value is not None and value < 1:
            yield f"{as_option(name)} {value}: at least 1 is needed"
        if value is not None and value > _MOST:
            yield f"{as_option(name)} {value}: at most {_MOST} can be meant"
    if not 0 <= run.seed < 2**63:
        yield f"--seed {run.seed} must be at least 0 and below 2^63"
    if run.split_heads is not None and run.split_heads > run.batch_size:
        yield (
            f"--method.heads {run.split_heads} split a batch of --batch-size {run.batch_size}: some would never see "
            f"anything; use at most {run.batch_size} heads or a batch of at least {run.split_heads}"
        )


def _clipping(run: Run) -> Iterator[str]:
    for name in ("max_grad_norm", "clip_per_layer"):
        value = getattr(run, name)
        if value is not None and value <= 0:
            yield f"{as_option(name)} {value:g} must be above 0, or none"
    if run.per_layer and run.max_grad_norm is not None:
        yield (
            f"--per-layer steps before all gradients are known, so --max-grad-norm {run.max_grad_norm:g} cannot "
            f"be had: clip each parameter instead, --max-grad-norm none --clip-per-layer {run.max_grad_norm:g}"
        )


def _intervals(run: Run) -> Iterator[str]:
    merge_every = _number(run.method.args.get("merge_every"))
    if run.steps is not None and merge_every is not None and merge_every > run.steps:
        yield (
            f"--method.merge_every {merge_every:g} is longer than the run, --steps {run.steps}: "
            f"nothing would ever merge; use at most {run.steps}"
        )


def _sizes(run: Run, offer: Catalogue) -> Iterator[str]:
    """Whole numbers of our models are sizes."""
    if not is_own(run.model.name):
        for name, kind in offer.signature("model", run.model.name).kinds.items():
            value = _number(run.model.args.get(name))
            if value is not None and value < 1 and "whole number" in describe(kind):
                yield f"--model.{name} {value:g}: at least 1 is needed"


def _context(run: Run) -> Iterator[str]:
    wanted, most = _number(run.data.args.get("context")), _number(run.model.args.get("context"))
    if wanted is not None and most is not None and wanted > most:
        yield f"--data.context {wanted:g} is beyond the model's: add --model.context {wanted:g}"


def _task(run: Run, offer: Catalogue) -> Iterator[str]:
    for_task = {name: offer.facts("model", name).get("task") for name in offer.model}
    wanted = for_task.get(run.model.name)
    if wanted is not None and wanted != run.task and not is_own(run.task):
        fitting = ", ".join(name for name, task in for_task.items() if task == run.task)
        yield f"--model {run.model.name} is for {wanted}, and the run is on {run.task}: use {fitting}"


def _packages(run: Run) -> Iterator[str]:
    for package in ("tensorboard", "wandb"):
        if getattr(run, package) and find_spec(package) is None:
            yield f"--{package} needs the package {package}: pip install {package}, or leave the option out"


def _engine(run: Run) -> Iterator[str]:
    if run.workers is not None and run.engine == "auto":
        yield (
            f"--workers {run.workers}: with --engine auto every rank is a worker; use --engine ddp or fsdp, or "
            "--workers none"
        )
    if isinstance(run.workers, int) and run.workers < 1:
        yield f"--workers {run.workers} must be at least 1, or nodes"
    one = run.engine != "auto" and run.workers in (None, 1)
    if run.engine == "fsdp" and run.own_data and one:
        yield (
            "--own-data gives each rank batches of its own number, and --engine fsdp computes every batch on all ranks "
            "at once: use --engine auto or ddp, or --workers nodes, where the ranks of a node read the same"
        )
    if run.engine == "fsdp" and run.model.args.get("quantise") is not None:
        yield "--engine fsdp shards weights, and quantised ones are held whole: use --engine ddp"
    if run.engine == "fsdp" and run.compile:
        yield "--compile with --engine fsdp has not been tried: leave one out"
    apart = {
        "rest": ("local",),
        "exchange": ("bfloat16", "int8", "2bit", "topk3", "topk1"),
        "weigh": ("tokens", "seconds", "steps"),
    }
    for name, values in apart.items():
        if one and (value := run.method.args.get(name)) in values:
            yield (
                f"--method.{name} {value} is for workers that train apart, and --engine {run.engine} keeps all ranks "
                "in step: use --engine auto or several --workers, or leave it out"
            )


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
