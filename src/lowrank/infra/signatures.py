"""What a function can be told: its docstring, and its parameters that can be set as data.

``signature_of`` asks a function; ``read`` reads the same from a source file without running it, in milliseconds where
an import takes seconds, and without trusting a file that is not ours. Annotations may name aliases of the same file or
of this package; what cannot be resolved counts as an object, which only Python can write.
"""

from __future__ import annotations

import ast
import collections.abc
import functools
import inspect
import itertools
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_type_hints

from lowrank.infra.convert import can_be_set

T = TypeVar("T")
REQUIRED = inspect.Parameter.empty
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """``kinds``: name -> annotation of each parameter that can be set; ``defaults``: name -> default, or REQUIRED."""

    name: str
    doc: str
    kinds: Mapping[str, Any]
    defaults: Mapping[str, Any]


def signature_of(function: Callable[..., Any]) -> Signature:
    """Parameters that take objects (a rule, a schedule) are left out, and so are ``*args`` and ``**kwargs``."""
    hints = get_type_hints(function)
    for more in getattr(function, "__also__", ()):
        hints |= get_type_hints(more)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [each for each in inspect.signature(function).parameters.values() if each.kind in named]
    kinds = {each.name: hints[each.name] for each in parameters if each.name in hints}
    defaults = {each.name: each.default for each in parameters}
    return _signature(function.__name__, inspect.getdoc(function), kinds, defaults)


def read(file: Path, name: str) -> Signature:
    """The signature of the function ``name`` in a source file, as :func:`signature_of` would give it.

    Raises:
        OSError, ValueError: there is no such file, it is not Python, or it defines no such function.
    """
    source = source_of(file)
    node = source.names.get(name)
    if isinstance(node, ast.ClassDef):
        return _signature(name, ast.get_docstring(node), {}, {})
    if not isinstance(node, ast.FunctionDef):
        raise ValueError(f"{file} defines no function {name!r}")
    placed, only = node.args.args, node.args.kwonlyargs
    values: list[ast.expr | None] = [*[None] * (len(placed) - len(node.args.defaults)), *node.args.defaults]
    pairs = list(zip([*placed, *only], [*values, *node.args.kw_defaults], strict=True))
    kinds = {each.arg: source.annotation(each.annotation) for each, _ in pairs if each.annotation}
    defaults = {each.arg: REQUIRED if value is None else source.constant(value) for each, value in pairs}
    for more in itertools.chain.from_iterable(map(source.also, node.decorator_list)):
        kinds, defaults = kinds | dict(more.kinds), defaults | dict(more.defaults)
    return _signature(name, ast.get_docstring(node), kinds, defaults)


def also(*more: Callable[..., Callable[[T], T]], **defaults: object) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """The function below takes the keyword arguments of each of ``more`` beside its own, by other ``defaults`` where
    those are given: its result goes through each ``more(…)``.

    @also(groups, head_lr=0.1)
    def galore(*, rank: int = 128) -> Method: ...        # galore(rank=4, embedding_lr=0.2)
    """
    takes = [inspect.signature(each).parameters for each in more]
    added = [each.replace(default=defaults.get(each.name, each.default)) for names in takes for each in names.values()]

    def extended(function: Callable[..., T]) -> Callable[..., T]:
        own = inspect.signature(function)

        @functools.wraps(function)
        def both(*args: Any, **options: Any) -> T:
            told = {each.name: options.pop(each.name, each.default) for each in added}
            result = function(*args, **options)
            for each, names in zip(more, takes, strict=True):
                result = each(**{name: told[name] for name in names})(result)
            return result

        both.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]
        both.__also__ = more  # type: ignore[attr-defined]
        return both

    return extended


def module_file(module: str) -> Path:
    """The source of a module of this package."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _signature(name: str, doc: str | None, kinds: Mapping[str, Any], defaults: Mapping[str, Any]) -> Signature:
    kinds = {each: kind for each, kind in kinds.items() if can_be_set(kind)}
    return Signature(name=name, doc=doc or "", kinds=kinds, defaults={each: defaults[each] for each in kinds})


_TYPES: dict[str, Any] = {kind.__name__: kind for kind in (int, float, bool, str, list, tuple, set, frozenset, Path)}


class Source:
    """A source file, parsed: what its names stand for at the top level."""

    def __init__(self, file: Path):
        self.file, text = file, file.read_text(encoding="utf-8")
        try:
            self.tree = ast.parse(text)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as Python: {error}") from error
        self.names: dict[str, ast.AST] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.names[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.names[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                self.names[node.target.id] = node.value
            elif isinstance(node, ast.ImportFrom) and node.module:
                self.imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}

    def also(self, decorator: ast.expr) -> Iterator[Signature]:
        """What a decorator ``also(more, …)`` adds: the signature of each, of this file or of this package."""
        match decorator:
            case ast.Call(func=ast.Name(id="also"), args=more, keywords=keywords):
                told = {str(each.arg): self.constant(each.value) for each in keywords}
                for name in (each.id for each in more if isinstance(each, ast.Name)):
                    module, original = self.imports.get(name, ("", name))
                    if module.startswith("lowrank.") or name in self.names:
                        found = read(module_file(module) if module else self.file, original)
                        own = {each: told.get(each, value) for each, value in found.defaults.items()}
                        yield replace(found, defaults=own)

    def annotation(self, node: ast.AST) -> Any:
        """The type that an annotation stands for."""
        match node:
            case ast.Constant(value=str() as text):
                return self.annotation(ast.parse(text, mode="eval").body)
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return self._named(name)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return Union[self.annotation(left), self.annotation(right)]  # noqa: UP007
            case ast.Subscript(value=outer, slice=inner):
                parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                kind = self.annotation(outer)
                try:
                    return kind[tuple(map(ast.literal_eval if kind is Literal else self.annotation, parts))]
                except TypeError:
                    return object
        return object

    def constant(self, node: ast.AST) -> Any:
        """The value of a default; the node itself where it is no plain data."""
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.constant(self.names[node.id])
        if isinstance(node, ast.Name) and (origin := self._origin(node.id)):
            return origin[0].constant(ast.Name(origin[1]))
        try:
            return ast.literal_eval(node)
        except ValueError:
            return node

    def _named(self, name: str) -> Any:
        if name in _TYPES:
            return _TYPES[name]
        if name in self.names:
            return self.annotation(self.names[name])
        if origin := self._origin(name):
            return origin[0]._named(origin[1])
        return getattr(collections.abc, name, None) or getattr(typing, name, object)

    def _origin(self, name: str) -> tuple[Source, str] | None:
        """The source that a name of this package was imported from."""
        module, original = self.imports.get(name, ("", ""))
        file = module_file(module) if module.startswith("lowrank.") else None
        return (source_of(file), original) if file and file.is_file() else None


@functools.cache
def source_of(file: Path) -> Source:
    """The file, read once in a process."""
    return Source(file)
