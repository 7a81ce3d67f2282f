"""Pages of HTML by jinja2: escaped, and nothing that a name holds can steer what shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank.infra.extras import import_extra
from lowrank.infra.text import one_line


def filled(template: Path, **values: Any) -> str:
    """The template, filled; a value that it asks for and is not given is an error."""
    jinja2 = import_extra("jinja2", "report")
    how = {"autoescape": True, "trim_blocks": True, "undefined": jinja2.StrictUndefined, "finalize": _harmless}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(template.parent), **how)
    text: str = environment.get_template(template.name).render(**values)
    return text


def _harmless(value: Any) -> Any:
    """Text as one line without control characters; jinja2's own markup as it is."""
    return one_line(value) if type(value) is str else value
