"""Backwards: what fits a budget, the least lossy first; and how large a batch fits which card.

    fitted(run, size)      the run, changed until it fits, and what it gave up
    largest_batches(run)   the micro-batch that fits each of the usual cards

Concessions are added one by one, the least lossy first, until the run fits; then those that are not needed beside the
others are taken back. Micro-batches are made smaller first, and accumulated to the same step, which changes no number
but by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lowrank.plan.memory_sheet import CARDS, CUDA_CONTEXT, Sheet, gib
from lowrank.run.memory_estimate import estimate
from lowrank.run.overrides import catalogue, override, resolve
from lowrank.run.run import Run
from lowrank.run.validation import validate

BATCHES = (1, 8, 64)  # traced; between them what is held grows by the same amount with each row
Change = Callable[[Run], Run | None]
Concession = tuple[Change, str]  # and what it gives up, in words


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A run that fits, its ledger, and what it gave up, in the order of the stages."""

    run: Run
    sheet: Sheet
    gave_up: Sequence[str]


def fitted(run: Run, size: int) -> Fit:
    """The run with the least changes that fits into ``size`` bytes of a GPU.

    Raises:
        ValueError: nothing does; the message says what the smallest needs, and which part of it is the largest.
    """
    smallest: tuple[Sheet, Run] | None = None
    given: list[Concession] = []
    for concession in (None, *_CONCESSIONS):
        changed = _with(run, given if concession is None else [*given, concession])
        if changed is None:
            continue
        given += [] if concession is None else [concession]
        sheet = _least(changed)
        if smallest is None or sheet.total < smallest[0].total:
            smallest = sheet, changed
        if sheet.total <= size:
            return _largest_rows(run, *_needed(run, given, changed, sheet, size), size)
    assert smallest is not None
    raise ValueError(_no_fit(*smallest, size))


def _with(run: Run, concessions: Sequence[Concession]) -> Run | None:
    """The run with all of these; None where one changes nothing or contradicts the rest."""
    for change, _ in concessions:
        changed = change(run)
        if changed is None:
            return None
        try:
            validate(changed)
        except ValueError:
            return None
        run = changed
    return run


def _least(run: Run) -> Sheet:
    """The ledger of the run in micro-batches of the fewest rows."""
    return estimate(_of_rows(run, _fewest(run)))


def _needed(
    run: Run, given: Sequence[Concession], changed: Run, sheet: Sheet, size: int
) -> tuple[Run, Sheet, list[str]]:
    """Take back what is not needed, beginning with the most lossy; the last is, since without it nothing fitted."""
    kept = list(given)
    for concession in reversed(given[:-1]):
        fewer = [each for each in kept if each is not concession]
        tried = _with(run, fewer)
        if tried is None:
            continue
        found = sheet if tried == changed else _least(tried)
        if found.total <= size:
            kept, changed, sheet = fewer, tried, found
    return changed, sheet, [what for _, what in kept]


def _no_fit(smallest: Sheet, run: Run, size: int) -> str:
    kind, most = max(smallest.peak.parts.items(), key=lambda item: item[1])
    sharded = ", or several ranks with --engine fsdp, which hold a part each"
    if run.model.args.get("quantise") is not None:
        sharded = ""  # quantised weights are held whole
    helps = {
        "weights": f"a smaller model{sharded}",
        "activations": "a shorter --data.context",
        "logits and loss": "a shorter --data.context, or a smaller vocabulary",
    }.get(kind, f"a smaller model, a shorter --data.context{sharded}")
    context = f", and {gib(CUDA_CONTEXT)} are CUDA's context" if smallest.on_card else ""
    return (
        f"nothing found fits {gib(size)}: the least needs {gib(smallest.total)} ({smallest.title}), of which "
        f"{kind} are {gib(most)}{context}; what would help: {helps}"
    )


def _set(**changes: object) -> Change:
    def change(run: Run) -> Run | None:
        given = {name.replace("__", "."): value for name, value in changes.items()}
        changed = resolve(override(run, given))
        return None if changed == run else changed

    return change


def _autocast(run: Run) -> Run | None:
    return replace(run, precision="bf16") if run.precision == "fp32" else None


def _narrow(run: Run) -> Run | None:
    return replace(run, precision="bf16-weights") if run.precision in ("fp32", "bf16") else None


def _per_layer(run: Run) -> Run | None:
    if run.per_layer:
        return None
    clip = run.clip_per_layer or run.max_grad_norm
    return replace(run, per_layer=True, max_grad_norm=None, clip_per_layer=clip)


