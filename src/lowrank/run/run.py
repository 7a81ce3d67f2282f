"""A run as plain frozen data: what is trained on what, by which method, for how long.

A `Run` names three functions with their arguments (`Call`): a model preset, a data source and a method. It goes to
JSON and back without loss, and that JSON, `run.json`, is all that is needed to repeat the run. Options such as
`{"steps": "200", "method.rank": "4"}` are checked in `lowrank.run.overrides`, against the very signatures they reach.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_type_hints

from lowrank.infra.convert import Setting, convert, nearest

Settings: TypeAlias = Mapping[str, Setting]

# Fields that say what is written and how a run is called, and leave its numbers as they are.
_SILENT = ("recipe", "per_method", "log_every", "checkpoint_every", "keep", "tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function by name, with arguments: `Call(name="lora", args={"rank": 8})`."""

    name: str
    args: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", _frozen(self.args, self.name))

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.args.items())))

    def __reduce__(self) -> Any:
        return Call.from_json, (self.to_json(),)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "args": _thawed(self.args)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Call:
        _refuse_unknown(content, ("name", "args"), "a call")
        return Call(name=content["name"], args=content.get("args", {}))


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that determines a training run.

    Lengths are in optimizer steps, sizes in sequences or images. A step sees `batch_size * grad_accum` of them.
    """

    recipe: str
    task: Literal["text", "images"]
    model: Call
    data: Call
    method: Call
    steps: int | None = field(default=None, metadata={"help": "optimizer steps: the schedule's horizon"})
    epochs: float | None = field(default=None, metadata={"help": "passes over the data, instead of --steps"})
    stop_at: int | None = field(default=None, metadata={"help": "stop after this step, the schedule unchanged"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    min_lr_ratio: float = field(default=0.1, metadata={"help": "last learning rate / peak learning rate"})
    warmup: float = field(default=0.05, metadata={"help": "warm-up: a share of the steps if below 1, else steps"})
    schedule: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata={"help": "shape of the decay after the warm-up"}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "decoupled weight decay"})
    own_data: bool = field(default=False, metadata={"help": "each rank reads (and is scored on) its own --data"})
    batch_size: int = field(default=16, metadata={"help": "sequences or images in a micro-batch"})
    grad_accum: int = field(default=1, metadata={"help": "micro-batches in a step"})
    max_grad_norm: float | None = field(default=1.0, metadata={"help": "clip the global gradient norm; none: do not"})
    clip_per_layer: float | None = field(default=None, metadata={"help": "clip each parameter's gradient norm"})
    per_layer: bool = field(default=False, metadata={"help": "step each layer during backward: saves the gradients"})
    precision: Literal["fp32", "bf16", "fp16", "bf16-weights"] = field(
        default="fp32", metadata={"help": "autocast to bf16 or fp16, or keep the weights themselves in bfloat16"}
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile the model"})
    engine: Literal["auto", "ddp", "fsdp"] = field(
        default="auto",
        metadata={
            "help": "several ranks: LTE's heads apart and else in step; all in step; in step and sharded (FSDP2)"
        },
    )
    workers: int | Literal["nodes"] | None = field(
        default=None,
        metadata={"help": "with --engine ddp or fsdp: groups of ranks that train apart, or one for each of the nodes"},
    )
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "where to train"})
    seed: int = field(default=0, metadata={"help": "seed of weights, factors, data order and dropout"})
    eval_every: int | None = field(default=100, metadata={"help": "steps between evaluations; none: an epoch"})
    eval_batches: int | None = field(default=None, metadata={"help": "batches of an evaluation; none: the whole split"})
    log_every: int = field(default=1, metadata={"help": "steps between records in log.jsonl"})
    checkpoint_every: int = field(default=100, metadata={"help": "steps between checkpoints"})
    keep: int = field(default=2, metadata={"help": "latest checkpoints to keep, beside the best"})
    tensorboard: bool = field(default=False, metadata={"help": "also write TensorBoard events"})
    wandb: bool = field(default=False, metadata={"help": "also write to Weights & Biases"})
    per_method: Mapping[str, Settings] = field(
        default_factory=dict, hash=False, metadata={"help": "what choosing a method also sets; '*': for every method"}
    )

    def __post_init__(self) -> None:
        frozen = {name: _frozen(settings, name) for name, settings in self.per_method.items()}
        object.__setattr__(self, "per_method", MappingProxyType(frozen))

    def __reduce__(self) -> Any:
        return Run.from_json, (self.to_json(),)

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
        content |= {name: content[name].to_json() for name in ("model", "data", "method")}
        content["per_method"] = {name: _thawed(settings) for name, settings in self.per_method.items()}
        return content

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Run:
        """The run that `to_json` wrote.

        Raises:
            ValueError: an unknown key (the nearest is named), a missing one, or a value of the wrong kind.
        """
        _refuse_unknown(content, [each.name for each in fields(Run)], "a run")
        calls: dict[str, Any] = {
            name: Call.from_json(content[name]) for name in ("model", "data", "method") if name in content
        }
        plain = {name: value for name, value in content.items() if name not in (*calls, "per_method")}
        missing = [name for name in ("recipe", "task", "model", "data", "method") if name not in content]
        if missing:
            raise ValueError(f"a run needs {', '.join(missing)}")
        hints = get_type_hints(Run)
        checked: dict[str, Any] = {name: convert(value, hints[name], name) for name, value in plain.items()}
        return Run(**calls, **checked, per_method=content.get("per_method", {}))

    def write(self, path: Path) -> None:
        """The whole file or, if the process is killed, what was there before."""
        beside = path.with_name(f".{path.name}.writing")
        beside.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)

    @staticmethod
    def read(path: Path) -> Run:
        """A run from a `run.json`.

        Raises:
            FileNotFoundError, ValueError: there is none, or it does not hold a run; the message says what is wrong.
        """
        try:
            return Run.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no run at {path}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def fingerprint(run: Run) -> str:
    """SHA-256 over everything that determines the numbers of a run, in hexadecimal.

    Names and logging do not count. Give it resolved runs (`resolve`): a default left out and the same value written
    out are one run then.
    """
    content = {name: value for name, value in run.to_json().items() if name not in _SILENT}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


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
