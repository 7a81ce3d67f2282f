"""Sources of text: built in, local files and folders, corpora by name (see ``builtin``, ``files`` and ``hub``)."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from lowrank.data.text.builtin import builtin
from lowrank.data.text.cache import cache_root
from lowrank.data.text.files import nearest_names, open_files
from lowrank.data.text.hub import CORPORA, open_hub
from lowrank.data.text.source import Source
from lowrank.data.text.tokens import FORMAT, META

NAMES = ("builtin", *CORPORA)


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """A row of ``lowrank data list``. ``prepared``: folders of tokens made from it, in the cache."""

    name: str
    about: str
    size: str
    licence: str
    needs_network: bool
    prepared: tuple[Path, ...]


def open_source(name_or_path: str | Path, *, column: str | None = None) -> Source:
    """A source of text by name, or from a local file or folder (one that is called like a source is written ``./c4``).

    Args:
        name_or_path: ``builtin``, a corpus of ``list_sources``, or a path.
        column: the text's column in tables.

    Raises:
        FileNotFoundError: neither a name nor a path.
        ValueError: not readable as text; see ``files.open_files``.
    """
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    if name in NAMES:
        if column is not None:
            raise ValueError(f"{name} has its own text column: leave column={column!r} out")
        return builtin() if name == "builtin" else open_hub(name)
    if path.exists():
        return open_files(path, column=column)
    near = difflib.get_close_matches(name, NAMES, n=1)
    raise FileNotFoundError(
        f"no file or folder {name!r} and no source of that name{nearest_names(path)}"
        f"{f'; did you mean {near[0]!r}?' if near else ''} (sources: {', '.join(NAMES)})"
    )


def list_sources() -> list[SourceInfo]:
    """Every source with a name, what it is, and where it lies prepared."""
    prepared = _prepared()
    python = SourceInfo(
        name="builtin",
        about="Python's own language reference",
        size="0.4 MB",
        licence="PSF-2.0",
        needs_network=False,
        prepared=tuple(prepared.get("builtin", ())),
    )
    hub = [
        SourceInfo(
            name=name,
            about=of.about,
            size=of.size,
            licence=of.licence,
            needs_network=True,
            prepared=tuple(prepared.get(name, ())),
        )
        for name, of in CORPORA.items()
    ]
    return [python, *hub]


def _prepared() -> dict[str, list[Path]]:
    """Token folders in the cache by the name of their source; folders that are damaged or not ours are left out."""
    found: dict[str, list[Path]] = {}
    for file in sorted((cache_root() / "tokens").glob(f"[!.]*/{META}")):
        try:
            meta = json.loads(file.read_text(encoding="utf-8"))
            if meta["format"] == FORMAT and meta["source"]["fingerprint"].keys() & {"builtin", "hub"}:
                found.setdefault(meta["source"]["name"], []).append(file.parent)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found
