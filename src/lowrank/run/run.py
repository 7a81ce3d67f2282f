"""A run as plain frozen data: what is trained on what, by which method, for how long.

A `Run` names three functions with their arguments (`Call`): a model preset, a data source and a method. It goes to
JSON and back without loss, and that JSON, `run.json`, is all that is needed to repeat the run. Options such as
`{"steps": "200", "method.rank": "4"}` are checked in `lowrank.run.overrides`, against the very signatures they reach.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_type_hints

from lowrank.infra.convert import Setting, convert, nearest
from lowrank.infra.files import read_json, write_json
from lowrank.run.own_files import short

Settings: TypeAlias = Mapping[str, Setting]

_CALLS = ("model", "data", "method")
_PATHS = ("source", "labels", "tokenizer", "chat_template", "path", "weights")  # arguments of data and models
_RETIRED = ("workers",)  # arguments of data "text" that changed no number, in runs written when there were some


def _setting(
    default: Any,
    help: str,
    group: str,
    *,
    may_change: bool = False,
    counts: bool = True,
    labels: bool = True,
) -> Any:
    """A field of a run, and what is to be known of it.

    Args:
        default: where a recipe does not say.
        help: for its option.
        group: under which heading ``--help`` shows it.
        may_change: when the run is resumed; nothing of it is in the checkpoint.
        counts: it determines the run's numbers, so that it is part of the fingerprint.
        labels: runs that differ in it are told apart by it in tables.
    """
    about = {"help": help, "group": group, "may_change": may_change, "counts": counts, "labels": labels}
    return field(default=default, metadata=about)


_WRITTEN: Any = {"may_change": True, "counts": False, "labels": False}  # says what is written, and changes no number


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function by name, with arguments: `Call(name="lora", args={"rank": 8})`.

    What a run has read, and asks for nothing:
        fingerprint: of data, the digest of what was trained on (`Data.fingerprint`).
        places: by argument, where a local path led to, from whatever folder one looks (`placed`).
    """

    name: str
    args: Settings = field(default_factory=dict)
    fingerprint: str = field(default="", compare=False)
    places: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", _frozen(self.args, self.name))
        object.__setattr__(self, "places", MappingProxyType(dict(self.places)))

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.args.items())))

    def placed(self) -> Call:
        """The call with where its local paths lead to from here."""
        return replace(self, places=local_paths(self.args))

    def __reduce__(self) -> Any:
        return Call.from_json, (self.to_json(),)

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"name": self.name, "args": _thawed(self.args)}
        content |= {"fingerprint": self.fingerprint} if self.fingerprint else {}
        return content | ({"places": dict(self.places)} if self.places else {})

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Call:
        """The call that `to_json` wrote; a path that leads elsewhere from this working directory is written whole."""
        _refuse_unknown(content, ("name", "args", "fingerprint", "places"), "a call")
        name, fingerprint = content.get("name"), content.get("fingerprint", "")
        if not isinstance(name, str):
            raise ValueError(f"a call has a name, which is text, got {name!r}")
        if not isinstance(fingerprint, str):
            raise ValueError(f"a call's fingerprint is text, got {fingerprint!r}")
        args, places = (_mapping(content.get(each, {}), f"a call's {each}") for each in ("args", "places"))
        if not all(isinstance(place, str) for place in places.values()):
            raise ValueError(f"a call's places are texts, got {dict(places)!r}")
        here = local_paths(args)
        moved = {
            each: at
            for each, at in places.items()
            if at != here.get(each) and _leads_to(args.get(each), at) and os.path.exists(at)
        }
        return Call(name=name, args={**args, **moved}, fingerprint=fingerprint, places=places)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that determines a training run.

    Lengths are in optimizer steps, sizes in sequences or images. A step sees `batch_size * grad_accum` of them.
    `per_method`: what choosing a method also sets, by its name, its family (`@adapter`, `@projected`) or for all (`*`).
    `files`: the digests of the user's own files that the calls name (`lowrank.run.own_files`).
    """

    recipe: str = field(metadata=_WRITTEN)
    task: str
    model: Call
    data: Call
    method: Call
    steps: int | None = _setting(None, "optimizer steps: the schedule's horizon", "Length", may_change=True)
    epochs: float | None = _setting(None, "passes over the data, instead of --steps", "Length", may_change=True)
    stop_at: int | None = _setting(None, "stop after this step, the schedule unchanged", "Length", may_change=True)
    lr: float = _setting(1e-3, "peak learning rate", "Learning rate", labels=False)
    min_lr_ratio: float = _setting(0.1, "last learning rate / peak learning rate", "Learning rate")
    warmup: float = _setting(0.05, "warm-up: a share of the steps if below 1, else steps", "Learning rate")
    schedule: Literal["cosine", "linear", "constant"] = _setting(
        "cosine", "shape of the decay after the warm-up", "Learning rate"
    )
    weight_decay: float = _setting(0.1, "decoupled weight decay", "Learning rate")
    own_data: bool = _setting(False, "each rank reads (and is scored on) its own --data", "Steps")
    batch_size: int = _setting(16, "sequences or images in a micro-batch", "Steps")
    grad_accum: int = _setting(1, "micro-batches in a step", "Steps")
    max_grad_norm: float | None = _setting(1.0, "clip the global gradient norm; none: do not", "Steps")
    clip_per_layer: float | None = _setting(None, "clip each parameter's gradient norm", "Steps")
    per_layer: bool = _setting(False, "step each layer during backward: saves the gradients", "Steps")
    precision: Literal["fp32", "bf16", "fp16", "bf16-weights"] = _setting(
        "fp32", "autocast to bf16 or fp16, or keep the weights themselves in bfloat16", "Machine"
    )
    checkpoint_activations: bool = _setting(
        False,
        "compute each block again in the backward pass: saves its activations",
        "Machine",
        may_change=True,
        counts=False,
    )
    compile: bool = _setting(False, "torch.compile the model", "Machine", may_change=True)
    engine: Literal["auto", "ddp", "fsdp"] = _setting(
        "auto", "several ranks: LTE's heads apart and else in step; all in step; in step and sharded (FSDP2)", "Machine"
    )
    workers: int | Literal["nodes"] | None = _setting(
        None,
        "with --engine ddp or fsdp: groups of ranks that train apart, or one for each of the nodes",
        "Machine",
        may_change=True,
    )
    device: Literal["auto", "cpu", "cuda"] = _setting("auto", "where to train", "Machine", may_change=True)
    seed: int = _setting(0, "seed of weights, factors, data order and dropout", "Length", labels=False)
    eval_every: int | Literal["never"] | None = _setting(
        100, "steps between evaluations; none: an epoch; or never", "Evaluation and records", may_change=True
    )
    eval_batches: int | None = _setting(
        None, "batches of an evaluation; none: the whole split", "Evaluation and records", may_change=True
    )
    log_every: int = _setting(1, "steps between records in log.jsonl", "Evaluation and records", **_WRITTEN)
    checkpoint_every: int = _setting(100, "steps between checkpoints", "Evaluation and records", **_WRITTEN)
    keep: int = _setting(2, "latest checkpoints to keep, beside the best", "Evaluation and records", **_WRITTEN)
    tensorboard: bool = _setting(False, "also write TensorBoard events", "Evaluation and records", **_WRITTEN)
    wandb: bool = _setting(False, "also write to Weights & Biases", "Evaluation and records", **_WRITTEN)
    per_method: Mapping[str, Settings] = field(default_factory=dict, hash=False, metadata=_WRITTEN)
    files: Mapping[str, str] = field(default_factory=dict, hash=False, metadata=_WRITTEN)

    def __post_init__(self) -> None:
        frozen = {name: _frozen(_mapping(settings, name), name) for name, settings in self.per_method.items()}
        object.__setattr__(self, "per_method", MappingProxyType(frozen))
        object.__setattr__(self, "files", MappingProxyType(dict(self.files)))

    def __reduce__(self) -> Any:
        return Run.from_json, (self.to_json(),)

    @property
    def split_heads(self) -> int | None:
        """Heads of its method that split a batch, and are divided between workers; None where there are none."""
        heads = self.method.args.get("heads")
        return heads if isinstance(heads, int) and "merge_every" in self.method.args else None

    def horizon(self, batches_per_epoch: int) -> int:
        """Optimizer steps of the whole schedule, where an epoch has so many micro-batches."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None, "validate() refuses a run with neither steps nor epochs"
        return max(1, math.ceil(self.epochs * batches_per_epoch / self.grad_accum))

    def warmup_steps(self, steps: int) -> int:
        """Optimizer steps of warm-up in a run of `steps`."""
        return round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, the keys in the order of the fields."""
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        content |= {name: content[name].to_json() for name in _CALLS} | {"files": dict(self.files)}
        content["per_method"] = {name: _thawed(settings) for name, settings in self.per_method.items()}
        return content

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Run:
        """The run that `to_json` wrote.

        Raises:
            ValueError: an unknown key (the nearest is named), a missing one, or a value of the wrong kind.
        """
        _refuse_unknown(content, [each.name for each in fields(Run)], "a run")
        missing = [name for name in ("recipe", "task", *_CALLS) if name not in content]
        if missing:
            raise ValueError(f"a run needs {', '.join(missing)}")
        calls: dict[str, Any] = {name: Call.from_json(content[name]) for name in _CALLS}
        if (data := calls["data"]).name == "text":
            args = {name: value for name, value in data.args.items() if name not in _RETIRED}
            calls["data"] = replace(data, args=args)
        hints = get_type_hints(Run)
        mappings: dict[str, Any] = {name: _mapping(content.get(name, {}), name) for name in ("per_method", "files")}
        plain = content.keys() - calls.keys() - mappings.keys()
        checked: dict[str, Any] = {name: convert(content[name], hints[name], name) for name in plain}
        return Run(**calls, **checked, **mappings)

    def write(self, path: Path) -> None:
        """The whole file or, if the process is killed, what was there before."""
        write_json(path, self.to_json())

    @staticmethod
    def read(path: Path) -> Run:
        """A run from a `run.json`.

        Raises:
            FileNotFoundError, ValueError: there is none, or it does not hold a run; the message says what is wrong.
        """
        try:
            content = read_json(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no run at {path}") from error
        try:
            return Run.from_json(content)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """A run's JSON as dotted names, in order: the task, each call's name and arguments, and every other setting.

    >>> flat({"method": {"name": "lora", "args": {"rank": 8}}, "steps": 40, "per_method": {}})
    {'method': 'lora', 'method.rank': 8, 'steps': 40}
    """
    found: dict[str, Any] = {}
    for name, value in content.items():
        if name in _CALLS:
            found[name] = short(value["name"])
            found |= {f"{name}.{argument}": each for argument, each in value["args"].items()}
        elif name not in ("per_method", "files"):
            found[name] = short(value) if name == "task" else value
    return found


def local_paths(args: Mapping[str, Any]) -> dict[str, str]:
    """Of the arguments that may be paths those that lead to something here, written whole."""
    given = {name: os.path.expanduser(args[name]) for name in _PATHS if isinstance(args.get(name), str)}
    return {name: os.path.abspath(path) for name, path in given.items() if os.path.exists(path)}  # "" is none


def _leads_to(typed: object, place: str) -> bool:
    """Whether a path as typed can be that place, from some folder: an edited run.json names another."""
    parts = [part for part in Path(str(typed)).expanduser().parts if part not in (".", "..")]
    return Path(place).parts[-len(parts) :] == tuple(parts) if parts else False


def names_that(what: Literal["may_change", "counts", "labels"], answer: bool = True) -> frozenset[str]:
    """The settings of a run of which ``what`` (see ``_setting``) is so."""
    default = what != "may_change"
    return frozenset(each.name for each in fields(Run) if each.metadata.get(what, default) is answer)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is written as an object, got {value!r}")
    return value


def _frozen(settings: Mapping[str, Any], owner: str) -> Settings:
    """A read-only copy whose lists are tuples.

    Raises:
        TypeError: a value is not plain data.
    """
    return MappingProxyType({name: _plain(value, f"{owner}: {name}") for name, value in settings.items()})


def _plain(value: Any, name: str) -> Setting:
    if isinstance(value, (list, tuple)):
        return tuple(_plain(part, name) for part in value)  # type: ignore[misc]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(f"{name} is {value!r}; a run holds text, finite numbers, true, false, none and lists of them")


def _thawed(settings: Settings) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _refuse_unknown(content: Mapping[str, Any], known: Any, what: str) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{what} is written as an object, got {content!r}")
    for name in content:
        if name not in known:
            raise ValueError(f"{what} has no {name!r}{nearest(name, known)}")
