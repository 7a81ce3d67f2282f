"""Reports: rows from runs, their figures, tables, pictures and the page."""

import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tests.units.fakes import OFFER, FakeTrain, a_run

from lowrank.cli import reporting
from lowrank.infra.text import one_line
from lowrank.report import comparison as compared
from lowrank.report import html
from lowrank.report.comparison import find_comparisons, of_runs
from lowrank.report.pictures import draw_curves
from lowrank.report.runs import find_results, find_unfinished, is_finished
from lowrank.report.table import apart, best_rates, cells, differences, groups, latex_table, rows, text_table
from lowrank.report.variants import execute, parse_variant, planned
from lowrank.run.run import Call

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture
def runs(tmp_path):
    """Trains variants and returns their results."""

    def made(*texts, base=None, **options):
        plan = planned(base or a_run(), [parse_variant(text, OFFER) for text in texts], offer=OFFER, **options)
        execute(plan, tmp_path / "runs", FakeTrain(), say=lambda text: None, offer=OFFER)
        return find_results([tmp_path / "runs"])

    return made


def printed(found, width):
    return compared.printed(of_runs(found), width, apart(groups(found)))


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


def test_seeds_are_averaged_with_their_sample_deviation_and_one_has_no_spread(runs):
    found = runs("full", "lora", seeds=(1, 2, 4))
    several, one = rows([each for each in found if each.method == "full" or each.settings["seed"] == 1])
    values = [2.01, 2.02, 2.04]
    assert several.mean("val_loss") == pytest.approx(statistics.fmean(values))
    assert several.spread("val_loss") == pytest.approx(statistics.stdev(values))
    assert one.spread("val_loss") is None
    header, lines = cells([several, one])
    assert [line[header.index("seeds")] for line in lines] == ["3", "1"]
    assert [line[header.index("val loss")] for line in lines] == ["2.023 ± 0.015", f"{one.mean('val_loss'):.3f}"]


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
        "val loss": "2.000",
        "val_accuracy": "0.5000",
        "trained": "850k",
        "state": "6.8 MB",
        "s/step": "0.07",
        "tokens/s": "29k",
        "peak": "612 MB",
    }


def test_runs_of_one_method_are_told_apart_by_what_differs_and_the_best_rate_of_each_is_kept(runs):
    every = rows(runs("full", "lte", "lte:merge_every=1", rates=(5e-4, 1e-3, 4e-3)))
    assert [row.label for row in every[::3]] == ["full", "lte merge_every=10", "lte merge_every=1"]
    assert len(every) == 9
    assert [(row.label, row.lr) for row in best_rates(every)] == [(row.label, 1e-3) for row in every[1::3]]


def test_runs_of_other_lengths_or_on_other_data_are_not_ranked_with_each_other(runs, tmp_path):
    long, short = a_run(), a_run(steps=4, eval_every=2)
    other = a_run(data=Call(name="text", args={"tokenizer": "bytes", "context": 64}))
    found = [*runs("full", "lora", base=long), *runs("lora", base=short)[2:], *runs("full", base=other)[3:]]
    titles = ["40 steps, data.context=128", "4 steps, data.context=128", "40 steps, data.context=64"]
    assert [(each.title, [r.method for r in each.results]) for each in groups(found)] == list(
        zip(titles, [["full", "lora"], ["lora"], ["full"]], strict=True)
    )
    text = printed(found, 100)
    assert text.startswith("Runs of different lengths, of other models or batches or on different data are not ranked")
    assert [text.count(f"{title}:") for title in titles] == [1, 1, 1]
    assert [each.title for each in groups(found[:2])] == [""]
    html.write_folder(of_runs(found), tmp_path / "out")
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


def test_text_tables_are_aligned_and_latex_reads_names_as_text():
    lines = text_table(["method", "loss"], [["full", "2.00"], ["multihead_lora", "10.00"]]).splitlines()
    assert lines == ["method           loss", "──────────────  ─────", "full             2.00", "multihead_lora  10.00"]
    lines = latex_table(["method", "loss"], [["a_b$%<\\", "2.00 ± 0.01"]]).splitlines()
    assert r"a\_b\$\%$<$\textbackslash{} & 2.00 $\pm$ 0.01 \\" in lines


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
    """Checks that what is opened is closed, and collects what a page says and refers to."""

    def __init__(self, page):
        super().__init__()
        self.open, self.links, self.words = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


