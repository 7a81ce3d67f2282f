"""Models outside the loop: scored on any split, planned without their data.

    score             loss and perplexity of a run, a checkpoint or a pre-trained model, as nanoGPT's eval_gpt2 gives
    planned_session   what a run would train; its data is not read unless the model's shape depends on it

Nothing here trains.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lowrank.data import DATA
from lowrank.data.text.finetuning import holds_examples
from lowrank.evaluate.evaluator import evaluate
from lowrank.infra.hub import located
from lowrank.interop.adapter_start import base_of, base_options, is_adapter, use_adapter_
from lowrank.models.nanogpt import is_nanogpt
from lowrank.models.text import load_pretrained
from lowrank.run.overrides import catalogue, override
from lowrank.run.own_files import is_own
from lowrank.run.run import Call, Run
from lowrank.run.session import Session, is_run, open_session, restore, task_of


def score(
    source: str,
    *,
    data: str | None = None,
    split: str = "val",
    checkpoint: Literal["best", "latest"] = "best",
    column: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    tokenizer: str | None = None,
    base: str | None = None,
    context: int | None = None,
    val_fraction: float | None = None,
    batch_size: int = 8,
    batches: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> dict[str, float]:
    """Metrics of a model on a split, every token scored once.

    Args:
        source: a run's folder or one of its checkpoints, a model's folder or its name on the hub, or an adapter's
            folder.
        data: a text by name or file, or examples (chats, pairs, instructions) where it holds those; by default the
            run's own.
        split: train, val or test.
        checkpoint: which of a run's checkpoints: best (by validation) or latest.
        column: the text's column, in tables.
        prompt, completion: the columns of a pair, where they have other names.
        tokenizer: a pre-trained model's, where it is not its own.
        base: of an adapter's folder: where its base is; by default where the adapter says.
        context: tokens in a window; by default the run's, or the model's up to 1024.
        val_fraction: the share to hold out, where the text has no split of that name.
        batch_size: windows scored at once.
        batches: score so many batches only; by default the whole split.
        device: where to compute.

    Raises:
        ValueError: a pre-trained model without data, or a tokenizer given for a run, which has its own.
        FloatingPointError: the loss is not finite.
    """
    folder = Path(source).expanduser()
    if batch_size < 1 or (batches is not None and batches < 1):
        raise ValueError("--batch-size and --batches must be at least 1")
    pair = {"prompt": prompt, "completion": completion}
    changes: dict[str, Any] = {"column": column, "context": context, "val_fraction": val_fraction, **pair}
    if base is not None and not is_adapter(folder):
        raise ValueError(f"--base goes with the folder of an adapter, which {source} is not")
    if is_adapter(folder):
        place = base_of(folder, base)
        own = source if (folder / "tokenizer_config.json").is_file() else place
        session = _pretrained(place, data, changes | {"tokenizer": tokenizer or own}, device, adapter=folder)
    elif is_run(folder):
        if tokenizer is not None:
            raise ValueError(f"{source} was trained with a tokenizer of its own: leave --tokenizer out")
        session, _ = restore(folder, checkpoint, device=device)
        session = _on_other_data(session, data, changes)
    else:
        session = _pretrained(source, data, changes | {"tokenizer": tokenizer or source}, device)
    found = session.data.evaluation(split, batch_size, batches)
    metrics = evaluate(session.model, found, session.task, device=session.device, autocast=session.autocast)
    if not math.isfinite(metrics.get("loss", 0.0)):
        raise FloatingPointError(
            f"the loss of {source} on {split} is {metrics['loss']}: its weights have diverged, or were damaged"
        )
    rate = session.data.bytes_per_token(split) if session.task.unit == "tokens" else None
    return metrics | ({"bits_per_byte": metrics["loss"] / math.log(2) / rate} if rate else {})


def planned_session(run: Run) -> Session:
    """The session of a run that is not going to be trained.

    The vocabulary is the model's own where it is given; only where it is left to the data are tokens prepared.
    """
    task = task_of(run)
    data = None if run.data.name not in DATA or task.shaped_by_data(run) else task.stand_in(run)[0]
    return open_session(run, data=data)


def _on_other_data(session: Session, source: str | None, changes: dict[str, Any]) -> Session:
    """The session with other data, text under the run's own tokenizer."""
    options = {f"data.{name}": value for name, value in changes.items() if value is not None}
    if source is None and not options and not session.data.unread:
        return session
    if source is not None and not is_own(source):
        columns = ("data.column", "data.prompt", "data.completion")
        own = dict.fromkeys((*columns, "data.delimiter", "data.separator", "data.limit"))
        options = {name: value for name, value in own.items() if name[5:] in session.run.data.args} | options
    if source is None and session.data.unread and not Path(str(session.run.data.args.get("source"))).exists():
        source = session.data.origin or None  # the run's own, where it was given from another working directory
    run = override(session.run, options if source is None else {"data": source, **options})
    made = catalogue().function("data", run)(**session.data.arguments(run.data.args))
    made = made.for_model(session.model).learnt_by(session.data)
    return replace(session, run=run, data=made)


def _pretrained(
    source: str, data: str | None, changes: dict[str, Any], device: str, adapter: Path | None = None
) -> Session:
    """A session around a model from a folder or the hub, with an adapter or without, for looking at it only."""
    if data is None:
        raise ValueError(f"on what text is {source} to be scored? give --data NAME|FILE")
    from transformers import AutoConfig

    if is_nanogpt(source) and changes["tokenizer"] == source:
        raise ValueError(f"{source} brings no tokenizer: give --tokenizer gpt2, chars, or what it was trained with")
    examples = bool(changes["prompt"] or changes["completion"]) or holds_examples(data, changes["column"])
    if changes["context"] is None and not examples:
        if is_nanogpt(source):
            config: Any = load_pretrained(source).config
        else:
            config = AutoConfig.from_pretrained(located(source), trust_remote_code=False)
        changes["context"] = min(1024, getattr(config, "max_position_embeddings", 1024))
    given = {name: value for name, value in changes.items() if value is not None}
    run = Run(
        recipe="score",
        task="text",
        model=Call(name="pretrained", args={"path": source, **({} if adapter is None else base_options(adapter))}),
        data=Call(name="examples" if examples else "text", args={"source": data, **given}),
        method=Call(name="full"),
        steps=1,
        device=device,  # type: ignore[arg-type]
    )
    session = open_session(run)
    if adapter is not None:
        use_adapter_(session.model, adapter)
    return session
