"""The commands that say what there is: ``data``, which also prepares one, ``methods`` and ``recipes``."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import shlex
import textwrap
from collections.abc import Mapping

from lowrank.cli.arguments import (
    WIDTH,
    Parsed,
    UsageError,
    argument_help,
    arguments,
    command,
    filled,
    fitted,
    options_of,
    row,
    signature,
)
from lowrank.methods.options import OPTIONS
from lowrank.recipes import RECIPES, find
from lowrank.run.overrides import catalogue, resolve


@command(options_of(signature("prepare")), positions=(1, 2))
def data(parsed: Parsed) -> int:
    """data list, or data prepare NAME|FILE [options]
    the texts there are, and tokenising one

    lowrank data list shows the texts that have a name; any .txt, .csv, .jsonl, .parquet or folder works beside them.
    lowrank data prepare tokenises one into memory-mapped files; train does so by itself where it has not been done.

    Examples:
      lowrank data prepare articles.csv --tokenizer bpe:4096 --column article
      lowrank data prepare openwebtext --tokenizer gpt2 --out data/openwebtext
    """
    from lowrank.data import list_sources, prepare
    from lowrank.report.table import text_table

    what, *names = parsed.positions
    if what == "list" and not names:
        header = ["name", "size", "licence", "network", "prepared", "about"]
        fold = textwrap.TextWrapper(28, break_on_hyphens=False).wrap
        body: list[list[str]] = []
        for each in list_sources():
            network, prepared = "yes" if each.needs_network else "no", str(len(each.prepared))
            licence, about = textwrap.wrap(each.licence, 13), fold(each.about)
            lines = list(itertools.zip_longest(licence, about, fillvalue=""))
            body.append([each.name, each.size, lines[0][0], network, prepared, lines[0][1]])
            body += [["", "", more, "", "", text] for more, text in lines[1:]]
        print(text_table(header, body, left=(0, 2, 3, 5)))
        return 0
    if what == "prepare" and len(names) == 1:
        tokens = prepare(names[0], **arguments("prepare", parsed.options))
        print(tokens)
        place = shlex.quote(str(tokens.folder))
        print(f"\nTrain on it:\n  lowrank train gpt-mini --data {place}")
        return 0
    raise UsageError("usage: lowrank data list, or lowrank data prepare NAME|FILE [options]")


@command(positions=(0, 1))
def methods(parsed: Parsed) -> int:
    """methods [NAME]
    the catalogue of methods, or one with its options

    Lists the methods; with a name, its source, defaults and options.
    """
    offer = catalogue()
    if not parsed.positions:
        print(_catalogue({name: offer.signature("method", name).doc for name in offer.method}))
        return 0
    told = offer.signature("method", parsed.positions[0])
    about = OPTIONS | argument_help(told.doc)
    text = fitted(told.doc.partition("\nArgs:")[0])
    print(f"{parsed.positions[0]}\n\n{text}\n\nOptions, with their defaults:")
    for name, default in told.defaults.items():
        print(row(f"  --method.{name} {_written(default)}", about.get(name, "").rstrip(".")))
    return 0


@command(positions=(0, 1))
def recipes(parsed: Parsed) -> int:
    """recipes [NAME]
    the recipes, or one with everything it sets

    Lists the recipes; with a name, its command, time, expected result and all its settings as JSON.
    """
    if not parsed.positions:
        print(_catalogue({name: inspect.getdoc(recipe) or "" for name, recipe in RECIPES.items()}))
        return 0
    name = parsed.positions[0]
    run = resolve(find(name))
    if name in RECIPES:
        summary, _, rest = (inspect.getdoc(RECIPES[name]) or "").partition("\n\n")
        print(f"{name}\n\n{filled(summary)}\n\n{_entries(rest)}\n")
    print(json.dumps(run.to_json(), indent=2))
    return 0


def _catalogue(docs: Mapping[str, str]) -> str:
    """Names with the first paragraph of their docstrings."""
    indent = " " * (max(map(len, docs)) + 2)
    first = {name: " ".join(doc.partition("\n\n")[0].replace("``", "").split()) for name, doc in docs.items()}
    return "\n".join(
        textwrap.fill(about, WIDTH, initial_indent=name.ljust(len(indent)), subsequent_indent=indent)
        for name, about in first.items()
    )


def _entries(text: str) -> str:
    """Lines of ``Key: what``, each filled under its key; commands stay whole, to be copied."""
    entries = re.sub(r"\n {2,}", " ", text).splitlines()
    return "\n".join(
        line if line.startswith("Command:") else textwrap.fill(line, WIDTH, subsequent_indent=" " * 10)
        for line in entries
    )


def _written(default: object) -> str:
    """A default as it would be typed."""
    if isinstance(default, (list, tuple)):
        return ",".join(map(str, default)) or "[]"
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
