"""Settings of a run: overridden and completed against the signatures they reach, without importing what they name.

    override     recipe + {"method": "lte", "method.rank": "4"}  ->  Run
    resolve      fills in the defaults of the functions named, so that `run.json` says all
    fingerprint  what two runs have in common whose numbers are the same

`--method X` starts from X's own defaults and from what the recipe says about X (`Run.per_method`, written in the words
of the command line: `{"*": {"lr": 1e-3}, "@adapter": {"method.rank": 8}, "lora": {"lr": 3e-3}}`; "*" first, then the
method's family, then its name); options come on top.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from lowrank.infra.convert import Setting, as_option, convert, nearest
from lowrank.infra.registry import Registry, signature_in
from lowrank.infra.signatures import Signature
from lowrank.run import own_files
from lowrank.run.run import Call, Run, flat, local_paths, names_that

Functions = Mapping[str, Callable[..., Any]]
_CALLS = ("model", "data", "method")
_FIXED = (*_CALLS, "recipe", "per_method", "files")
TASKS = Registry(
    "task",
    "lowrank.evaluate.text_task",
    "lowrank.evaluate.sequence_task",
    "lowrank.evaluate.image_task",
    "lowrank.evaluate.segmentation_task",
)


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The functions that a run's calls name, beside those of a user's own files; their signatures are the options."""

    model: Functions
    data: Functions
    method: Functions
    task: Functions = field(default_factory=lambda: TASKS)

    def of(self, kind: str) -> Functions:
        functions: Functions = getattr(self, kind)
        return functions

    def check(self, kind: str, name: str) -> None:
        """Raise ValueError for a name that is not offered and no file's function; the nearest is named."""
        known = self.of(kind)
        if name not in known and not own_files.is_own(name):
            raise ValueError(
                f"there is no {kind} {name!r}{nearest(name, known)}; there are {', '.join(known)}, and file.py:function"
            )

    def signature(self, kind: str, name: str) -> Signature:
        self.check(kind, name)
        return own_files.signature(name) if own_files.is_own(name) else signature_in(self.of(kind), name)

    def facts(self, kind: str, name: str) -> Mapping[str, Any]:
        """What was said of a function where it is defined, such as a model's task or a method's family."""
        functions = self.of(kind)
        return functions.facts(name) if isinstance(functions, Registry) else {}

    def function(self, kind: str, run: Run) -> Callable[..., Any]:
        """What a run names, imported.

        Raises:
            PermissionError, ValueError: it lies in a file that is not trusted, or has changed (``own_files.load``).
        """
        name = _named(run, kind)
        self.check(kind, name)
        found: Callable[..., Any] = (
            own_files.load(kind, name, run.files) if own_files.is_own(name) else self.of(kind)[name]
        )
        return found

    def make(self, kind: str, run: Run, *first: object) -> Any:
        """What the function that a run names returns for the run's arguments.

        Raises:
            ValueError: a function of one's own returned something else than a method, a model or data.
        """
        made = self.function(kind, run)(*first, **getattr(run, kind).args)
        (wanted, has), name = _MADE[kind], getattr(run, kind).name
        if own_files.is_own(name) and not hasattr(made, has):
            raise ValueError(f"{name} returned {type(made).__name__}, and a {kind} is wanted: {wanted}")
        return made


_MADE = {  # by kind what it is, and what tells it
    "method": ("a lowrank.Method", "rules"),
    "model": ("a torch.nn.Module", "named_parameters"),
    "data": ("what has train() and evaluation(), as lowrank.data.Data", "evaluation"),
}


def catalogue() -> Catalogue:
    """What this library offers."""
    from lowrank.data.catalogue import DATA
    from lowrank.methods import METHODS
    from lowrank.models import MODELS

    return Catalogue(model=MODELS, data=DATA, method=METHODS)


