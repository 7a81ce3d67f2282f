"""``make demo``, with its commands shortened: they fit each other, and what they promise is there afterwards."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lowrank.cli import app as cli

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
SHORTER = {"120": "12", "40": "6", "16": "1", "200": "5", "3": "0.4", "1,2,3": "1"}


@pytest.mark.slow
def test_the_demo_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)

    def shorter(words: list[str]) -> int:
        return cli.main([SHORTER.get(word, word) for word in words])

    monkeypatch.setattr(demo, "lowrank", shorter)
    demo.main(str(tmp_path / "demo"))
    for half in ("text", "images"):
        assert (tmp_path / "demo" / half / "report.html").is_file()
        assert (tmp_path / "demo" / half / "curves.png").is_file()
