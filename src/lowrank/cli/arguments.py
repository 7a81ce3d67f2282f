"""A command line as data: commands with options, parsed and explained.

Written by hand rather than with argparse because a run's options are open (`--method.rank`, `--model.n_layer`): they
are collected here as text and checked where the signature they reach is known.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from lowrank.infra.convert import as_option, convert, nearest
from lowrank.infra.signatures import Signature, module_file, read

WIDTH = 80  # of everything that explains


class UsageError(ValueError):
    """The command line itself is wrong; the message says how it should be."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """`--name VALUE`, or a switch where `value` is empty (`--name`, `--name false`)."""

    name: str
    value: str = ""
    help: str
    group: str = "Options"


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What was typed: positions in order, options by name with underscores, their values still text."""

    positions: Sequence[str] = ()
    options: Mapping[str, str] = field(default_factory=dict)

    def only(self, names: Iterable[str]) -> dict[str, str]:
        """The options among `names`."""
        return {name: self.options[name] for name in names if name in self.options}

    def without(self, names: Iterable[str]) -> dict[str, str]:
        """The options that are not among `names`."""
        dropped = set(names)
        return {name: value for name, value in self.options.items() if name not in dropped}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand.

    Attributes:
        usage: "train RECIPE [options]"; its first word is the name.
        summary: one line, for the list of commands.
        about: paragraphs and examples (indented by two), for the command's own help.
        call: does it, and returns the exit status.
        options: what it takes.
        prefixes: of further options that it takes ("method."), which are checked where they are used.
        positions: fewest and most words beside the options.
    """

    usage: str
    summary: str
    about: str
    call: Callable[[Parsed], int]
    options: Sequence[Option] = ()
    prefixes: Sequence[str] = ()
    positions: tuple[int, int | None] = (0, 0)

    @property
    def name(self) -> str:
        return self.usage.split()[0]


def command(
    options: Sequence[Option] = (), prefixes: Sequence[str] = (), positions: tuple[int, int | None] = (1, 1)
) -> Callable[[Callable[[Parsed], int]], Command]:
    """Make a command of the function below, which does it and returns the exit status; its docstring is the command's
    help: usage and summary, a line each, then the rest."""

    def made(call: Callable[[Parsed], int]) -> Command:
        usage, summary, about = inspect.getdoc(call).split("\n", 2)  # type: ignore[union-attr]
        told = {"usage": usage, "summary": summary, "about": about}
        return Command(**told, call=call, options=options, prefixes=prefixes, positions=positions)

    return made


def parse(words: Sequence[str], command: Command) -> Parsed:
    """Split a command's words into positions and options.

    Raises:
        UsageError: an unknown option (the nearest is named), one without its value, empty or given twice, too few or
            too many positions.
    """
    known = {option.name: option for option in command.options}
    positions: list[str] = []
    options: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            positions += rest
            break
        if not word.startswith("--"):
            positions.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = _same(flag[2:].replace("-", "_"), known, command.prefixes)
        if name not in known and not name.startswith(tuple(command.prefixes)):
            near = nearest(flag, [as_option(option.name) for option in command.options])
            raise UsageError(f"{command.name} has no option {flag}{near}; see: lowrank {command.name} --help")
        if not equals:
            value = _value(flag, known.get(name), rest)
        if not value:
            raise UsageError(f"{flag} is empty: give it a value, or leave it out")
        if name in options:
            raise UsageError(f"{flag} is given twice")
        options[name] = value
    fewest, most = command.positions
    if most is not None and len(positions) > most:
        raise UsageError(f"unexpected {positions[most]!r}; usage: lowrank {command.usage}")
    if len(positions) < fewest or "" in positions:
        raise UsageError(f"something is missing; usage: lowrank {command.usage}")
    return Parsed(positions=positions, options=options)


def _same(name: str, known: Mapping[str, Option], prefixes: Sequence[str]) -> str:
    """``--tokenizer`` and ``--data.tokenizer`` are one option, in every command that has either."""
    if name == "tokenizer" and name not in known and "data." in prefixes:
        return "data.tokenizer"
    return "tokenizer" if name == "data.tokenizer" and "tokenizer" in known else name


def explain(command: Command) -> str:
    """The help of a command."""
    lines = [f"usage: lowrank {command.usage}", "", fitted(command.about), ""]
    for group in dict.fromkeys(option.group for option in command.options):
        lines += [f"{group}:", *(_row(option) for option in command.options if option.group == group), ""]
    return "\n".join(lines).rstrip()


def overview(about: str, commands: Sequence[Command], closing: str) -> str:
    """The help of the whole program."""
    width = max(len(command.name) for command in commands)
    rows = [f"  {command.name.ljust(width)}  {command.summary}" for command in commands]
    return "\n".join(["usage: lowrank COMMAND …", "", fitted(about), "", "Commands:", *rows, "", fitted(closing)])


def fitted(text: str) -> str:
    """Paragraphs wrapped to the width; what is indented (examples) keeps its lines, long ones end in a backslash."""
    blocks: list[str] = []
    for line in text.strip().splitlines():
        if line.startswith(" "):
            parts = textwrap.wrap(line, WIDTH - 2, subsequent_indent="      ", break_on_hyphens=False)
            blocks.append(" \\\n".join(parts))
        elif blocks and line and blocks[-1] and not blocks[-1].startswith(" "):
            blocks[-1] += " " + line
        else:
            blocks.append(line)
    return "\n".join(block if block.startswith(" ") else textwrap.fill(block, WIDTH) for block in blocks)


def filled(text: str) -> str:
    """A sentence over as many lines as it takes; paths and names stay whole."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