def override(run: Run, changes: Mapping[str, object], offer: Catalogue | None = None) -> Run:
    """The run with some settings changed.

    Args:
        run: where to start.
        changes: option -> value, text or plain data: a field of `Run` ("steps", "batch-size"), "model" or "method" (a
            name, or a file.py:function, which is trusted with that), "data" (a source or file.py:function), "task", or
            an argument of one of these ("method.rank", "model.n_layer").
        offer: the functions to check against; this library's by default.

    Raises:
        ValueError: an unknown option or name, or a value that does not fit; the message names the option, what is
            allowed and the nearest name; or one that another has given, such as a layer's width by the model's size.
    """
    offer = offer or catalogue()
    changes = {name.replace("-", "_"): value for name, value in changes.items()}
    if "labels" in changes:  # of a folder of images, as people call it
        changes["data.labels"] = changes.pop("labels")
    if {"steps", "epochs"} <= changes.keys():
        raise ValueError("--steps and --epochs both give the length of the run: leave one out")
    for kind in (*_CALLS, "task"):
        if kind in changes and (kind != "data" or own_files.is_own(str(changes[kind]))):
            run = _choose(run, kind, str(changes.pop(kind)), offer)
    for name, value in changes.items():
        run = _set(run, name, value, offer)
    for whole, parts in offer.facts("model", run.model.name).get("given_by", {}).items():
        part = next((each for each in parts if f"model.{each}" in changes), None)
        if part and (value := run.model.args.get(whole)) is not None:
            named = f"--model.{whole} {value}"
            raise ValueError(f"--model.{part} is given by {named}: leave it out, or say --model.{whole} none")
    return run


def resolve(run: Run, offer: Catalogue | None = None) -> Run:
    """The run with every argument of its calls written out, in the order of the signatures.

    Raises:
        ValueError: an unknown function or argument, or a value that does not fit.
    """
    offer = offer or catalogue()
    complete: dict[str, Any] = {kind: _complete(run, kind, offer) for kind in _CALLS}
    return _with_the_model_s_tokenizer(replace(run, **complete), offer)


def fingerprint(run: Run, offer: Catalogue | None = None) -> str:
    """SHA-256 over everything that determines the numbers of a run, in hexadecimal.

    Names and logging do not count; a default left out, the same value written out, and the same number written
    otherwise are one run; so is a file of one's own, wherever it lies.
    """
    offer = offer or catalogue()
    run = with_whole_paths(identified(resolve(run, offer)))
    idle = names_that("counts", False)
    content = {name: value for name, value in flat(run.to_json()).items() if name not in idle}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def identified(run: Run) -> Run:
    """The run with the digests of its own files in their names' place."""
    calls = {kind: getattr(run, kind) for kind in _CALLS}
    named: dict[str, Any] = {k: replace(c, name=own_files.identity(c.name, run.files)) for k, c in calls.items()}
    return replace(run, task=own_files.identity(run.task, run.files), **named)


def with_whole_paths(run: Run) -> Run:
    """The run with its local paths written whole: the same from whatever folder one looks."""
    calls = {kind: getattr(run, kind) for kind in _CALLS}
    whole: dict[str, Any] = {k: replace(c, args={**c.args, **local_paths(c.args)}) for k, c in calls.items()}
    return replace(run, **whole)


def told_to_learn(run: Run, offer: Catalogue | None = None) -> tuple[object, ...]:
    """What runs have alike that learn the same as long as their data's content does not change."""
    run = with_whole_paths(resolve(run, offer))
    return run.data, run.model.name, run.model.args.get("path"), run.model.args.get("context")


def options() -> dict[str, Any]:
    """Fields of `Run` that can be set from outside: name -> annotation."""
    hints = get_type_hints(Run)
    return {each.name: hints[each.name] for each in fields(Run) if each.name not in _FIXED}


def _choose(run: Run, kind: str, name: str, offer: Catalogue) -> Run:
    """Another model, method, data or task, from its own defaults; the one already there is left as it is."""
    offer.check(kind, name)
    if own_files.is_own(name):
        name, file, digest = own_files.given(name)
        run = replace(run, files={**run.files, file: digest})
    if name == _named(run, kind):
        return run
    run = _with(run, kind, name if kind == "task" else Call(name=name))
    named = [each.rpartition(":")[0] for each in (run.task, run.model.name, run.data.name, run.method.name)]
    run = replace(run, files={file: digest for file, digest in run.files.items() if file in named})
    return _advised(run, offer) if kind == "method" else run


