"""From a run as data to the things it names: data, model, plan. Training, evaluation and export all start here.

    open_session   the session of a Run: what it will train
    restore        the session of a run's folder: what it has trained

Nothing here trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank.adapters import merge_and_unload
from lowrank.data.catalogue import Data
from lowrank.data.images.source import FACTS
from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.workers import nodes
from lowrank.infra import checkpoint
from lowrank.infra.convert import nearest
from lowrank.infra.files import read_json, write_json
from lowrank.infra.fingerprints import digest_of
from lowrank.infra.loaded_parameters import mark_loaded_
from lowrank.infra.text import some
from lowrank.models.blocks import checkpoint_activations_
from lowrank.models.quantised import is_quantised_model
from lowrank.plan.fsdp import shard_
from lowrank.plan.plan import Plan, apply_
from lowrank.plan.quantised_base import check_base, stored_names
from lowrank.run.overrides import catalogue, resolve
from lowrank.run.own_files import is_own
from lowrank.run.run import Run
from lowrank.run.task import Task

BASE = "base.json"


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a run starts from, by which W − W0 can be had later: ``init_from``, the run or checkpoint that its weights
    are of (empty: the run's own model), and a digest of every parameter."""

    init_from: str
    parameters: Mapping[str, str]

    def write(self, folder: Path) -> None:
        write_json(folder / BASE, {"init_from": self.init_from, "parameters": dict(self.parameters)})

    @staticmethod
    def read(folder: Path) -> Base | None:
        """What the run in ``folder`` started from; None where it was written before runs kept that."""
        return Base(**read_json(folder / BASE)) if (folder / BASE).is_file() else None


@dataclass
class Session:
    """A run made real: ``model`` carries the adapters of ``plan`` and lies on ``device``.

    ``base``: what the weights were before, where ``open_session`` was asked for it.
    """

    run: Run
    task: Task
    data: Any
    model: nn.Module
    plan: Plan
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    needs_scaler: bool
    base: Base | None = None


def open_session(
    run: Run,
    *,
    init_from: Path | None = None,
    data: Any = None,
    learnt: Any = None,
    ranks: ProcessGroup | None = None,
    with_base: bool = False,
    make: Callable[[Run, Any], nn.Module] | None = None,
) -> Session:
    """Make a run's data, model and plan.

    Args:
        run: what to make.
        init_from: a run's folder or a checkpoint: its merged weights are the model's start (ReLoRA's warm start, say).
        data: the run's data where it has been made already.
        learnt: what the run has learnt of its data, where it goes on: the data must still be of that kind.
        ranks: the processes that train it together.
        with_base: take the digests of the weights that it starts from.
        make: makes the model, of its dtype and in its place, instead of the function that the run names.
    """
    device = pick_device(run.device)
    autocast, needs_scaler = precision(run.precision, device)
    offer = catalogue()
    if data is None:
        args = run.data.args if learnt is None else learnt.arguments(run.data.args)
        data = offer.make("data", replace(run, data=replace(run.data, args=args)))
    if learnt is not None:
        data = data.learnt_by(learnt, whole=True)
    torch.manual_seed(run.seed)
    model = offer.make("model", run, data) if make is None else make(run, data)
    if run.checkpoint_activations:
        checkpoint_activations_(model)
    data = data.for_model(model)
    if init_from is not None and is_quantised_model(model):
        raise ValueError(
            "--init-from loads weights into a model, and those of --model.quantise are made already: write them out "
            f"(lowrank export {init_from} OUT) and give --model pretrained --model.path OUT"
        )
    if init_from is not None:
        mark_loaded_(model, ())  # what trains is up to the recipe; so a resumed run, which loads nothing here, agrees
        load_plain_(model, init_from)
    if run.precision == "bf16-weights" and make is None:
        to_bfloat16_(model)
    base = None
    if with_base:
        place = "" if init_from is None else str(init_from.expanduser().resolve())
        base = Base(init_from=place, parameters={name: digest_of(p) for name, p in model.named_parameters()})
    if make is None:
        nn.Module.to(model, device)  # transformers' own refuses where a model is quantised
    method = offer.make("method", run)
    plan = apply_(model, method, seed=run.seed, ranks=ranks, workers=_workers(run))
    if run.engine == "fsdp" and plan.intra_worker is not None:
        shard_(plan)
    return Session(run, task_of(run), data, model, plan, device, autocast, needs_scaler, base)


def task_of(run: Run) -> Task:
    """What a run learns."""
    task = catalogue().function("task", run)()
    if not isinstance(task, Task):
        raise ValueError(f"{run.task} makes a {type(task).__name__}, and a task is wanted: a lowrank.run.task.Task")
    return task


