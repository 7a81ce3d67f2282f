"""What the hostile tables share: one tiny run on text, one on images, an adapter of it, and how a row is tried."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.images import class_folders

from lowrank.cli.app import main

TEXT = "".join(f"The {n}th line of a text that is long enough.\n" for n in range(120))
TINY_TEXT = [
    *["--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--data.context", "16"],
    *["--batch-size", "4", "--steps", "4", "--eval-every", "2", "--eval-batches", "2", "--checkpoint-every", "2"],
    *["--warmup", "1", "--device", "cpu", "--quiet"],
]
TINY_IMAGES = [
    *["--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.patch_size", "14", "--data.size"],
    *["20", "--batch-size", "8", "--steps", "2", "--eval-every", "2", "--device", "cpu", "--quiet"],
]
TINY_LORA = ["--method", "lora", "--method.rank", "2", *TINY_IMAGES]


@dataclass(frozen=True, kw_only=True)
class World:
    """Folders that every row reads and none may change."""

    root: Path

    def __post_init__(self) -> None:
        self.root.mkdir()
        with working_in(self.root):
            (self.root / "text.txt").write_text(TEXT)
            class_folders(self.root / "photos", per_class=12)
            for words in (
                ["train", "gpt-mini", "--data", str(self.root / "text.txt"), *TINY_TEXT, "--out", "text"],
                ["train", "vit-mini", "--data", str(self.root / "photos"), *TINY_LORA, "--out", "images"],
                ["export", "images", "--adapter", "adapter"],
                ["export", "text", "plain"],
            ):
                assert main(words) == 0, words

    @property
    def names(self) -> dict[str, str]:
        """What stands in a row's words for longer ones."""
        quoted = {name: shlex.join(words) for name, words in (("tiny", TINY_TEXT), ("small", TINY_IMAGES))}
        paths = ("text.txt", "photos", "text", "images", "adapter", "plain")
        return quoted | {name.replace(".", "_"): str(self.root / name) for name in paths}

    def image(self) -> Path:
        return next((self.root / "photos" / "ill").iterdir())

    def copy(self, name: str) -> Path:
        """A copy in the working folder of what a row is to spoil."""
        target = Path(name)
        whole = self.root / name
        shutil.copytree(whole, target) if whole.is_dir() else shutil.copy(whole, target)
        return target


Files = Mapping[str, str | bytes] | Callable[[World], Any] | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A command line, what it is given, and what has to come of it.

    ``words``: with {tiny}, {text} and the like for ``World.names``. ``given``: files, or what makes them in the working
    folder. ``says``: what the messages must have in them. ``shows``: what the output must have. ``writes``: globs of
    what may be new or changed; nothing else may.
    """

    name: str
    words: str | Sequence[str]
    given: Files = None
    says: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()
    status: int = 2
    writes: tuple[str, ...] = ()


def command(words: str | Sequence[str], world: World) -> list[str]:
    """A row's words, with the names put in."""
    if isinstance(words, str):
        for name, longer in world.names.items():
            words = words.replace(f"{{{name}}}", longer)
        return shlex.split(words)
    return [world.names.get(word.strip("{}"), word) if word.startswith("{") else word for word in words]


def lay_out(given: Files, world: World) -> None:
    """Make what a row is given, in the working folder."""
    if callable(given):
        given(world)
    elif given is not None:
        for name, content in given.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def seen(*roots: Path) -> dict[str, tuple[int, int]]:
    """What lies in folders: kind and, of files, a checksum."""
    found = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            mode = path.lstat().st_mode
            readable = stat.S_ISREG(mode) and os.access(path, os.R_OK)
            found[str(path)] = (stat.S_IFMT(mode), zlib.crc32(path.read_bytes()) if readable else 0)
    return found


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