def _advised(run: Run, offer: Catalogue) -> Run:
    """The run with what its recipe says about its method; for all and by family, what this method has."""
    name = run.method.name
    known = offer.signature("method", name).kinds
    for key in ("*", f"@{offer.facts('method', name).get('family')}", name):
        for option, value in run.per_method.get(key, {}).items():
            if key == name or not option.startswith("method.") or option.removeprefix("method.") in known:
                run = _set(run, option, value, offer)
    return run


def _complete(run: Run, kind: str, offer: Catalogue) -> Call:
    """A call with its defaults; one of a file that is gone or has changed is left as it was written."""
    call: Call = getattr(run, kind)
    file = call.name.rpartition(":")[0]
    if own_files.is_own(call.name) and own_files.digest(Path(file)) != run.files.get(file):
        return call
    told = offer.signature(kind, call.name)
    given = {name: _checked(kind, call.name, name, value, offer) for name, value in call.args.items()}
    defaults = {
        name: convert(value, told.kinds[name], f"--{kind}.{name}")
        for name, value in told.defaults.items()
        if _is_data(value)
    }
    args = defaults | given
    return replace(call, args={name: args[name] for name in told.kinds if name in args})


def _with_the_model_s_tokenizer(run: Run, offer: Catalogue) -> Run:
    """A model that has a tokenizer brings it, where the data leaves that open."""
    own, args = _tokenizer_of(run, offer), run.data.args
    if own is None or "tokenizer" not in args or args["tokenizer"] is not None:
        return run
    return replace(run, data=Call(name=run.data.name, args={**args, "tokenizer": own or None}))


def _tokenizer_of(run: Run, offer: Catalogue) -> Setting:
    """Where the run's model has its tokenizer; None where it has none."""
    argument = offer.facts("model", run.model.name).get("tokenizer")
    return None if argument is None else run.model.args.get(argument)


def _named(run: Run, kind: str) -> str:
    called: Call | str = getattr(run, kind)
    return called if isinstance(called, str) else called.name


def _set(run: Run, name: str, value: object, offer: Catalogue) -> Run:
    """The run with one setting changed."""
    kind, dot, argument = name.partition(".")
    if kind == "data" and not dot:
        argument = "source"
    if kind in _CALLS:
        call: Call = getattr(run, kind)
        before = _tokenizer_of(run, offer)
        args = {**call.args, argument: _checked(kind, call.name, argument, value, offer)}
        run = _with(run, kind, Call(name=call.name, args=args))
        after, data = _tokenizer_of(run, offer), run.data
        if kind == "model" and before != after and before is not None and data.args.get("tokenizer") == before:
            run = replace(run, data=Call(name=data.name, args={**data.args, "tokenizer": after}))
        return run
    known = options()
    if name not in known:
        known_names = [*(as_option(each) for each in known), *map(as_option, _CALLS)]
        raise ValueError(f"there is no option {as_option(name)}{nearest(as_option(name), known_names)}")
    if name in ("steps", "epochs"):
        run = replace(run, steps=None, epochs=None)  # whichever is set, it is the only length
    return _with(run, name, convert(value, known[name], as_option(name)))


def _with(run: Run, name: str, value: Any) -> Run:
    changed: dict[str, Any] = {name: value}
    return replace(run, **changed)


def _checked(kind: str, call: str, argument: str, value: object, offer: Catalogue) -> Setting:
    """A value for an argument of the function that a call names."""
    known = offer.signature(kind, call).kinds
    if argument not in known:
        takes = f"it takes {', '.join(known)}" if known else "it takes no options"
        raise ValueError(f"--{kind}.{argument}: {kind} {call} has no {argument!r}{nearest(argument, known)}; {takes}")
    return convert(value, known[argument], f"--{kind}.{argument}")


def _is_data(default: object) -> bool:
    """Whether a default can stand in a run; there may be none, or an object that only Python can write."""
    if isinstance(default, (list, tuple)):
        return all(map(_is_data, default))
    return default is None or isinstance(default, (bool, int, float, str))