def html_of(found, folder):
    html.write(of_runs(found), folder / "page.html")
    return (folder / "page.html").read_text()


def whole(page):
    """The page's tags; it refers to nothing but itself."""
    tags = Tags(page)
    assert all(link.startswith(("data:", "#")) for link in tags.links)
    assert not re.search(r"@import|<script|url\((?!#)", page)
    assert len(ids := re.findall(r'\bid="([^"]+)"', page)) == len(set(ids)), "pictures' ids are their own"
    assert set(re.findall(r"(?:url\(|href=\"(?!data:))#?([^)\"]*)", page)) <= set(ids)
    return tags


PICTURES = ["Loss against steps", "Loss against tokens", "Loss against seconds"]
PICTURES += ["Quality against memory, with the Pareto front", "Every learning rate tried"]


def test_the_report_is_written_whole(runs, tmp_path):
    found = runs("full", "lora", "lte", seeds=(1, 2), rates=(1e-3, 2e-3))
    html.write_folder(of_runs(found), tmp_path / "out")
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "Every learning rate tried:" in markdown
    assert markdown.count("| full |") == 3
    tags = whole((tmp_path / "out" / "report.html").read_text())
    assert [word for word in tags.words if word in PICTURES] == PICTURES
    for word in ("method.merge_every", "lora_lr=0.002_seed_2", "data.tokenizer"):
        assert word in tags.words
    files = {file.name for file in (tmp_path / "out" / "figures").iterdir()}
    names = ("loss-steps", "quality-memory", "rates")
    assert files >= {"table.tex", *(f"{n}.{end}" for n in names for end in ("csv", "svg"))}
    rates = (tmp_path / "out" / "figures" / "rates.csv").read_text().splitlines()
    assert rates[:2] == ["method,lr,figure,fewer_steps", "full,0.001,2.015,False"]
    quality = (tmp_path / "out" / "figures" / "quality-memory.csv").read_text().splitlines()
    assert quality[:2] == ["method,peak_bytes,figure,deviation,on_the_front", "full,612000000,2.015,0.00707,True"]
    losses = (tmp_path / "out" / "figures" / "loss-steps.csv").read_text().splitlines()
    assert losses[:2] == ["method,seed,split,step,tokens,seconds,loss", "full,1,train,1,2900,0.1,5.01"]


def test_one_page_of_300_runs_is_small_and_soon_made(runs, tmp_path):
    few = runs("full", "lora", "lte")
    found = [replace(each, settings={**each.settings, "seed": seed}) for each in few for seed in range(100)]
    began = time.process_time()
    html.write(of_runs(found), tmp_path / "page.html")
    assert time.process_time() - began < 10
    assert (tmp_path / "page.html").stat().st_size < 5_000_000
    assert [file.name for file in tmp_path.glob("*.*")] == ["page.html"]


def test_a_page_that_would_be_too_large_leaves_files_out(runs, tmp_path, monkeypatch):
    found = runs("full", "lora")
    whole_page = html_of(found, tmp_path)
    monkeypatch.setattr(html, "_LARGEST", len(whole_page) - 1)
    page = html_of(found, tmp_path)
    assert len(page) < len(whole_page) / 1.5
    assert page.count("<figure>") == whole_page.count("<figure>")
    assert page.count("data:image/svg") == 0
    assert "too\nlarge to hold the pictures as files" in page


def test_the_sentence_stands_above_the_table(runs, tmp_path):
    (group,) = of_runs(runs("full", "lora", seeds=(1, 2, 3)))
    html.write([group], tmp_path / "page.html")
    words, (told,) = whole((tmp_path / "page.html").read_text()).words, group.answer
    assert told.startswith("lora is worse than full by 1.499 (p < 0.001)")
    assert words.index("tiny: which of full, lora has the lowest loss on the validation split?") < words.index(told)
    assert words.index(told) < words.index("val loss")


