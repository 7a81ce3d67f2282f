"""Experiments executed: a small one end to end, and one that is stopped wherever it can be."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
from tests.runs.tiny import TEXT, tiny

from lowrank.infra.log import Log
from lowrank.report.comparison import of_results, printed
from lowrank.report.results import FILE, read_results
from lowrank.report.results_table import findings
from lowrank.run.experiment import Contender, Experiment
from lowrank.train import experiments
from lowrank.train.changed_data import ChangedDataError

GOLDEN = {"full": 4.196, "frozen": 4.539}
TIMES = ("seconds", "step_seconds", "environment")


def experiment(*methods, **changes):
    space = {"lr": (1e-3, 1e-2, 1e-1)}
    contenders = [Contender(name=m, run=tiny(m, eval_every=4, eval_batches=2), space=space) for m in methods]
    about = {"name": "tiny", "question": "Which?", "caveat": "None.", "baseline": methods[0]}
    about |= {"trials": 3, "shrink": 3, "test_batches": 2}
    return Experiment(**{**about, "contenders": contenders, **changes})


def timeless(value):
    if isinstance(value, dict):
        return {name: timeless(each) for name, each in value.items() if name not in TIMES}
    return [timeless(each) for each in value] if isinstance(value, list) else value


@pytest.fixture
def pretended(monkeypatch):
    """Training and scoring that only write what they would; either may be stopped or fail."""
    stops, failing = [], set()

    def stopped():
        if stops and stops[0] == 0:
            stops.pop(0)
            raise KeyboardInterrupt
        if stops:
            stops[0] -= 1

    def train(run, out, **how):
        stopped()
        assert how["judge"] is False, "no trial may read the test split"
        if run.method.name in failing:
            raise FloatingPointError("the loss became nan")
        out.mkdir(parents=True, exist_ok=True)
        run.write(out / "run.json")
        value = {"full": 2.0, "lora": 2.1}.get(run.method.name, 1.9) + 0.01 * run.seed % 1 + abs(run.lr - 0.01)
        with Log(out / "log.jsonl", after=0) as log:
            for step in range(1, run.steps + 1):
                log.write({"step": step, "loss": value + 1 / step, "val_loss": value + 1 / step})
        stopped()
        summary = {"steps": run.steps, "interrupted": False, "val_loss": value, "parameters_trained": 10}
        (out / "summary.json").write_text(json.dumps(summary))
        return summary

    def score(place, **how):
        stopped()
        return {"loss": read_summary(place)["val_loss"] + 0.5}

    def read_summary(place):
        with open(f"{place}/summary.json") as file:
            return json.load(file)

    monkeypatch.setattr(experiments, "train", train)
    monkeypatch.setattr(experiments, "score", score)
    monkeypatch.setattr(experiments, "_forecast", lambda *what: "")
    return stops, failing


def run(made, out, **how):
    return experiments.run_experiment(made, out, command="lowrank compare tiny", say=lambda text: None, **how)


def test_stopped_anywhere_and_continued_is_never_stopped(pretended, tmp_path):
    stops, _ = pretended
    made = experiment("full", "lora", "galore")
    expected = run(made, tmp_path / "whole")
    generator = random.Random(0)
    for number in range(4):
        stops[:] = [generator.randrange(0, 12) for _ in range(4)]
        out = tmp_path / f"stopped {number}"
        while True:
            try:
                found = run(made, out)
                break
            except KeyboardInterrupt:
                assert not (out / FILE).exists()
        assert not stops or stops[0] > 0
        assert timeless(json.loads((out / FILE).read_text())) == timeless(
            json.loads((tmp_path / "whole" / FILE).read_text())
        )
        assert found.figures() == expected.figures()


def test_more_seeds_and_methods_make_what_is_missing(pretended, tmp_path, monkeypatch):
    run(experiment("full", "lora"), tmp_path)
    before = set((tmp_path / "runs").iterdir())
    run(experiment("full", "lora", seeds=(1, 2, 3, 4)), tmp_path)
    assert len(set((tmp_path / "runs").iterdir()) - before) == 2


def test_a_method_that_fails_is_a_row_with_its_reason(pretended, tmp_path):
    _, failing = pretended
    failing.add("lora")
    found = run(experiment("full", "lora", "galore"), tmp_path)
    assert {row.error for row in found.at() if row.method == "lora"} == {
        "every trial failed: FloatingPointError: the loss became nan"
    }
    assert [each.verdict for each in found.differences()] == ["no test", "better"]
    assert findings(found)[-1].startswith("lora failed: every trial failed: FloatingPointError")
    assert "lora" in printed([of_results(found)], 100)
    assert read_results(tmp_path / FILE).figures() == found.figures()


def test_runs_on_changed_data_stand_in_no_table(pretended, tmp_path):
    run(experiment("full", "lora"), tmp_path)
    for number, file in enumerate(sorted(tmp_path.glob("runs/*/run.json"))):
        content = json.loads(file.read_text())
        content["data"]["fingerprint"] = "after" if number else "before"
        file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the content of .*text.txt has changed between .*--out NEW"):
        run(experiment("full", "lora", seeds=(1, 2, 3, 4)), tmp_path)


def test_a_new_run_on_changed_data_is_refused_before_it_trains(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT.read_bytes())

    def made(*seeds):
        contenders = [Contender(name=m, run=tiny(m, data=str(text), steps=2, eval_every=2)) for m in ("full", "frozen")]
        about = {"name": "tiny", "question": "Which?", "caveat": "None.", "baseline": "full", "trials": 1, "shrink": 2}
        return Experiment(**about, contenders=contenders, test_batches=1, seeds=seeds)

    assert not any(row.error for row in run(made(1), tmp_path / "a").rows)
    text.write_bytes(TEXT.read_bytes() + b"More of it.")
    with pytest.raises(ChangedDataError, match=r"text.txt has changed .*give --out NEW, or put the data back"):
        run(made(1, 2), tmp_path / "a")
    assert len(list(tmp_path.glob("a/runs/*/summary.json"))) == 2
    text.write_bytes(TEXT.read_bytes())
    assert len(run(made(1, 2), tmp_path / "a").rows) == 4


def test_a_process_that_is_killed_is_words(pretended, tmp_path, monkeypatch):
    class Killed(ThreadPoolExecutor):
        def __init__(self, jobs, mp_context):
            super().__init__(jobs)

        def map(self, *calls):
            raise BrokenProcessPool

    monkeypatch.setattr(experiments, "ProcessPoolExecutor", Killed)
    with pytest.raises(ChildProcessError, match=r"killed from outside, .* the same command with fewer --jobs goes on"):
        experiments.run_experiment(experiment("full", "lora"), tmp_path, command="lowrank compare tiny", jobs=2)


def test_other_lengths_are_refused_before_anything_runs(pretended, tmp_path):
    made = experiment("full", "lora")
    short = replace(made.contenders[1], run=replace(made.contenders[1].run, steps=4))
    with pytest.raises(ValueError, match="what cannot be compared:\nlora: other steps=4"):
        run(replace(made, contenders=[made.contenders[0], short]), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_equal_memory_gives_what_is_saved_to_the_batch(pretended, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "_bytes", lambda run: run.batch_size * (1.0 if run.method.name == "full" else 0.5))
    found = run(experiment("full", "galore", equal="memory"), tmp_path)
    assert {row.method: row.budget["batch_size"] for row in found.rows} == {"full": 4, "galore": 8}
    monkeypatch.setattr(experiments, "_seconds", lambda run: 1.0 if run.method.name == "full" else 2.0)
    found = run(experiment("full", "galore", equal="seconds"), tmp_path)
    assert {row.method: row.steps for row in found.rows} == {"full": 8, "galore": 4}
    assert {row.method for row in found.at()} == {"full", "galore"}


def test_a_small_experiment_end_to_end(tmp_path):
    """Real training: the reported figures are the test split's, the same again, and one command is told."""
    found = run(experiment("full", "frozen"), tmp_path)
    assert {(row.method, row.seed) for row in found.rows} == {(m, s) for m in ("full", "frozen") for s in (1, 2, 3)}
    assert [len([t for t in found.trials if t.method == m and t.rung == 0]) for m in ("full", "frozen")] == [3, 3]
    for row in found.rows:
        assert row.figures["test_loss"] != row.figures["val_loss"]
        assert row.peak_bytes > row.state_bytes > 0
        assert row.curve["val"][-1] == (8, pytest.approx(row.figures["val_loss"], abs=1e-5))
    assert found.mean("full") == pytest.approx(GOLDEN["full"], abs=0.02)
    assert found.mean("frozen") == pytest.approx(GOLDEN["frozen"], abs=0.02)
    for row in (row for row in found.rows if row.method == "full"):  # a baseline is compared with its own end
        at_last = row.curve["val"][-1][1]
        assert row.steps_to_baseline == next(step for step, value in row.curve["val"] if value <= at_last)
    assert "with 3 seeds" in findings(found)[0] or "frozen is worse than full" in findings(found)[0]
