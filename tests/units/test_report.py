"""Reports: rows from runs, their figures, tables, pictures and the page."""

import json
import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from tests.units.fakes import OFFER, FakeTrain, a_run

from lowrank.report import html
from lowrank.report.compare import execute, parse_variant, planned
from lowrank.report.table import (
    best_rates,
    cells,
    differences,
    find_results,
    is_finished,
    markdown_table,
    rows,
    text_table,
)


@pytest.fixture
def runs(tmp_path):
    """Trains variants and returns their results."""

    def made(*texts, base=None, **options):
        plan = planned(base or a_run(), [parse_variant(text, OFFER) for text in texts], offer=OFFER, **options)
        execute(plan, tmp_path / "runs", FakeTrain(), say=lambda text: None, offer=OFFER)
        return find_results([tmp_path / "runs"])

    return made


def test_results_are_found_in_folders_and_below_them(runs, tmp_path):
    found = runs("full", "lora")
    assert [each.method for each in found] == ["full", "lora"]
    assert find_results([each.folder for each in found]) == found
    (found[0].folder / "summary.json").unlink()
    assert [each.method for each in find_results([tmp_path / "runs"])] == ["lora"]
    with pytest.raises(FileNotFoundError, match=r"no finished run .* in .*full_seed_0; 1 unfinished"):
        find_results([found[0].folder])


def test_what_was_stopped_is_not_finished(tmp_path):
    (tmp_path / "summary.json").write_text('{"interrupted": true}')
    assert not is_finished(tmp_path)
    (tmp_path / "summary.json").write_text('{"interrupted": false}')
    assert is_finished(tmp_path)


def test_seeds_are_averaged_with_their_sample_deviation(runs):
    (row,) = rows(runs("full", seeds=(1, 2, 4)))
    values = [2.01, 2.02, 2.04]
    assert row.mean("val_loss") == pytest.approx(statistics.fmean(values))
    assert row.spread("val_loss") == pytest.approx(statistics.stdev(values))
    header, (line,) = cells([row])
    assert line[header.index("seeds")] == "3"
    assert line[header.index("val loss")] == "2.0233 ± 0.0153"


def test_a_single_seed_has_no_spread(runs):
    (row,) = rows(runs("full"))
    assert row.spread("val_loss") is None
    assert "±" not in cells([row])[1][0][3]


def test_what_several_ranks_have_sent_stands_beside_what_ddp_would(runs):
    alone, told = runs("full", "lora")
    header, _ = cells(rows([alone, told]))
    assert not {"sent/step", "between", "DDP's"} & set(header)
    told = replace(told, summary={**told.summary, "bytes_sent_per_step": 24_400_000, "ddp_bytes_per_step": 977_000_000})
    header, body = cells(rows([alone, told]))
    assert header[-2:] == ["sent/step", "DDP's"]
    assert [line[-2:] for line in body] == [["–", "–"], ["24.4 MB", "977 MB"]]


def test_figures_have_units(runs):
    header, (line,) = cells(rows(runs("full")))
    assert dict(zip(header, line, strict=True)) == {
        "method": "full",
        "lr": "0.001",
        "seeds": "1",
        "val loss": "2.0000",
        "val_accuracy": "0.5000",
        "trained": "850k",
        "state": "6.8 MB",
        "s/step": "0.07",
        "tokens/s": "29k",
        "peak": "612 MB",
    }


def test_runs_of_one_method_are_told_apart_by_what_differs(runs):
    labels = [row.label for row in rows(runs("full", "lte", "lte:merge_every=1", "lora"))]
    assert labels == ["full", "lte merge_every=10", "lte merge_every=1", "lora"]


def test_the_best_rate_of_each_method_is_kept(runs):
    every = rows(runs("full", "lora", rates=(5e-4, 1e-3, 4e-3)))
    assert len(every) == 6
    assert [(row.label, row.lr) for row in best_rates(every)] == [("full", 1e-3), ("lora", 1e-3)]


def test_figures_that_are_missing_or_not_finite_are_left_out(runs):
    found = runs("full", seeds=(1, 2))
    summary = found[0].folder / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"val_loss": float("nan"), "peak_bytes": None}))
    (row,) = rows(find_results([each.folder for each in found]))
    assert row.mean("val_loss") == pytest.approx(2.02)
    assert len(row.values("peak_bytes")) == 1


def test_settings_are_split_into_shared_and_different(runs):
    shared, differ = differences(runs("full", "lte"))
    assert shared["steps"] == 40
    assert shared["model.n_layer"] == 2
    assert differ["method"] == ["full", "lte"]
    assert differ["method.heads"] == [4], "only one of the runs has it"
    assert "steps" not in differ


def test_text_tables_are_aligned():
    lines = text_table(["method", "loss"], [["full", "2.00"], ["multihead_lora", "10.00"]]).splitlines()
    assert lines == ["method           loss", "──────────────  ─────", "full             2.00", "multihead_lora  10.00"]


def test_markdown_tables_escape_bars():
    text = markdown_table(["method", "loss"], [["a|b", "2"]])
    assert text == "| method | loss |\n| --- | ---: |\n| a\\|b | 2 |"


class Tags(HTMLParser):
    """Checks that what is opened is closed, and collects what a page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


def test_the_report_is_written_whole(runs, tmp_path):
    pytest.importorskip("matplotlib")
    found = runs("full", "lora", "lte", seeds=(1, 2), rates=(1e-3, 2e-3))
    table = html.write(found, tmp_path / "out")
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["full", "lora", "lte"]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "Every learning rate tried:" in markdown
    assert markdown.count("| full |") == 3
    content = (tmp_path / "out" / "report.html").read_text()
    tags = Tags()
    tags.feed(content)
    assert not tags.open
    assert len(tags.sources) == 1
    assert tags.sources[0].startswith("data:image/png;base64,"), "the page needs nothing but itself"
    for word in ("method.merge_every", "lora_lr=0.002_seed_2", "data.tokenizer"):
        assert word in tags.words


def test_names_from_outside_are_escaped(runs, tmp_path):
    pytest.importorskip("matplotlib")
    html.write(runs("full", base=a_run(recipe="<script>alert(1)</script>")), tmp_path / "out")
    assert "<script>" not in (tmp_path / "out" / "report.html").read_text()


def test_curves_have_one_colour_a_method_and_a_legend(runs, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    html.draw_curves(rows(runs("full", "lora", seeds=(1, 2))), tmp_path / "curves.png")
    training, validation = figures[0].axes
    for axes in (training, validation):
        assert [line.get_label() for line in axes.lines] == ["full", "lora"]
        assert len({line.get_color() for line in axes.lines}) == 2
        assert len(axes.collections) == 2, "the seeds of each as a band"
        assert axes.get_xlabel() == "optimizer step"
        assert axes.get_ylabel() == "loss (nats per byte)"
    assert list(validation.lines[0].get_xdata()) == [10, 20, 30, 40]
    assert list(validation.lines[0].get_ydata()) == pytest.approx([2.015 + 2 / step for step in (10, 20, 30, 40)])
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["full", "lora"]


def test_without_matplotlib_the_remedy_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'lowrank-training[report]'")):
        html.draw_curves(rows(runs("full")), tmp_path / "curves.png")
