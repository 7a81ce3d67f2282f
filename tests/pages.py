"""The pages as what a reader does with them: their commands and their Python blocks, in order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SHELL = ("", "bash", "sh", "console")
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:lowrank|torchrun|python|make|pip|export|sbatch)\b")


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(kind, text) of each fenced block; in a shell's, lines that end in a backslash are joined with the next."""
    for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        yield kind, re.sub(r"\\\n\s*", "", text) if kind in SHELL else text


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(command, the lines that it prints) of a shell's block; where commands stand behind ``$``, the page has these."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if _COMMAND.match(line):
            yield line, []
        elif line.startswith("$ "):
            until = next((n for n, other in enumerate(lines) if n > number and other.startswith("$ ")), len(lines))
            yield line.removeprefix("$ "), lines[number + 1 : until]
