"""What a run would take, without its weights: the run's own session, made of tensors that have shapes and no numbers.

    estimate(run)      the ledger of a run (``plan.sheet.Sheet``)
    fake_session(run)  its session, inside a ``FakeLiveBytes``

Data is not opened: what a model takes from it (a vocabulary, classes) is read off the run, and where it is not there
assumed and said. Weights are not loaded: a model that would be is made from its configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.data.images.medmnist import NAMES
from lowrank.data.images.medmnist import facts as medmnist_facts
from lowrank.data.images.source import ImageData
from lowrank.data.text.finetuning import default_context
from lowrank.data.text.glue import TABLES
from lowrank.infra.loaded import mark_loaded_
from lowrank.models.blocks import blocks_of
from lowrank.plan.live_bytes import ACTIVATIONS, STATIC, WEIGHTS, Counts, FakeLiveBytes, LiveBytes, undisturbed
from lowrank.plan.plan import Plan
from lowrank.plan.sheet import STARTING, Sheet
from lowrank.plan.trace import Setup, Steps, extrapolated, hold_static
from lowrank.run.overrides import catalogue
from lowrank.run.run import Call, Run
from lowrank.run.session import Session, open_session, to_bfloat16_

_FEW = (2, 3)  # blocks of the models that are traced
_IDS = {"bytes": 256, "gpt2": 50257, "t5-base": 32100}  # of tokenizers by name
ASSUMED_CHARACTERS, ASSUMED_CLASSES = 256, 1000


def estimate(run: Run, *, on_card: bool = True) -> Sheet:
    """The ledger of a run.

    Args:
        run: resolved and valid.
        on_card: add what a GPU's allocator and context take.

    Raises:
        ValueError, FileNotFoundError: a model that cannot be made without its weights or its data.
    """
    try:
        return _estimated(run, FakeLiveBytes, on_card=on_card)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        sheet = _estimated(run, LiveBytes, on_card=on_card)
        note = (
            f"the model cannot be made without its numbers ({what[:120]}): it was made, and one step of each kind taken"
        )
        return replace(sheet, notes=[*sheet.notes, note])


def _estimated(run: Run, kind: type[LiveBytes], *, on_card: bool) -> Sheet:
    """On fake tensors, or on real ones where a model has to have them."""
    with undisturbed():
        whole, notes, session, optimizer = _made(run, kind)
        static = {kind: whole.counts.parts[kind] for kind in STATIC if whole.counts.parts[kind]}
        blocks, plan, layers = blocks_of(session.model), session.plan, str(session.plan)
        del optimizer
        count = 0 if blocks is None else len(blocks)
        per_block = None
        if kind is FakeLiveBytes and count > _FEW[1] and _alike(plan, blocks):
            few, more = (_counted(run, kind, n) for n in _FEW)
            counts, per_block = extrapolated(few, more, (*_FEW, count)), _saved(few, more)
        else:
            counts = _counted(run, kind, None)
    counts.peaks = {p: peak for p, peak in counts.peaks.items() if p[0] != STARTING}
    counts.peaks |= {p: peak for p, peak in whole.counts.peaks.items() if p[0] == STARTING}
    saved = None if per_block is None or run.checkpoint_activations else (per_block, _input_bytes(session))
    return Sheet(
        title=_title(run, getattr(session.data, "context", None)),
        counts=counts,
        static=static,
        parameters=plan.parameters_total,
        trained=plan.parameters_trained,
        blocks=count,
        on_card=on_card,
        per_block=saved,
        layers=layers,
        notes=[*notes, *_notes(run)],
    )


def _made(run: Run, kind: type[LiveBytes], blocks: int | None = None) -> tuple[LiveBytes, list[str], Session, Setup]:
    """(what counts, what was assumed, the session, what takes its steps), all made and counted."""
    live = kind()
    with live:
        live.at("making the model", WEIGHTS, step=STARTING)
        session, notes = fake_session(run, blocks)
        live.kind = ACTIVATIONS  # the batch
        setup = _setup(session)
        hold_static(live, session.model, setup.optimizer)
    return live, notes, session, setup


def _counted(run: Run, kind: type[LiveBytes], blocks: int | None) -> Counts:
    live, _, _, setup = _made(run, kind, blocks)
    with live:
        Steps(live, setup).all()
    return live.counts


def on_card(run: Run) -> bool:
    """Whether a run would train on a GPU here."""
    return run.device == "cuda" or (run.device == "auto" and torch.cuda.is_available())


def fake_session(run: Run, blocks: int | None = None) -> tuple[Session, list[str]]:
    """(the session of a run, what was assumed); of the model's repeated blocks only the first few are kept where
    ``blocks`` says so. To be called inside a ``FakeLiveBytes``."""
    data, notes = stand_in(run)
    session = open_session(replace(run, device="cpu"), data=data, make=lambda run, data: _make(run, data, blocks))
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
    if name == "pretrained":
        return _pretrained(str(args.get("path", "gpt2")), str(args.get("dtype", "float32")), args.get("quantise"))
    if name == "hf-vit":
        from lowrank.models.vision import ImageSpec

        model: Any = _hf_vit(str(args.get("path", "")), len(data.classes))
        model.image_spec = ImageSpec(size=model.config.image_size)
        return _marked(model, ("classifier",))
    if run.task == "sequences":
        return _sequence_classifier(str(args.get("path", "")), data.outputs, str(args.get("dtype", "float32")))
    if run.task == "images" and args.get("weights") is not None:
        bare = replace(run, model=Call(name=name, args={**args, "weights": None}))
        return _marked(catalogue().make("model", bare, data), ("head",))
    model = catalogue().make("model", run, data)
    return model


def _pretrained(path: str, dtype: str, quantise: Any) -> nn.Module:
    import transformers

    from lowrank.models.quantised import quantise_, quantised_as
    from lowrank.models.text import weights_dtype

    if not path:
        raise ValueError("which model? give --model.path FOLDER|NAME, a causal language model of transformers")
    model: Any = transformers.AutoModelForCausalLM
    config = _configuration(path)
    own = getattr(config, "dtype", None) or torch.float32
    made: nn.Module = model.from_config(
        config, trust_remote_code=False, dtype=own if dtype == "auto" else weights_dtype(dtype)
    )
    made = quantised_as(made, config) if quantise is None else quantise_(made, quantise)
    return _marked(made, ())


def _sequence_classifier(path: str, outputs: int, dtype: str) -> nn.Module:
    import transformers

    from lowrank.models.text import weights_dtype

    config = _configuration(path)
    config.num_labels = outputs
    auto: Any = transformers.AutoModelForSequenceClassification
    own = getattr(config, "dtype", None) or torch.float32
    made: nn.Module = auto.from_config(
        config, trust_remote_code=False, dtype=own if dtype == "auto" else weights_dtype(dtype)
    )
    return _marked(made, ("classifier", "score"))


def _hf_vit(path: str, classes: int) -> nn.Module:
    import transformers

    config = _configuration(path)
    config.num_labels = classes
    model: Any = transformers.AutoModelForImageClassification
    made: nn.Module = model.from_config(config, trust_remote_code=False, dtype=torch.float32)
    return made


def _configuration(path: str) -> Any:
    """transformers' configuration from a folder or the hub.

    Raises:
        FileNotFoundError: there is none.
    """
    import transformers

    folder = Path(path).expanduser()
    if (path.startswith((".", "/", "~")) or folder.is_dir()) and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model.path={path!r} has no config.json, from which its memory could be told")
    try:
        return transformers.AutoConfig.from_pretrained(folder if folder.is_dir() else path, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"the configuration of {path} could not be had from the hub ({type(error).__name__}): give a folder with "
            "config.json, --model.path FOLDER"
        ) from error


def _marked(model: nn.Module, fresh: tuple[str, ...]) -> nn.Module:
    mark_loaded_(
        model, [n for n, _ in model.named_parameters(remove_duplicate=False) if not n.startswith(fresh or ("\n",))]
    )
    return model


# --- what stands for the data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unread:
    """Stands for text that a plan need not look at; its context may be left to the model."""

    context: int | None
    vocab_size: int = 0
    outputs: int = 1  # of a model of sequences
    end_of_document: int | None = None

    def check_vocabulary(self, vocab_size: int) -> None:
        pass  # there are no ids to check

    def for_model(self, model: nn.Module) -> Unread:
        return self if self.context is not None else replace(self, context=default_context(model))


def stand_in(run: Run) -> tuple[Any, list[str]]:
    """(what stands for a run's data, what was assumed of it); nothing is opened."""
    args = run.data.args
    if run.task == "images":
        return _no_images(args)
    if run.task == "sequences":
        longest, name = str(args.get("context", "auto")), str(args.get("name", "auto"))
        outputs = len(TABLES[name].classes) or 1 if name in TABLES else 2
        return Unread(512 if longest == "auto" else int(longest), outputs=outputs), []
    told = args.get("context") or 1024
    context = None if told == "auto" else int(str(told))
    given = run.model.args.get("vocab_size")
    if isinstance(given, int) or run.model.name == "pretrained":
        return Unread(context, given if isinstance(given, int) else 0), []
    ids, notes = _vocabulary(str(args.get("tokenizer", "bytes")))
    return Unread(context, ids), notes


def _vocabulary(tokenizer: str) -> tuple[int, list[str]]:
    if tokenizer in _IDS:
        return _IDS[tokenizer], []
    if match := re.fullmatch(r"bpe:(\d+)", tokenizer):
        return int(match[1]), []
    what = f"the data's vocabulary under the tokenizer {tokenizer} is not known before it is read: "
    return ASSUMED_CHARACTERS, [f"{what}{ASSUMED_CHARACTERS} ids are assumed; --model.vocab_size N says it"]


def _no_images(args: Mapping[str, Any]) -> tuple[ImageData, list[str]]:
    source, size = str(args.get("source")), int(str(args.get("size") or 28))
    if source in NAMES:
        return ImageData.without_images(medmnist_facts(source, size)), []
    stem = re.sub(r"(_\d+)?\.npz$", "", Path(source).name)
    if stem in NAMES:
        return ImageData.without_images(medmnist_facts(stem, size)), []
    count = 10 if source == "digits" else ASSUMED_CLASSES
    notes = [] if source == "digits" else [f"the classes of {source} are not known before it is read: {count} assumed"]
    facts = {
        "kind": "multi-class",
        "classes": tuple(map(str, range(count))),
        "reading": {"size": size, "grey": source == "digits"},
        "spec": {"size": size},
    }
    return ImageData.without_images(facts), notes


def _any_batch(session: Session) -> dict[str, Tensor]:
    """A batch of the run's shape."""
    run, data = session.run, session.data
    if run.task == "sequences":
        ids, labels = torch.zeros(run.batch_size, data.context, dtype=torch.int64), torch.zeros(run.batch_size)
        labels = labels if data.outputs == 1 else labels.long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if run.task != "images":
        ids = torch.zeros(run.batch_size, data.context, dtype=torch.int64)
        return {"input_ids": ids, "labels": torch.zeros_like(ids)}
    size = getattr(session.model, "image_spec", None)
    side = data.spec.size if size is None else size.size
    labels = torch.zeros(run.batch_size, dtype=torch.int64)
    if data.set.kind == "multi-label":
        labels = torch.zeros(run.batch_size, len(data.classes), dtype=torch.int64)
    return {"images": torch.zeros(run.batch_size, 3, side, side), "labels": labels}


# --- the trace -------------------------------------------------------------------------------------------------------


def _setup(session: Session) -> Setup:
    """What takes the steps of a session: two micro-batches stand for any number above one."""
    run, accumulate = session.run, min(session.run.grad_accum, 2)
    optimizer = session.plan.optimizer(
        run.lr,
        run.weight_decay,
        per_layer=run.per_layer,
        accumulate=accumulate,
        clip_per_layer=run.clip_per_layer,
    )
    batch = _any_batch(session)
    session.model.train()

    def loss() -> Tensor:
        return session.task.loss(session.model, batch) / 1024

    return Setup(
        model=session.model, optimizer=optimizer, plan=session.plan, loss=loss, accumulate=accumulate,
        norm=not run.per_layer, autocast=session.autocast,
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
    if run.task == "text":
        return run.batch_size * session.data.context * int(width) * itemsize
    patches: Any = getattr(getattr(session.model, "patch_embed", None), "num_patches", 0)
    return run.batch_size * (int(patches) + 1) * int(width) * itemsize


def _title(run: Run, context: int | None) -> str:
    size = f"{run.batch_size} × {context} tokens" if run.task == "text" else f"{run.batch_size} images"
    how = [run.precision] + ["per layer"] * run.per_layer + ["checkpointed"] * run.checkpoint_activations
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
