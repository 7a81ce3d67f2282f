"""The file of an experiment's results: written, read again, refused where it is something else."""

import json
import re
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lowrank.cli import main
from lowrank.report import pictures
from lowrank.report.comparison import find_comparisons
from lowrank.report.results import FILE, Results, Row, Trial, find_experiments, read_results
from lowrank.report.results_table import findings


def made(**changes):
    """Three methods, two horizons, three seeds; one run has failed."""
    rows = [
        Row(method=m, seed=s, steps=steps, figures={"test_loss": 2.0 - 0.1 * i + 0.01 * s + 1 / steps})
        for i, m in enumerate(("full", "muon"))
        for steps in (10, 20)
        for s in (1, 2, 3)
    ]
    rows += [Row(method="lora", seed=s, steps=20, error="ValueError: it went wrong") for s in (1, 2, 3)]
    about = {"experiment": "arena", "size": "small", "preset": "as-meant", "question": "Which?", "caveat": "Tiny."}
    about |= {"command": "lowrank compare arena", "baseline": "full", "metric": "test_loss", "lower": True}
    about |= {"unit": "nats a byte", "equal": "tokens", "seeds": [1, 2, 3], "tuning_seeds": [1001]}
    about |= {"environment": {}, "settings": {"batch_size": 8}, "seconds": 1.5, "space": {"full": {"lr": [1, 2]}}}
    trials = [Trial(method="full", rung=0, steps=5, seed=1001, settings={"lr": 1}, value=2.5)]
    return Results(**{**about, "trials": trials, "rows": rows, **changes})


def test_written_and_read_again(tmp_path):
    written = made().write(tmp_path / "results" / "arena" / "here_2026")
    assert read_results(written) == made()
    assert find_experiments([tmp_path]) == find_experiments([written]) == {written: made()}
    assert find_experiments([tmp_path / "results" / "other"]) == {}


def test_the_main_figures_are_those_of_the_longest_horizon():
    found = made()
    assert found.horizons == [10, 20]
    assert found.figures()["muon"] == {s: pytest.approx(1.95 + 0.01 * s) for s in (1, 2, 3)}
    assert found.mean("full", horizon=0) == pytest.approx(2.12)
    assert found.mean("lora") is None
    assert {each.method: each.verdict for each in found.differences()} == {"muon": "better", "lora": "no test"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is damaged, or no JSON"),
        ("[]", "holds no results of an experiment"),
        ('{"schema": 9}', "holds no results of an experiment"),
        ('{"schema": 1, "rows": []}', "holds no results of an experiment: 'trials'"),
        ('{"schema": 1, "rows": [3], "trials": []}', "holds no results of an experiment"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, content, says):
    file = tmp_path / FILE
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file} {says}"):
        read_results(file)


def test_a_baseline_without_a_row_is_refused(tmp_path):
    file = made().write(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"baseline": "sgd"}))
    with pytest.raises(ValueError, match="its baseline 'sgd' is none of its methods, full, muon, lora"):
        read_results(file)


COMMITTED = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("place", [None, "vit-ranks", "tissue"])
def test_the_page_of_an_experiment(tmp_path, capsys, place):
    """Question and answer first; a method that failed with its reason; nothing fetched; names as text."""
    folder = COMMITTED / place if place else tmp_path / "results"
    if place is None:
        made(question="<b>Which?</b>").write(folder)
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    (found,) = find_experiments([folder]).values()
    heading, answer = (
        page.index(escape(found.question)),
        page.index(escape(findings(found)[0]).replace("&#x27;", "&#39;")),
    )
    assert heading < answer < page.index("<table")
    assert "<b>Which" not in page
    assert not re.search(r"(src|href)=.(?!data:|#)|url\((?!#)|@import", page)
    assert len(page) < 5e6
    assert "prefers-color-scheme: dark" in page
    assert escape(found.command) in page
    if place is None:
        assert "ValueError: it went wrong" in page
    curves = any(row.curve.get("val") for row in found.rows)  # a run that is never evaluated on the way has none
    assert ("against steps" in page) == curves == (place == "vit-ranks")


def test_results_are_not_written_beside(tmp_path, monkeypatch):
    """Committed ones stay as they are; a report of runs is written into their folder."""
    monkeypatch.chdir(tmp_path)
    made().write(tmp_path / "results")
    assert main(["report", "results"]) == 0
    assert [file.name for file in (tmp_path / "results").iterdir()] == [FILE]
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_page_is_watched_until_it_is_stopped(tmp_path, monkeypatch):
    made().write(tmp_path / "results")
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt
        made(question="And now?").write(tmp_path / "results")

    monkeypatch.setattr("time.sleep", sleep)
    assert main(["report", str(tmp_path / "results"), "--out", str(tmp_path / "page.html"), "--watch"]) == 130
    page = (tmp_path / "page.html").read_text()
    assert "And now?" in page
    assert 'http-equiv="refresh"' in page


def test_committed_trials_are_drawn_within_what_did_not_diverge_and_bars_of_many_methods_are_told_apart():
    (found,), _ = find_comparisons([Path(__file__).parents[2] / "results" / "heads-ranks-merge"])
    looks = pictures.looks_of(found.entries)
    rates = [*found.rates, replace(found.rates[0], value=17.0)]
    axes = Figure().subplots()
    pictures._rates(replace(found, rates=rates), looks)[0](axes)
    low, high = axes.get_ylim()
    best = {label: min(rate.value for rate in found.rates if rate.label == label) for label in looks}
    assert all(low < value < high for value in best.values())
    assert max(rate.value for rate in found.rates) < high < 4, "what diverged presses nothing together"
    assert min(best.values()) - low < 0.06 * (high - low)
    axes = Figure().subplots()
    pictures._bars(found.entries, ["mlp"], "change", "", looks)[0](axes)
    seen = {(bar.get_facecolor(), bar.get_hatch()) for bar in axes.patches}
    assert len(seen) == len(axes.patches) == len(found.entries) > len(pictures.COLOURS)
