"""The results: one JSON for programs, one page for people, both written anew after every measurement."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Item = Any  # what a measurement gave: a flat dict, or one of {"failed": why} and {"skipped": why}


class Results:
    """What has been measured so far, by section and item."""

    def __init__(self, folder: Path, options: Mapping[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.data, self.page = folder / "gpu.json", folder / "gpu.md"
        self.options = dict(options)
        self.began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        self.sections: dict[str, dict[str, Any]] = {}
        self.write()

    def begin(self, name: str) -> None:
        self.sections[name] = {"status": "running", "items": {}}
        self.write()

    def add(self, name: str, item: str, value: Item) -> None:
        self.sections[name]["items"][item] = value
        self.write()
        print(f"{name}: {item}: {short(value)}", flush=True)

    def end(self, name: str, status: str, seconds: float, why: str) -> None:
        section = self.sections.setdefault(name, {"items": {}})
        section |= {"status": status, "seconds": round(seconds, 1)} | ({"why": why} if why else {})
        self.write()
        print(f"{name}: {status}{': ' + why if why else ''} ({seconds:.1f} s)", flush=True)

    def items(self) -> dict[str, dict[str, Item]]:
        return {name: dict(section["items"]) for name, section in self.sections.items()}

    def failures(self) -> list[str]:
        """Sections and items that failed, were stopped, or whose error is not allowed. No memory or no time is none."""
        found = []
        for name, section in self.sections.items():
            if section["status"] in ("failed", "stopped"):
                found.append(f"{name}: {section['status']}: {section.get('why', '')}")
            for item, value in section["items"].items():
                if "failed" in value and value["failed"] != "out of memory":
                    found.append(f"{name}: {item}: {value['failed']}")
                elif value.get("ok") is False:
                    found.append(f"{name}: {item}: {short(value)}")
        return found

    def summary(self) -> str:
        failed = self.failures()
        checks = [v["ok"] for s in self.sections.values() for v in s["items"].values() if "ok" in v]
        lines = [f"{sum(checks)} of {len(checks)} checks passed; {len(failed)} failures"]
        return "\n".join([*lines, *(f"  {line}" for line in failed)])

    # --- files ---------------------------------------------------------------------------------------------------

    def write(self) -> None:
        content = {"began": self.began, "options": self.options, "sections": self.sections}
        replace_file(self.data, json.dumps(content, indent=1, default=str) + "\n")
        replace_file(self.page, "\n".join(self._page()) + "\n")

    def _page(self) -> Iterator[str]:
        yield f"# lowrank on a GPU, {self.began}\n"
        machine = self.sections.get("environment", {}).get("items", {}).get("device", {})
        if machine:
            yield f"{short(machine)}\n"
        if self.options["tiny"] or self.options["device"] == "cpu":
            yield "**A dry run: it says that everything runs, and nothing of speed.**\n"
        yield self.summary().replace("\n  ", "\n- ") + "\n"
        goals = list(reached(self.items()))
        if goals:
            yield from ["| goal | measured | wanted |", "|---|---|---|"]
            yield from (f"| {name} | {value:.4g} | at most {limit:g} |" for name, value, limit in goals)
            yield ""
        for name, section in self.sections.items():
            told = ", ".join(str(section[key]) for key in ("status", "why") if section.get(key))
            yield f"## {name.replace('_', ' ')}\n\n{told}, {section.get('seconds', 0)} s\n"
            yield from table(section["items"])


def reached(items: Mapping[str, Mapping[str, Item]]) -> Iterator[tuple[str, float, float]]:
    """(goal, measured, at most) for those of the goals that were measured."""
    for name, value in items.get("optimizer_step", {}).items():
        if name.startswith("ours: galore,") and "bfloat16 weights" in name and "seconds" in value:
            if value.get("times_floor") is not None:
                yield f"{name}, over its byte floor", value["times_floor"], 1.3
            if value.get("times_adamw_fused") is not None:
                yield f"{name}, over torch's fused AdamW", value["times_adamw_fused"], 1.0
    for name, value in items.get("adapter_layer", {}).items():
        if name.startswith("lora") and "times_frozen" in value:
            yield f"{name}, over the frozen layer", value["times_frozen"], 1.10
    for name, value in items.get("memory", {}).items():
        if name.startswith("7b galore_8bit, per layer") and value.get("peak_gib"):
            yield f"{name}, peak GiB", value["peak_gib"], 22.0
            yield f"{name}, bytes of state a parameter", value["state_bytes_a_parameter"], 5.0


def table(items: Mapping[str, Item]) -> Iterator[str]:
    """A Markdown table of flat records, a column for each key that any has; errors stand in the last."""
    keys = list(dict.fromkeys(key for value in items.values() for key in value if key not in ("failed", "skipped")))
    if not items:
        return
    trouble = any("failed" in value or "skipped" in value for value in items.values())
    heads = ["", *(key.replace("_", " ") for key in keys), *(["not measured"] if trouble else [])]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for name, value in items.items():
        cells = [show(value.get(key, "")) for key in keys]
        why = [value.get("failed", value.get("skipped", ""))] if trouble else []
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in [name, *cells, *why]) + " |"
    yield ""


def show(value: Any) -> str:
    """A value for people.

    >>> show(0.00012345), show(True), show(12), show(None)
    ('0.0001234', 'yes', '12', '')
    """
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(show(each) for each in value)
    return "" if value is None else str(value)


def short(value: Item) -> str:
    """A record on one line."""
    if not isinstance(value, dict):
        return show(value)
    return ", ".join(f"{key.replace('_', ' ')} {show(each)}" for key, each in value.items())


def replace_file(path: Path, text: str) -> None:
    """Write whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf8")
    os.replace(part, path)
    sys.stdout.flush()
