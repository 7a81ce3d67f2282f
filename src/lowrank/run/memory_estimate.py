"""What a run would take, without its weights: the run's own session, made of tensors that have shapes and no numbers.

    estimate(run)      the ledger of a run (``plan.memory_sheet.Sheet``), or of one of its ranks
    fake_session(run)  its session, inside a ``FakeLiveBytes``

Data is not opened: what a model takes from it (a vocabulary, classes) is read off the run, and where it is not there
assumed and said. Weights are not loaded: a model that would be is made from its configuration.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank.distributed.collectives import share
from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.simulated import simulated
from lowrank.infra.loaded_parameters import mark_all_but_
from lowrank.infra.progress import short_bytes
from lowrank.models.blocks import blocks_of
from lowrank.models.without_weights import UNLOADED
from lowrank.optim.projected import Projected
from lowrank.plan.communication import forecast
from lowrank.plan.live_bytes import ACTIVATIONS, STATIC, WEIGHTS, Counts, FakeLiveBytes, LiveBytes, undisturbed
from lowrank.plan.memory_sheet import STARTING, Sheet
from lowrank.plan.plan import Plan
from lowrank.plan.speed import Rhythm
from lowrank.plan.trace import Setup, Steps, extrapolated, hold_static
from lowrank.run.overrides import catalogue
from lowrank.run.run import Call, Run
from lowrank.run.session import Session, open_session, task_of, to_bfloat16_
from lowrank.run.task import Batch
from lowrank.run.validation import refuse_few

_FEW = (2, 3)  # blocks of the models that are traced
_MICRO_BATCHES = 2
Device = Literal["auto", "cpu", "cuda"]


def estimate(run: Run, *, on_card: bool = True, ranks: int = 1, works: bool = False) -> Sheet:
    """The ledger of a run.

    Args:
        run: resolved and valid.
        on_card: add what a GPU's allocator and context take.
        ranks: of how many processes that train it together the one that takes most is meant; none is started.
        works: count what its steps do as well (``counts.work``, ``rhythm``).

    Raises:
        ValueError, FileNotFoundError: a model that cannot be made without its weights or its data; ranks between which
            the run cannot be divided.
    """
    if ranks == 1:
        return _possible(run, None, on_card=on_card, works=works)
    refuse_few(run, ranks)
    if run.workers == "nodes":
        raise ValueError("--workers nodes: a plan cannot see the nodes; give their number, --workers N")
    sheets = []
    uneven = run.batch_size % ranks or (run.split_heads or 0) % ranks
    for rank in (0, ranks - 1) if uneven else (0,):  # the first has the largest shards, the last most rows and heads
        with simulated(ranks, rank) as group:
            sheets.append(_possible(run, group, on_card=on_card, works=works))
    return max(sheets, key=lambda sheet: sheet.total)


def _possible(run: Run, ranks: ProcessGroup | None, *, on_card: bool, works: bool) -> Sheet:
    try:
        return _estimated(run, FakeLiveBytes, on_card=on_card, ranks=ranks, works=works)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        if ranks is not None:
            raise
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        sheet = _estimated(run, LiveBytes, on_card=on_card, works=works)
        note = (
            f"the model cannot be made without its numbers ({what[:120]}): it was made, and one step of each kind taken"
        )
        return replace(sheet, notes=[*sheet.notes, note])


def _estimated(
    run: Run, kind: type[LiveBytes], *, on_card: bool, ranks: ProcessGroup | None = None, works: bool = False
) -> Sheet:
    """On fake tensors, or on real ones where a model has to have them."""
    with undisturbed():
        whole, notes, session, optimizer = _made(run, kind, ranks=ranks)
        static = {kind: whole.counts.parts[kind] for kind in STATIC if whole.counts.parts[kind]}
        blocks, plan, layers = blocks_of(session.model), session.plan, str(session.plan)
        del optimizer
        count = 0 if blocks is None else len(blocks)
        per_block = None
        if kind is FakeLiveBytes and count > _FEW[1] and _alike(plan, blocks):
            few, more = (_counted(run, kind, n, ranks, works=works) for n in _FEW)
            counts, per_block = extrapolated(few, more, (*_FEW, count)), _saved(few, more)
        else:
            counts = _counted(run, kind, None, ranks, works=works)
    counts.peaks = {p: peak for p, peak in counts.peaks.items() if p[0] != STARTING}
    counts.peaks |= {p: peak for p, peak in whole.counts.peaks.items() if p[0] == STARTING}
    saved = None if per_block is None or run.checkpoint_activations else (per_block, _input_bytes(session))
    return Sheet(
        title=_title(session),
        counts=counts,
        static=static,
        parameters=plan.parameters_total,
        trained=plan.parameters_trained,
        blocks=count,
        on_card=on_card,
        per_block=saved,
        layers=layers,
        rhythm=rhythm_of(session),
        size=session.task.size(any_batch(session)),
        notes=[*notes, *_notes(run), *_notes_on_ranks(session)],
    )


def _made(
    run: Run, kind: type[LiveBytes], blocks: int | None = None, ranks: ProcessGroup | None = None
) -> tuple[LiveBytes, list[str], Session, Setup]:
    """(what counts, what was assumed, the session, what takes its steps), all made and counted."""
    live = kind()
    with live:
        live.at("making the model", WEIGHTS, step=STARTING)
        session, notes = fake_session(run, blocks, ranks)
        live.kind = ACTIVATIONS  # the batch
        setup = _setup(session)
        hold_static(live, session.model, setup.optimizer)
    return live, notes, session, setup


def real_setup(run: Run) -> Setup:
    """What takes the steps of a run on tensors that have numbers, on its device and on any data of its shape."""
    with torch.device(run.device):
        session, _ = fake_session(run, device=run.device)
        return _setup(session)


def _counted(run: Run, kind: type[LiveBytes], blocks: int | None, ranks: ProcessGroup | None, *, works: bool) -> Counts:
    live, _, _, setup = _made(run, kind, blocks, ranks)
    live.works = works
    with live:
        Steps(live, setup).all()
    return live.counts


def on_card(run: Run) -> bool:
    """Whether a run would train on a GPU here."""
    return run.device == "cuda" or (run.device == "auto" and torch.cuda.is_available())


def fake_session(
    run: Run, blocks: int | None = None, ranks: ProcessGroup | None = None, device: Device = "cpu"
) -> tuple[Session, list[str]]:
    """(the session of a run, what was assumed); of the model's repeated blocks only the first few are kept where
    ``blocks`` says so. To be called inside a ``FakeLiveBytes``."""
    data, notes = task_of(run).stand_in(run)
    session = open_session(
        replace(run, device=device), data=data, ranks=ranks, make=lambda run, data: _make(run, data, blocks)
    )
    return session, notes


def _make(run: Run, data: Any, blocks: int | None) -> nn.Module:
    model = _from_configuration(run, data)
    repeated = blocks_of(model)
    if blocks is not None and repeated is not None:
        del repeated[blocks:]
    if run.precision == "bf16-weights":
        to_bfloat16_(model)
    return model


def _from_configuration(run: Run, data: Any) -> nn.Module:
    """The model that a run names; one that would be loaded is made from its configuration, and marked as loaded."""
    name, args = run.model.name, run.model.args
    if name in UNLOADED:
        return UNLOADED[name](data, **args)
    if args.get("weights") is None:
        return catalogue().make("model", run, data)
    made = catalogue().make("model", replace(run, model=Call(name=name, args={**args, "weights": None})), data)
    return mark_all_but_(made, *getattr(made, "drawn", ("head", "head_dist")))


def rhythm_of(session: Session) -> Rhythm:
    """How often what happens in a session's run."""
    run, plan = session.run, session.plan
    merge, rules = plan.method.merge, [row.rule for row in plan.rows if isinstance(row.rule, Projected)]
    return Rhythm(
        micro_batches=run.grad_accum,
        traced=min(run.grad_accum, _MICRO_BATCHES),
        refresh_every=min((rule.refresh_every for rule in rules), default=0),
        merge_every=0 if merge is None else merge.merge_every / merge.fragments,
    )