def to_bfloat16_(model: nn.Module) -> None:
    """Every number of the model in bfloat16; the codes of a quantised weight stay."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16)


def _workers(run: Run) -> int | None:
    """How many workers the ranks of a run make; None: each is one."""
    if run.engine == "auto":
        return None
    if run.workers == "nodes":
        return nodes()
    return run.workers or 1


def restore(
    folder: Path, which: Literal["best", "latest"] = "best", *, device: str = "auto", data: Any = None
) -> tuple[Session, int]:
    """(session, step) of a run's folder, or of one of its checkpoints: the trained weights, in evaluation mode.

    The session's data is what the run has learnt of it (classes, normalisation, the tokenizer) where that is all that a
    model needs: images and text are not opened (``data.unread``).

    Raises:
        FileNotFoundError: the folder holds no run.
        CheckpointError: it holds no sound checkpoint, or one of other dtypes.
        ValueError: the checkpoint is of another model than the run.json describes.
    """
    root = run_folder(folder)
    run = _described(root)
    found = checkpoint_of(folder, which)
    saved = checkpoint.load(found)
    data = learnt_by_run(run, root, saved) if data is None else data
    on: dict[str, Any] = {} if device == "auto" else {"device": device}
    session = open_session(replace(run, **on), data=data)
    if data is None and (said := learnt_anew(session.data, root)):
        warnings.warn(said, stacklevel=2)
    checkpoint.check_dtypes(session.model.state_dict(), saved.tensors, saved)
    check_base(session.plan, saved)
    load_fitting_(session.model, saved.tensors, found, only=stored_names(session.plan))
    session.model.eval()
    return session, saved.step


def _described(root: Path) -> Run:
    """The run that a folder's run.json describes, with every argument checked: somebody may have edited it."""
    file = root / "run.json"
    run = Run.read(file)
    try:
        run = resolve(run)
        wanted = catalogue().facts("model", run.model.name).get("task")
        if wanted not in (None, run.task) and not is_own(run.task):
            raise ValueError(f"the model {run.model.name} is for {wanted}, and the task is {run.task}")
        if not 0 <= run.seed < 2**63:
            raise ValueError(f"seed {run.seed} must be at least 0 and below 2^63")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return run


def load_fitting_(
    model: nn.Module, state: Mapping[str, Tensor], found: Path, *, only: AbstractSet[str] | None = None
) -> None:
    """Load a checkpoint's tensors, all of the model's or those named ``only``.

    Raises:
        ValueError: the checkpoint is of another model than the run.json describes.
    """
    try:
        if only is not None and only ^ state.keys():
            raise RuntimeError(f"{min(only ^ state.keys())} is in one of them alone")
        model.load_state_dict(state, strict=only is None)
    except RuntimeError as error:
        fault = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{found} is not of the model that the run.json of its run describes: {fault}; was it edited?"
        ) from error


def learnt_by_run(run: Run, root: Path, saved: checkpoint.Checkpoint) -> Any:
    """What a checkpoint and the run's folder say of the data that the run was trained on; None where both are silent:
    the data is opened anew then.
    """
    facts = saved.meta.get("learnt")
    if not facts and (root / FACTS).is_file():  # of images, which were the first to have facts
        facts = read_json(root / FACTS)
    return task_of(run).learnt(facts, (saved.folder, root)) if facts else None


def learnt_anew(data: Data, root: Path) -> str:
    """What is to be said where a run goes on that was saved without what it had learnt of its data, such as a
    tokenizer, which ``data`` says now; empty where nothing is learnt of it."""
    what = "was written before runs kept what they learn of their data (a tokenizer, classes)"
    return f"{root} {what}: it is learnt anew, from the data as it is now" if data.to_json() else ""


def is_run(folder: Path) -> bool:
    """Whether a folder is meant as a run's or a checkpoint's, not being a model's of transformers."""
    return folder.is_dir() and not (folder / "config.json").is_file()


def run_folder(folder: Path) -> Path:
    """The folder of the run: ``folder`` itself, or the run that the checkpoint ``folder`` belongs to."""
    for candidate in (folder, *folder.parents[:2], *folder.absolute().parents[:2]):
        if (candidate / "run.json").is_file():
            return candidate
    raise FileNotFoundError(f"{folder} is no run's folder: it has no run.json")


def checkpoint_of(source: Path, which: Literal["best", "latest"]) -> Path:
    """The checkpoint that ``source`` is, wherever it lies with its run.json, or that is picked of the run there."""
    root = run_folder(source)
    whole = source.absolute() in (root.absolute(), root.absolute() / "checkpoints")
    return pick_checkpoint(root, which) if whole and not checkpoint.is_checkpoint(source) else source


def pick_checkpoint(root: Path, which: Literal["best", "latest"]) -> Path:
    """The checkpoint of a run that was best by validation, or the latest; the latest too where none was evaluated.

    Raises:
        CheckpointError: there is none, or one that may have been the best is damaged.
    """
    place = root / "checkpoints"
    best = checkpoint.best(place) if which == "best" else None
    for note in checkpoint.passed_over(place):
        warnings.warn(note, stacklevel=2)
    return best or checkpoint.latest(place)


def load_plain_(model: nn.Module, source: Path) -> None:
    """Start ``model`` from the merged weights of a run's folder, or one of its checkpoints.

    Raises:
        ValueError: the other run's model has other parameters or shapes; the first few are named.
    """
    session, _ = restore(source, device="cpu")
    state = merge_and_unload(session.model).state_dict()
    ours = model.state_dict()
    wrong = [k for k in ours if k not in state or state[k].shape != ours[k].shape] + [k for k in state if k not in ours]
    if wrong:
        raise ValueError(
            f"the weights of {source} do not fit the model: {some(wrong)}; --init-from wants the very model, and "
            f"for other classes the head is new with lowrank export {source} OUT and --model.weights OUT"
        )
    model.load_state_dict(state)


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {name!r}{nearest(name, ('auto', 'cpu', 'cuda'))}: it is auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available; use --device cpu or auto")
    return torch.device("cuda" if name in ("auto", "cuda") and torch.cuda.is_available() else "cpu")


def precision(name: str, device: torch.device) -> tuple[Callable[[], AbstractContextManager[object]], bool]:
    """(the autocast context, whether a GradScaler is needed) for a precision by name.

    bfloat16 on a GPU below compute capability 8 becomes float16.
    """
    if name in ("fp32", "bf16-weights"):
        return nullcontext, False
    old = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
    dtype = torch.float16 if name == "fp16" or old else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype=dtype), dtype is torch.float16
