"""Settings of a run: overridden and completed against the signatures they reach.

    override   recipe + {"method": "lte", "method.rank": "4"}  ->  Run
    resolve    fills in the defaults of the functions named, so that `run.json` says all

`--method X` starts from X's own defaults and from what the recipe says about X (`Run.per_method`, written in the words
of the command line: `{"*": {"lr": 1e-3}, "lora": {"lr": 3e-3, "method.rank": 8}}`, "*" first); options come on top.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from lowrank.infra.convert import Setting, convert, nearest, settable
from lowrank.run.run import Call, Run

Functions = Mapping[str, Callable[..., Any]]
_CALLS = ("model", "data", "method")
_FIXED = (*_CALLS, "recipe", "task", "per_method")


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The functions that a run's calls name; their signatures are the options."""

    model: Functions
    data: Functions
    method: Functions

    def of(self, kind: str) -> Functions:
        functions: Functions = getattr(self, kind)
        return functions


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
            name), "data" (the source), or an argument of one of these ("method.rank", "model.n_layer").
        offer: the functions to check against; this library's by default.

    Raises:
        ValueError: an unknown option or name, or a value that does not fit; the message names the option, what is
            allowed and the nearest name.
    """
    offer = offer or catalogue()
    changes = {name.replace("-", "_"): value for name, value in changes.items()}
    if "labels" in changes:  # of a folder of images, as people call it
        changes["data.labels"] = changes.pop("labels")
    if {"steps", "epochs"} <= changes.keys():
        raise ValueError("--steps and --epochs both give the length of the run: leave one out")
    for kind in ("model", "method"):
        if kind in changes:
            run = _choose(run, kind, str(changes.pop(kind)), offer)
    for name, value in changes.items():
        run = _set(run, name, value, offer)
    return run


def resolve(run: Run, offer: Catalogue | None = None) -> Run:
    """The run with every argument of its calls written out, in the order of the signatures.

    Raises:
        ValueError: an unknown function or argument, or a value that does not fit.
    """
    offer = offer or catalogue()
    complete: dict[str, Any] = {}
    for kind in _CALLS:
        call: Call = getattr(run, kind)
        function = _function(kind, call.name, offer)
        parameters = inspect.signature(function).parameters
        known = settable(function)
        given = {name: _checked(kind, call.name, name, value, offer) for name, value in call.args.items()}
        args = {name: parameters[name].default for name in known if _is_data(parameters[name].default)} | given
        complete[kind] = Call(name=call.name, args={name: args[name] for name in known if name in args})
    return replace(run, **complete)


def options() -> dict[str, Any]:
    """Fields of `Run` that can be set from outside: name -> annotation."""
    hints = get_type_hints(Run)
    return {each.name: hints[each.name] for each in fields(Run) if each.name not in _FIXED}


def _choose(run: Run, kind: str, name: str, offer: Catalogue) -> Run:
    """Another model or method, from its own defaults; the one already there is left as it is."""
    _function(kind, name, offer)
    if getattr(run, kind).name == name:
        return run
    run = _with(run, kind, Call(name=name))
    if kind == "method":
        for hints in (run.per_method.get("*", {}), run.per_method.get(name, {})):
            for option, value in hints.items():
                run = _set(run, option, value, offer)
    return run


def _set(run: Run, name: str, value: object, offer: Catalogue) -> Run:
    """The run with one setting changed."""
    kind, dot, argument = name.partition(".")
    if kind == "data" and not dot:
        argument = "source"
    if kind in _CALLS:
        call: Call = getattr(run, kind)
        args = {**call.args, argument: _checked(kind, call.name, argument, value, offer)}
        return _with(run, kind, Call(name=call.name, args=args))
    known = options()
    if name not in known:
        known_names = [*(_flag(each) for each in known), "--model", "--data", "--method"]
        raise ValueError(f"there is no option {_flag(name)}{nearest(_flag(name), known_names)}")
    if name in ("steps", "epochs"):
        run = replace(run, steps=None, epochs=None)  # whichever is set, it is the only length
    return _with(run, name, convert(value, known[name], _flag(name)))


def _with(run: Run, name: str, value: Any) -> Run:
    changed: dict[str, Any] = {name: value}
    return replace(run, **changed)


def _function(kind: str, name: str, offer: Catalogue) -> Callable[..., Any]:
    functions = offer.of(kind)
    if name not in functions:
        raise ValueError(f"there is no {kind} {name!r}{nearest(name, functions)}; there are {', '.join(functions)}")
    return functions[name]


def _checked(kind: str, call: str, argument: str, value: object, offer: Catalogue) -> Setting:
    """A value for an argument of the function that a call names."""
    known = settable(_function(kind, call, offer))
    if argument not in known:
        takes = f"it takes {', '.join(known)}" if known else "it takes no options"
        raise ValueError(f"--{kind}.{argument}: {kind} {call} has no {argument!r}{nearest(argument, known)}; {takes}")
    return convert(value, known[argument], f"--{kind}.{argument}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_data(default: object) -> bool:
    """Whether a default can stand in a run; there may be none, or an object that only Python can write."""
    if isinstance(default, (list, tuple)):
        return all(map(_is_data, default))
    return default is None or isinstance(default, (bool, int, float, str))