FUNCTIONS = {
    "score": "lowrank.evaluate.score",
    "generate": "lowrank.evaluate.generate",
    "chat": "lowrank.evaluate.chat",
    "predict": "lowrank.evaluate.predict",
    "prepare": "lowrank.data.text.prepare",
}


def signature(function: str) -> Signature:
    """Of a function of the library whose arguments are a command's options; read, not imported."""
    return read(module_file(FUNCTIONS[function]), function)


def arguments(function: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Options converted for the function whose signature they were made from."""
    known = signature(function).kinds
    return {name: convert(value, known[name], as_option(name)) for name, value in options.items()}


def options_of(function: Signature) -> tuple[Option, ...]:
    """Options from a function's signature and the `Args:` of its docstring, without the first, which is a position."""
    about = argument_help(function.doc)
    kinds = list(function.kinds.items())[1:]
    return tuple(
        Option(name=name, value=placeholder(kind), help=about.get(name, "").rstrip(".")) for name, kind in kinds
    )


def placeholder(annotation: Any) -> str:
    """What to write after an option: a word for its kind, its choices, or nothing for a switch."""
    members = [member for member in (get_args(annotation) or (annotation,)) if member is not type(None)]
    if get_origin(annotation) is not None and all(isinstance(member, str) for member in members):
        return "|".join(members)
    if bool in members:
        return ""
    if int in members:
        return "N"
    return "X" if float in members else "TEXT"


def argument_help(docstring: str) -> dict[str, str]:
    """name -> text of the entries under `Args:`; an entry may name several, and go on over lines."""
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in docstring.splitlines():
        if line.strip() in ("Args:", "Raises:", "Returns:"):
            inside = line.strip() == "Args:"
        elif inside and line.strip():
            head, colon, text = line.strip().partition(": ")
            if colon and all(part.strip().isidentifier() for part in head.split(",")):
                names = [part.strip() for part in head.split(",")]
                found |= dict.fromkeys(names, text)
            else:
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _value(flag: str, option: Option | None, rest: list[str]) -> str:
    """The word after an option; a switch takes "true" or "false" and needs neither."""
    if option is not None and not option.value:
        return rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
    if not rest or rest[0].startswith("--"):
        raise UsageError(f"{flag} needs a value")
    return rest.pop(0)


def _row(option: Option) -> str:
    return row(f"  {as_option(option.name)} {option.value}".rstrip(), option.help)


def row(left: str, text: str) -> str:
    """An option and what it means, beside it or below."""
    indent = " " * 28
    beside = len(left) < len(indent) - 1
    first = left.ljust(len(indent)) if beside else indent
    fold = textwrap.TextWrapper(WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
    told = fold.fill(text).rstrip()
    return (told or left) if beside else f"{left}\n{told}"


# --- values ----------------------------------------------------------------------------------------------------------


def switch(parsed: Parsed, name: str) -> bool:
    """Whether an option without a value is given."""
    return bool(convert(parsed.options.get(name, "false"), bool, f"--{name}"))


def several(parsed: Parsed, name: str, default: Sequence[str] = ()) -> list[str]:
    """The values of an option that takes several."""
    if name not in parsed.options:
        return list(default)
    words = [word.strip() for word in parsed.options[name].split(",") if word.strip()]
    if not words:
        raise UsageError(f"--{name} {parsed.options[name]!r} names nothing: give one or more, or leave it out")
    return words


def whole(text: str, name: str) -> int:
    """The value of an option that takes a whole number."""
    value: Any = convert(text, int, name)
    return int(value)


def number(text: str, name: str) -> float:
    """The value of an option that takes a number."""
    value: Any = convert(text, float, name)
    return float(value)
