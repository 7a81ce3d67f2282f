"""What a run can name: methods, models, data and tasks, each announced where it is defined.

    @register("model", "gpt2", task="text")
    def gpt2(data, *, n_layer: int = 12): ...

    MODELS = Registry("model", "lowrank.models.text", "lowrank.models.vision")

A registry is a mapping from names to functions (or classes). Names, facts and signatures are read from the sources, so
that help and checks need no import; a function's module is imported when the function is asked for.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lowrank.infra.signatures import Signature, module_file, read, signature_of, source_of

T = TypeVar("T")


def register(kind: str, name: str | None = None, **facts: object) -> Callable[[T], T]:
    """Announce the function or class below under ``name`` (by default its own) with facts; all are plain constants."""
    return lambda thing: thing


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where something lies, and what was said of it."""

    module: str
    attribute: str
    facts: Mapping[str, Any]


class Registry(Mapping[str, Callable[..., Any]]):
    """What the modules announce of one kind, in the order of the modules and of their lines."""

    def __init__(self, kind: str, *modules: str):
        self.kind, self.modules = kind, modules

    def __getitem__(self, name: str) -> Callable[..., Any]:
        entry = self.entries[name]
        found: Callable[..., Any] = getattr(importlib.import_module(entry.module), entry.attribute)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @functools.cached_property
    def entries(self) -> Mapping[str, Entry]:
        return {name: entry for module in self.modules for name, entry in _announced(self.kind, module)}

    def facts(self, name: str) -> Mapping[str, Any]:
        """What was said of a name beside it, such as a model's ``task``; nothing of an unknown one."""
        return self.entries[name].facts if name in self.entries else {}

    def signature(self, name: str) -> Signature:
        """Read, not imported."""
        entry = self.entries[name]
        return _READ(module_file(entry.module), entry.attribute)


_READ = functools.cache(read)  # of this package's own files, which stay as they are


def signature_in(functions: Mapping[str, Callable[..., Any]], name: str) -> Signature:
    """The signature of one of ``functions``, read from the source where it is a registry's."""
    return functions.signature(name) if isinstance(functions, Registry) else signature_of(functions[name])


def _announced(kind: str, module: str) -> Iterator[tuple[str, Entry]]:
    for node in source_of(module_file(module)).tree.body:
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register":
                told, *names = map(ast.literal_eval, call.args)
                if told == kind and isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    facts = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
                    name = names[0] if names else node.name
                    yield name, Entry(module=module, attribute=node.name, facts=facts)
