"""Reports: rows from runs, their figures, tables, pictures and the page."""

import json
import re
import statistics
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from tests.units.fakes import OFFER, FakeTrain, a_run

from lowrank.infra.text import one_line
from lowrank.report import html
from lowrank.report.compare import execute, parse_variant, planned
from lowrank.report.table import (
    best_rates,
    cells,
    differences,
    find_results,
    groups,
    is_finished,
    printed,
    rows,
    text_table,
)
from lowrank.run.run import Call


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


@pytest.mark.parametrize("change", [{"interrupted": True}, {"steps": 39}])
def test_what_was_stopped_or_has_not_reached_its_steps_is_not_finished(runs, change):
    """A run that was continued with more steps and killed has the summary of its first end."""
    (result,) = runs("full")
    assert is_finished(result.folder)
    (result.folder / "summary.json").write_text(json.dumps({**result.summary, **change}))
    assert not is_finished(result.folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", '{"method": "full", "st'),
        ("summary.json", "[]"),
        ("summary.json", "{}"),
        ("summary.json", b"\xff\xfe"),
        ("run.json", "{"),
        ("run.json", '{"recipe": "x"}'),
        ("log.jsonl", '{"step": 1\n{"step": 2}\n'),
        ("log.jsonl", '{"loss": 1}\n{"step": 2}\n'),
    ],
)
def test_a_damaged_file_is_named_and_its_run_left_out(runs, tmp_path, capsys, name, content):
    broken, sound = runs("full", "lora")
    (broken.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = []
    assert find_results([tmp_path / "runs"], say=said.append) == [sound]
    assert len(said) == 1
    assert str(broken.folder / name) in said[0]
    assert not is_finished(broken.folder)
    assert str(broken.folder / name) in capsys.readouterr().err


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


def test_runs_of_other_lengths_or_on_other_data_are_not_ranked_with_each_other(runs, tmp_path):
    long, short = a_run(), a_run(steps=4, eval_every=2)
    other = a_run(data=Call(name="text", args={"tokenizer": "bytes", "context": 64}))
    found = [*runs("full", "lora", base=long), *runs("lora", base=short)[2:], *runs("full", base=other)[3:]]
    titles = ["40 steps, data.context=128", "4 steps, data.context=128", "40 steps, data.context=64"]
    assert [(each.title, [r.method for r in each.results]) for each in groups(found)] == list(
        zip(titles, [["full", "lora"], ["lora"], ["full"]], strict=True)
    )
    text = printed(found, 100)
    assert text.startswith("Runs of different lengths or on different data are not ranked with each other")
    assert [text.count(f"{title}:") for title in titles] == [1, 1, 1]
    assert [each.title for each in groups(found[:2])] == [""]
    html.write(found, tmp_path / "out")
    assert {f"curves{n}.png" for n in ("", "_2", "_3")} < {file.name for file in (tmp_path / "out").iterdir()}
    for name in ("report.md", "report.html"):
        content = (tmp_path / "out" / name).read_text()
        assert all(title in content for title in titles)


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


@pytest.mark.parametrize("width", [80, 100])
def test_what_is_printed_fits_and_loses_nothing(runs, width):
    found = runs("full", "lora", "lora:rank=2:target_modules=q,v,a_very_long_name_of_modules", seeds=(1, 2))
    text = printed(found, width)
    assert max(map(len, text.splitlines())) <= width
    header, body = cells(best_rates(rows(found)))
    for cell in [*header, *(cell for line in body for cell in line[1:])]:
        assert cell in text
    assert body[2][0].replace(" ", "") in "".join(
        line.split("  ")[0].strip() or line.strip() for line in text.split("\n\n")[0].splitlines()
    ).replace(" ", ""), "the long name is folded, not cut"


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
    found = runs("full", "lora", "lte", seeds=(1, 2), rates=(1e-3, 2e-3))
    html.write(found, tmp_path / "out")
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "Every learning rate tried:" in markdown
    assert markdown.count("| full |") == 3
    content = (tmp_path / "out" / "report.html").read_text()
    tags = Tags()
    tags.feed(content)
    assert not tags.open
    assert len(tags.sources) == content.count("<svg") == 4
    assert all(source.startswith("data:text/csv;base64,") for source in tags.sources), "it needs nothing but itself"
    assert not re.search(r"(src|href)=.(?!data:|#)", content)
    assert not re.search(r"url\((?!#)", content)
    ids = re.findall(r' id="([^"]+)"', content)
    assert len(set(ids)) == len(ids)
    for name in ("curves", "costs", "front", "rates"):
        assert (tmp_path / "out" / f"{name}.svg").read_text().startswith("<svg")
        assert (tmp_path / "out" / f"{name}.csv").read_text().startswith("method,")
    assert r"\begin{tabular}" in (tmp_path / "out" / "table.tex").read_text()
    for word in ("method.merge_every", "lora_lr=0.002_seed_2", "data.tokenizer"):
        assert word in tags.words


STRANGE = [
    "<script>alert(1)</script>",
    "a$b$c",
    "=1+1",
    "_x",
    "\x1b[31mred\x07",
    "a|b",
    "[x](http://y)",
    "\u202eabc",
    "{{x}}",
]


@pytest.mark.parametrize("name", STRANGE)
def test_strange_names_change_nothing(runs, tmp_path, monkeypatch, name):
    """In the terminal, on the page, in Markdown and in the picture."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: (figures.append(self), save(self, path, **how)))
    result = runs("full", base=a_run(recipe=name))[0]
    found = [replace(result, settings={**result.settings, "method": name}), result]
    html.write(found, tmp_path / "out")
    seen = one_line(name)
    assert seen.isprintable()
    assert seen in printed(found, 100)
    page, markdown = ((tmp_path / "out" / file).read_text() for file in ("report.html", "report.md"))
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert seen in tags.words
    assert seen in re.sub(r"\\(\W)", r"\1", markdown)
    assert "<script>" not in page
    for text in (page, markdown, printed(found, 80)):
        assert all(c.isprintable() or c == "\n" for c in text)
    legend = figures[0].legends[0].get_texts()
    assert [(text.get_text(), text.get_parse_math()) for text in legend] == [(seen, False), ("full", False)]
    numbers = (tmp_path / "out" / "curves.csv").read_text()
    assert all(not line.startswith(("=", '"=')) for line in numbers.splitlines())
    assert r"\$" in (tmp_path / "out" / "table.tex").read_text() or "$" not in name


def test_curves_have_one_colour_a_method_and_a_legend(runs):
    figure = html.run_sections(runs("full", "lora", seeds=(1, 2)))[0].pictures[0].figure
    training, validation = figure.axes
    for axes in (training, validation):
        assert len({line.get_color() for line in axes.lines}) == 2
        assert len(axes.collections) == 2, "the seeds of each as a band"
        assert axes.get_xlabel() == "optimizer step"
        assert axes.get_ylabel() == "loss (nats per byte)"
    assert list(validation.lines[0].get_xdata()) == [10, 20, 30, 40]
    assert list(validation.lines[0].get_ydata()) == pytest.approx([2.015 + 2 / step for step in (10, 20, 30, 40)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["full", "lora"]


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_without_a_library_the_remedy_is_named(runs, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=re.escape(f"needs {library}: pip install 'lowrank-training[report]'")):
        html.write(runs("full"), tmp_path / "out")
