"""Corpora that are built in or downloaded: read as published, and clear about what is missing."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowrank.data import list_sources, open_source, prepare
from lowrank.data.text.source import SOURCES
from lowrank.data.text.sources import builtin

Write = Callable[[str, str | bytes], Path]


def test_builtin_repeats_nothing() -> None:
    documents = list(builtin().documents())
    paragraphs = [paragraph for text in documents for paragraph in text.split("\n\n") if len(paragraph) > 60]
    assert len(set(paragraphs)) == len(paragraphs)
    assert sum(map(len, documents)) > 250_000
    assert len(documents) >= 200


def redirect(name: str, monkeypatch: pytest.MonkeyPatch, **elsewhere: Any) -> None:
    """Let a corpus be read from another place."""
    info = SOURCES[name]
    monkeypatch.setitem(SOURCES, name, replace(info, open=replace(info.open, **elsewhere)))  # type: ignore[type-var]


class Table:
    """As much of a `datasets` table as is used."""

    def __init__(self, rows: list[Any], column: str):
        self.rows, self.column, self.column_names = rows, column, [column, "other"]

    def select_columns(self, columns: list[str]) -> "Table":
        assert columns == [self.column]
        return self

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        return ({self.column: self.rows[i : i + batch_size]} for i in range(0, len(self.rows), batch_size))


@pytest.mark.parametrize(
    ("name", "path", "config", "streaming", "column"),
    [
        ("cnn_dailymail", "abisee/cnn_dailymail", "3.0.0", False, "article"),
        ("c4", "allenai/c4", "en", True, "text"),
        ("openwebtext", "Skylion007/openwebtext", None, False, "text"),
    ],
)
def test_corpora_by_name(
    name: str, path: str, config: str | None, streaming: bool, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args: Any, **options: Any) -> Table:
        asked.append((args, options["split"], options["streaming"]))
        return Table([f"{options['split']} {n}" for n in range(600)] + [None], column)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source(name)
    assert len(list(source.documents("train"))) == 600
    for split in source.splits:
        assert next(source.documents(split)) == f"{ {'val': 'validation'}.get(split, split) } 0"
    assert asked[0] == ((path, config), "train", streaming)


def test_a_corpus_through_datasets_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    datasets = pytest.importorskip("datasets")
    text = "First Citizen:\n\nBefore we proceed é\nany further\n"
    path = write("input.txt", text)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    redirect("tiny-shakespeare", monkeypatch, data_files={"train": str(path)})
    assert list(open_source("tiny-shakespeare").documents()) == [text]


def test_streaming_through_datasets_itself(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    pytest.importorskip("datasets")
    lines = "".join(json.dumps({"text": f"page {n}", "url": "u"}) + "\n" for n in range(10))
    path = write("c4-train.00000-of-00001.json.gz", gzip.compress(lines.encode()))
    redirect("c4", monkeypatch, path="json", config=None, data_files={"train": str(path)})
    assert list(open_source("c4").documents()) == [f"page {n}" for n in range(10)]


def test_wikitext_lines_become_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = ["", " = One = \n", "", " text \n", " = = Part = = \n", "", " more \n", " = Two = \n", " end \n"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: Table(rows, "text"))
    documents = list(open_source("wikitext").documents("val"))
    assert documents[1:] == [" = One = \n \n text \n = = Part = = \n \n more \n", " = Two = \n end \n"]


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*args: Any, **options: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OSError, match=r"c4 could not be loaded.*ConnectionError: offline.*local copy"):
        next(open_source("c4").documents())

    def scripted(*args: Any, **options: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(datasets, "load_dataset", scripted)
    with pytest.raises(OSError, match="datasets<4"):
        next(open_source("openwebtext").documents())
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: Table([], "content"))
    with pytest.raises(ValueError, match="no column 'text' any more; it has content, other"):
        next(open_source("c4").documents())


def test_the_list_of_sources(write: Write) -> None:
    listed = {info.name: info for info in list_sources()}
    assert set(listed) == {"builtin", "tiny-shakespeare", "wikitext", "cnn_dailymail", "openwebtext", "c4"}
    assert [name for name, info in listed.items() if not info.needs_network] == ["builtin"]
    assert not listed["builtin"].prepared
    tokens = prepare("builtin")
    prepare(write("c4.txt", "a file that is called like a corpus\n" * 100))
    listed = {info.name: info for info in list_sources()}
    assert listed["builtin"].prepared == (tokens.folder,)
    assert not listed["c4"].prepared
