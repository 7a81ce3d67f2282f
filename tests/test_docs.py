"""The pages hold: links lead somewhere, commands are commands, figures and messages are the code's.

That all of them run, tests/runs/test_pages.py shows.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from benchmarks import composition
from tests.pages import BLOCK, ROOT, SHELL, blocks
from tests.pages import commands as shell

from lowrank.cli import app
from lowrank.cli.arguments import parse
from lowrank.methods import METHODS
from lowrank.recipes import RECIPES, find
from lowrank.recipes.experiments import find_experiment
from lowrank.report.variants import parse_variant
from lowrank.run.overrides import catalogue, override, resolve
from lowrank.run.run import Run

PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING")),
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Of headings, as both GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"`[^`]*`", "", prose(page))
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'\bsrc(?:set)?="([^"]+)"', text)]:
        if target.startswith(("http://", "https://", "mailto:")):
            assert re.fullmatch(r"https://[\w.-]+/\S*", target), f"{name}: {target}"
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{name} links to {target}, which is not there"
        assert ROOT in file.parents
        if anchor:
            assert anchor in anchors(file), f"{name} links to {target}: no such heading"


def test_the_site_has_every_page() -> None:
    told = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"(docs/[\w-]+\.md)"', told)
    assert sorted(listed) == sorted(name for name in NAMES if name.startswith("docs/"))


def commands() -> Iterator[tuple[str, str]]:
    """Every call of the command with its page: in blocks, and in the text those that are more than a name."""
    for name in NAMES:
        for line in [line for kind, block in blocks(ROOT / name) if kind in SHELL for line, _ in shell(block)]:
            assert "…" not in line, f"{name}: {line}: no command that can be run"
            if found := re.match(r"(?:torchrun .* -m )?lowrank (.*)$", line):
                yield name, found[1]
        for inline in re.findall(r"`lowrank ([a-z]+ [^`…]+)`", prose(ROOT / name)):
            if not re.search(r"\b[A-Z]+\b|your arguments", inline):
                yield name, inline.replace("\n", " ")


COMMANDS = sorted(set(commands()))
# generated, or each section for itself
TOLD = ("api", "coming-from", "composition", "evidence", "log", "protocol")
KNOWN = {command.name: command for command in app.COMMANDS}


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 60
    assert {name for name, _ in COMMANDS} >= {"README.md", "docs/start.md", "docs/finetuning.md", "docs/coming-from.md"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("docs/")])
def test_commands_stand_in_blocks_and_first(name: str) -> None:
    """An indented command would be checked by nobody, and a page begins with the command that answers its title."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"^ {4,}(torchrun|lowrank|python|make) ", prose(ROOT / name), re.M)
    if Path(name).stem not in TOLD:
        assert "```" in text.split("\n## ")[0]


@pytest.mark.parametrize(("name", "words"), COMMANDS)
def test_a_command_is_one(name: str, words: str) -> None:
    """By the command's own parser and the settings' own checks: names, options, values. Nothing is run here."""
    name, *rest = shlex.split(words, comments=True)
    if "--help" in rest:
        assert name in KNOWN
        return
    parsed = parse([word for word in rest if word != "--"], KNOWN[name])
    recipe = next(iter(parsed.positions), "")
    if name in ("train", "plan", "compare") and recipe in RECIPES:
        settings = {field.name for field in fields(Run)} | {"model", "method", "data", "task"}
        chosen = {n: v for n, v in parsed.options.items() if n.partition(".")[0] in settings or "." in n}
        resolve(override(find(recipe), chosen))
        for method in parsed.options.get("methods", "").split(",") if "methods" in parsed.options else ():
            parse_variant(method, catalogue())
    elif name == "compare":
        assert find_experiment(recipe) is not None


@pytest.mark.parametrize("name", NAMES)
def test_python_can_be_read(name: str) -> None:
    for kind, block in BLOCK.findall((ROOT / name).read_text(encoding="utf-8")):
        if kind == "python":
            ast.parse(block)


def test_hyperparameters_are_the_defaults() -> None:
    text = (ROOT / "docs" / "hyperparameters.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(METHODS)
    for row in rows:
        for method in re.findall(r"`(\w+)`", row[0]):
            defaults = METHODS.signature(method).defaults
            for option, value in re.findall(r"`(\w+)=([^`]+)`", row[1]):
                assert str(defaults[option]) == value, f"{method}: {option}"


def test_messages_are_the_code_s() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    told = re.findall(r"^\| `([a-z][^`]+)` \|", text, re.M)
    assert len(told) >= 10
    for words in told:
        assert words in sources, words


def test_what_composes_is_what_was_tried() -> None:
    """The page is of the committed results, and a sample of them is tried again."""
    found = json.loads(composition.newest().read_text(encoding="utf-8"))
    assert composition.PAGE.read_text(encoding="utf-8") == composition.page(found)
    for method, option in (("lora", "--per-layer"), ("galore", "--clip-per-layer 1"), ("lte", "--grad-accum 2")):
        name = f"`{option}`"
        again = composition.tried({"method": method, **composition.FAMILIES[method], **composition.OPTIONS[name]})
        assert again == found["methods"][method][name]