def any_batch(session: Session) -> Batch:
    """A batch of the run's shape, or a rank's share of it."""
    return session.task.any_batch(session.model, session.data, _rows(session))


def _rows(session: Session) -> int:
    """Of a micro-batch those that this process computes."""
    ranks = session.plan.ranks
    return session.run.batch_size if ranks is None else len(share(session.run.batch_size, ranks.rank, ranks.count))


# --- the trace -------------------------------------------------------------------------------------------------------


def _setup(session: Session) -> Setup:
    """What takes the steps of a session: two micro-batches stand for any number above one."""
    run, accumulate = session.run, min(session.run.grad_accum, _MICRO_BATCHES)
    optimizer = session.plan.optimizer(
        run.lr,
        run.weight_decay,
        per_layer=run.per_layer,
        accumulate=accumulate,
        clip_per_layer=run.clip_per_layer,
    )
    if session.plan.ranks is not None and not run.per_layer and not session.plan.shards:
        optimizer.sum_during_backward(accumulate, whole=run.max_grad_norm is not None)
    batch = any_batch(session)
    session.model.train()

    def loss() -> Tensor:
        return session.task.loss(session.model, batch) / 1024

    return Setup(
        model=session.model, optimizer=optimizer, plan=session.plan, loss=loss, accumulate=accumulate,
        norm=not run.per_layer, limit=run.max_grad_norm, autocast=session.autocast,
    )  # fmt: skip