def _projected(run: Run) -> Run | None:
    """8-bit GaLore in place of full training; a method with adapters has little state to save."""
    family = catalogue().facts("method", run.method.name).get("family")
    if family not in ("none", "projected") or run.method.name == "apollo_mini":
        return None
    return _set(method="galore_8bit")(run)


def _lower_rank(run: Run) -> Run | None:
    rank = run.method.args.get("rank")
    return _set(method__rank=rank // 4)(run) if isinstance(rank, int) and rank >= 32 else None


def _quantised(run: Run) -> Run | None:
    """A base that is loaded, in 4 bits; one that is drawn at random has to learn."""
    if run.model.name != "pretrained" or run.model.args.get("quantise") is not None:
        return None
    return _set(model__quantise="nf4")(run)


def _one_micro_batch(run: Run) -> Run | None:
    return replace(run, grad_accum=1) if run.per_layer and run.grad_accum > 1 else None


_CONCESSIONS: tuple[Concession, ...] = (
    (_set(checkpoint_activations=True), "time: each block is computed twice (--checkpoint-activations)"),
    (_autocast, "precision: products in bfloat16 (--precision bf16)"),
    (_narrow, "precision: weights in bfloat16, rounded stochastically (--precision bf16-weights)"),
    (_projected, "full AdamW: 8-bit GaLore (--method galore_8bit)"),
    (_per_layer, "the clipping of the global norm, if any: each layer steps in the backward pass (--per-layer)"),
    (_one_micro_batch, "the size of a step: one micro-batch, so that one layer's gradient exists (--grad-accum 1)"),
    (_lower_rank, "rank: a quarter (--method.rank)"),
    (_set(method="apollo_mini"), "GaLore: a gradient scaled by a rank-1 estimate (--method apollo_mini)"),
    (_set(method="lora", method__rest="freeze", method__rank=8), "the training of every weight: LoRA of rank 8 alone"),
    (_quantised, "precision of the base: 4 bits a weight (--model.quantise nf4)"),
)


def _fewest(run: Run) -> int:
    """Rows that a micro-batch must have: one, or one a head where heads split it."""
    return run.split_heads or 1


def _of_rows(run: Run, rows: int) -> Run:
    """The run in micro-batches of so many rows, accumulated to the same step where it accumulates."""
    if run.per_layer and run.grad_accum == 1:
        return replace(run, batch_size=rows)
    return replace(run, batch_size=rows, grad_accum=max(1, run.batch_size * run.grad_accum // rows))


def _largest_rows(before: Run, run: Run, sheet: Sheet, gave_up: list[str], size: int) -> Fit:
    """The largest micro-batch that divides the step and fits, by halving the interval of the divisors."""
    whole, fewest = run.batch_size * run.grad_accum, _fewest(run)
    sizes = [rows for rows in range(fewest, whole + 1) if whole % rows == 0 and rows <= max(before.batch_size, fewest)]
    low, high, best = 0, len(sizes) - 1, _of_rows(run, fewest)
    while low < high:
        middle = (low + high + 1) // 2
        tried = _of_rows(run, sizes[middle])
        found = estimate(tried)
        if found.total <= size:
            low, best, sheet = middle, tried, found
        else:
            high = middle - 1
    if best.batch_size != before.batch_size and best.grad_accum > before.grad_accum:
        said = f"time, a little: micro-batches of {best.batch_size} instead of {before.batch_size}, as large a step"
        gave_up = [said, *gave_up]
    return Fit(run=best, sheet=sheet, gave_up=gave_up)


def largest_batches(run: Run, *, works: bool = False) -> tuple[Sheet, dict[int, int]]:
    """(the ledger of the run as it is, by card in GB the largest micro-batch that fits it, 0 for none).

    Interpolated between traces of a few sizes; beyond the largest the last line goes on.
    """
    fewest = _fewest(run)
    points = [(rows, estimate(replace(run, batch_size=rows)).total) for rows in (fewest * n for n in BATCHES)]
    return estimate(run, works=works), {card: _at_most(points, card << 30) for card in CARDS}


def _at_most(points: Sequence[tuple[int, int]], size: int) -> int:
    """The largest number of rows whose bytes, on the lines through ``points``, are at most ``size``."""
    if points[0][1] > size:
        return 0
    for (a, x), (b, y) in pairwise(points):
        if size < y:
            return max(a, a + (size - x) * (b - a) // max(1, y - x))
    (a, x), (b, y) = points[-2:]
    return b + (size - y) * (b - a) // max(1, y - x)