def test_a_run_without_an_end_is_a_row_with_its_reason(runs, tmp_path):
    sound, *others = runs("full", "lora", "lora:rank=2", "lora:rank=4", "lora:rank=8")
    for each in others:
        (each.folder / "summary.json").unlink()
    failed, diverged, stopped, damaged = (each.folder for each in others)
    (failed / "failed.json").write_text('{"error": "RuntimeError: <b>no</b>"}')
    (diverged / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n')
    (damaged / "run.json").write_text("{")
    stopped_at = json.loads((stopped / "log.jsonl").read_text().splitlines()[-1])["step"]
    unfinished = find_unfinished([tmp_path / "runs"])
    assert [each.why for each in unfinished] == [
        "RuntimeError: <b>no</b>",
        "the loss became not finite at step 2 of 40",
        f"not finished: step {stopped_at} of 40",
    ]
    (group,) = of_runs([sound], unfinished)
    assert len(group.table[1]) == 4
    assert group.answer == ["There is nothing to compare: one method ran."]
    html.write([group], tmp_path / "page.html")
    assert whole((tmp_path / "page.html").read_text()).words.count("RuntimeError: <b>no</b>") == 2
    for file in ("summary.json", "log.jsonl"):
        (sound.folder / file).unlink()
    (unfinished,) = find_unfinished([sound.folder], growing=True)
    html.write(of_runs([], [unfinished]), tmp_path / "page.html")
    words = whole((tmp_path / "page.html").read_text()).words
    assert "No run has come to its end yet." in words
    assert "running: step 0 of 40" in words


def test_the_page_grows_with_its_runs(runs, tmp_path, monkeypatch):
    _, second = runs("full", "lora")
    summary = (second.folder / "summary.json").read_text()
    (second.folder / "summary.json").unlink()
    page, seen = tmp_path / "live.html", []

    def look(seconds):
        seen.append((page.read_text(), page.stat().st_mtime_ns))
        if len(seen) == 2:
            (second.folder / "summary.json").write_text(summary)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(reporting.time, "sleep", look)
    with pytest.raises(KeyboardInterrupt):
        reporting.watch([tmp_path / "runs"], page)
    assert ["running: step 40 of 40" in text for text, _ in seen] == [True, True, False]
    assert seen[0][1] == seen[1][1], "nothing had grown"
    assert "http-equiv" in seen[0][0]


def test_an_experiment_is_a_page_of_its_own(tmp_path):
    """As committed: no run is at hand."""
    found, why = find_comparisons([RESULTS / "heads-ranks-merge"])
    assert len(found) == 1
    assert not why
    html.write(found, tmp_path / "page.html")
    tags = whole((tmp_path / "page.html").read_text())
    assert [word for word in tags.words if word in PICTURES] == PICTURES
    assert found[0].answer[0] in tags.words
    assert found[0].about["command"] in tags.words
    both, why = find_comparisons([RESULTS / "heads-ranks-merge", RESULTS / "layers-replaced"])
    assert [each.title.partition(" ")[0] for each in both] == ["heads-ranks-merge", "layers-replaced"]
    assert why.startswith("Each experiment has a table of its own")


def test_what_a_run_recorded_of_its_layers_and_bases_is_drawn(runs, tmp_path):
    """And left out of the page of runs that did not."""
    full, lora = runs("full", "lora")
    with (lora.folder / "log.jsonl").open("a") as log:
        log.write('{"step": 40, "basis_energy": 0.5, "basis_overlap": 0.25}\n')
    layers = {"attention": {"change": 0.5, "effective_rank": 2.5, "trained": 1000}}
    (lora.folder / "spectra.json").write_text(json.dumps({"layers": layers}))
    html.write_folder(of_runs(find_results([full.folder, lora.folder])), tmp_path / "out")
    for name in ("change", "effective-rank", "trained", "basis-energy", "basis-overlap"):
        assert len((tmp_path / "out" / "figures" / f"{name}.csv").read_text().splitlines()) == 2
    assert "Effective rank of the change" not in html_of([full], tmp_path)


@pytest.mark.parametrize("what", ["", "foreign", "missing"])
def test_a_folder_without_runs_is_refused(tmp_path, what):
    if what == "foreign":
        (tmp_path / "notes.txt").write_text("x")
    place = tmp_path / "none" if what == "missing" else tmp_path
    with pytest.raises(FileNotFoundError, match="there is no"):
        find_comparisons([place])


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<script>
parent.postMessage(JSON.stringify({
  wide: document.documentElement.scrollWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  paper: getComputedStyle(document.body).backgroundColor,
  fetched: performance.getEntriesByType("resource").length,
  pictures: [...document.querySelectorAll("figure svg")].map(each => Math.round(each.getBoundingClientRect().width)),
}), "*");
</script>"""
FRAME = """<script>addEventListener("message", event => { document.title = event.data; });</script>
<iframe src="page.html" width="WIDTH" height="900" frameborder="0"></iframe>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_shows_the_page(tmp_path, width, dark):
    """In a frame: a window of its own is never as narrow as a phone."""
    html.write(find_comparisons([RESULTS / "layers-replaced"])[0], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{MEASURE}</body>"))
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    how = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,1000"]
    how += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom"]
    how += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run([CHROMIUM, *how], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    measured = json.loads(re.search(r"<title>(.*?)</title>", done.stdout).group(1))
    assert measured["dark"] is dark
    assert measured["paper"] == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")
    assert measured["wide"] <= width, "nothing sticks out"
    assert measured["fetched"] == 0
    assert len(measured["pictures"]) == page.count("<figure>")
    assert min(measured["pictures"]) > 300


STRANGE = ["<script>alert(1)</script>", "a$b$c", "=1+1", "_x", "\x1b[31mred\x07", "a|b", "[x](y)", "\u202eabc", "{{x}}"]


@pytest.mark.parametrize("name", STRANGE)
def test_strange_names_change_nothing(runs, tmp_path, monkeypatch, name):
    """In the terminal, on the page, in Markdown and in the picture."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, to, **how: (figures.append(self), save(self, to, **how)))
    result = runs("full", base=a_run(recipe=name))[0]
    found = [replace(result, settings={**result.settings, "method": name}), result]
    html.write_folder(of_runs(found), tmp_path / "out")
    seen = one_line(name)
    assert seen.isprintable()
    assert seen in printed(found, 100)
    page, markdown = ((tmp_path / "out" / file).read_text() for file in ("report.html", "report.md"))
    assert seen in whole(page).words
    assert seen in re.sub(r"\\(\W)", r"\1", markdown)
    assert "<script>" not in page
    for text in (page, markdown, printed(found, 80)):
        assert all(c.isprintable() or c == "\n" for c in text)
    assert len(figures) > 3
    for figure in figures:
        legend = figure.legends[0].get_texts()
        assert [(text.get_text(), text.get_parse_math()) for text in legend] == [(seen, False), ("full", False)]
    table = (tmp_path / "out" / "figures" / "loss-steps.csv").read_text()
    assert f"\n'{seen}," in table if name.startswith("=") else seen in table


def test_curves_have_one_colour_a_method_and_a_legend(runs, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: figures.append(self))
    draw_curves(of_runs(runs("full", "lora", seeds=(1, 2)))[0], tmp_path / "curves.png")
    training, validation = figures[0].axes
    for axes in (training, validation):
        assert len({line.get_color() for line in axes.lines}) == 2
        assert len(axes.collections) == 2, "the seeds of each as a band"
        assert axes.get_xlabel() == "optimizer step"
        assert axes.get_ylabel() == "loss (nats per byte)"
    assert list(validation.lines[0].get_xdata()) == [10, 20, 30, 40]
    assert list(validation.lines[0].get_ydata()) == pytest.approx([2.015 + 2 / step for step in (10, 20, 30, 40)])
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["full", "lora"]


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_without_a_library_the_remedy_is_named(runs, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=re.escape(f"needs {library}: pip install 'lowrank-training[report]'")):
        html.write_folder(of_runs(runs("full")), tmp_path / "out")