def _alike(plan: Plan, blocks: Any) -> bool:
    """Whether every block trains in the same way."""
    prefix = next(name for name, module in plan.model.named_modules() if module is blocks)
    found: dict[str, set[object]] = {str(i): set() for i in range(len(blocks))}
    for row in plan.rows:
        if row.name.startswith(f"{prefix}."):
            index, _, rest = row.name.removeprefix(f"{prefix}.").partition(".")
            found[index].add((rest, row.shape, row.dtype, row.rule, row.why))
    first, *others = found.values()
    return all(other == first for other in others)


def _saved(few: Counts, more: Counts) -> int | None:
    place = ("first", "forward of the head")
    if place not in few.peaks or place not in more.peaks:
        return None
    return more.peaks[place].parts.get("activations", 0) - few.peaks[place].parts.get("activations", 0)


def _input_bytes(session: Session) -> int:
    """Of the hidden states between two blocks."""
    run = session.run
    config: Any = getattr(session.model, "config", None)
    width: Any = getattr(config, "hidden_size", None) or getattr(session.model, "embed_dim", 0)
    itemsize = 2 if run.precision == "bf16-weights" else 4
    patches: Any = getattr(getattr(session.model, "patch_embed", None), "num_patches", 0)
    tokens = getattr(session.data, "context", int(patches) + 1)
    return _rows(session) * tokens * int(width) * itemsize


def _title(session: Session) -> str:
    run, context = session.run, getattr(session.data, "context", None)
    size = f"{run.batch_size} {session.task.unit}" if context is None else f"{run.batch_size} × {context} tokens"
    base = run.model.args.get("quantise")
    how = [run.precision, *[f"{base} base"] * bool(base), *["per layer"] * run.per_layer]
    how += ["checkpointed"] * run.checkpoint_activations
    times = f", {run.grad_accum} micro-batches a step" if run.grad_accum > 1 else ""
    return f"{run.recipe}, {run.method.name}: {size}{times} ({', '.join(how)})"


def _notes(run: Run) -> list[str]:
    notes = []
    if run.compile:
        notes.append("--compile: counted without it; what the compiler fuses takes less")
    if run.per_layer and run.grad_accum > 1:
        notes.append(
            "--per-layer with several micro-batches keeps between them what a step needs of each gradient: all of it "
            "in a refresh and where the rule needs it whole; --grad-accum 1 keeps one layer's"
        )
    return notes


def _notes_on_ranks(session: Session) -> list[str]:
    plan, run = session.plan, session.run
    if plan.ranks is None:
        return []
    count, workers = plan.ranks.count, plan.layout.workers_count
    apart = "all in step" if workers == 1 else f"{workers} workers of {count // workers} each, which train apart"
    rows = f"{_rows(session)} of {run.batch_size} rows of a micro-batch"
    whole = run.max_grad_norm is not None and not run.per_layer
    sent = forecast(plan, count, whole=whole, micro_batches=run.grad_accum)
    sending = f"a step sends {short_bytes(sent.per_step)} on average; DDP would send {short_bytes(sent.ddp)}"
    return [f"this is rank {plan.ranks.rank} of {count}, {apart}; it computes {rows}", sending, *plan.notes]
