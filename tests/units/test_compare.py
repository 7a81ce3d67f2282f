"""Comparisons: what is planned, what is executed, what is left alone."""

import json
import re
from functools import partial

import pytest
from tests.runs.tiny import TEXT, tiny
from tests.units.fakes import OFFER, FakeTrain, a_run

from lowrank.cli import main
from lowrank.report.variants import Planned, Variant, execute, parse_variant, planned
from lowrank.run.run import Call
from lowrank.train.loop import train


def variants(*texts):
    return [parse_variant(text, OFFER) for text in texts]


def plan(*texts, **options):
    return planned(a_run(), variants(*texts), offer=OFFER, **options)


def quiet(text):
    pass


def test_variants_are_read_and_written_alike():
    one = parse_variant("lora:rank=16:lr=3e-3:model.n-layer=3", OFFER)
    assert one == Variant(method="lora", settings={"method.rank": "16", "lr": "3e-3", "model.n_layer": "3"})
    assert str(one) == "lora:rank=16:lr=3e-3:model.n_layer=3"
    assert parse_variant("lora", OFFER) == Variant(method="lora")
    assert parse_variant("lora:target_modules=first:4", OFFER).settings == {"method.target_modules": "first:4"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lora:16", "a colon is followed by name=value, as in lora:rank=16:lr=3e-3"),
        ("lora:rnk=16", r"method lora has no 'rnk' \(did you mean 'rank'\?\)"),
        ("lroa", r"there is no method 'lroa' \(did you mean 'lora'\?\)"),
        ("lte:merge_every=99", "longer than the run"),
    ],
)
def test_unsound_variants_are_refused_before_any_run(text, says):
    with pytest.raises(ValueError, match=says):
        plan("full", text)


def test_every_variant_is_planned_under_every_seed_and_rate():
    runs = plan("full", "lora:rank=2", seeds=(1, 2), rates=(1e-3, 1e-2))
    assert [(each.run.method.name, each.run.lr, each.run.seed) for each in runs] == [
        (method, rate, seed) for seed in (1, 2) for method in ("full", "lora") for rate in (1e-3, 1e-2)
    ]
    assert [each.name for each in runs[:3]] == [
        "full:lr=0.001 seed 1",
        "full:lr=0.01 seed 1",
        "lora:rank=2:lr=0.001 seed 1",
    ]
    assert runs[2].run.method.args["rank"] == 2


def test_a_comparison_of_nothing_is_refused():
    with pytest.raises(ValueError, match="--methods names no method; give some, as in --methods full,"):
        plan()


def test_without_seeds_and_rates_the_recipe_s_hold():
    assert [(each.run.lr, each.run.seed) for each in plan("full", "lora")] == [(1e-3, 0), (3e-3, 0)]


def test_shared_settings_reach_the_methods_that_have_them():
    runs = plan("full", "lora", "lte", changes={"steps": "20", "method.rank": "2"})
    assert [each.run.steps for each in runs] == [20, 20, 20]
    assert [each.run.method.args.get("rank") for each in runs] == [None, 2, 2]
    assert plan("lora:rank=5", changes={"method.rank": "2"})[0].run.method.args["rank"] == 5
    with pytest.raises(ValueError, match=r"--method\.heads: none of full, lora has an argument 'heads'"):
        plan("full", "lora", changes={"method.heads": "2"})


def test_only_what_is_missing_is_executed(tmp_path):
    train = FakeTrain()
    first = execute(plan("full", "lora", seeds=(1,)), tmp_path, train, say=quiet, offer=OFFER)
    assert [each.executed for each in first] == [True, True]
    again = execute(plan("lora", "full", "lte", seeds=(1, 2)), tmp_path, train, say=quiet, offer=OFFER)
    assert [each.executed for each in again] == [False, False, True, True, True, True]
    assert again[0].folder == first[1].folder
    assert len(train.calls) == len({folder for _, folder, _ in train.calls}) == 6


def test_runs_are_known_by_what_they_are_and_not_by_their_folder(tmp_path):
    train = FakeTrain()
    execute(plan("full"), tmp_path, train, say=quiet, offer=OFFER)
    (tmp_path / "full_seed_0").rename(tmp_path / "other")
    assert not execute(plan("full"), tmp_path, train, say=quiet, offer=OFFER)[0].executed
    changed = planned(a_run(steps=30), variants("full"), offer=OFFER)
    assert execute(changed, tmp_path, train, say=quiet, offer=OFFER)[0].executed
    more = planned(
        a_run(log_every=5, data=Call(name="text", args={"tokenizer": "bytes"})), variants("full"), offer=OFFER
    )
    assert not execute(more, tmp_path, train, say=quiet, offer=OFFER)[0].executed


def test_the_same_run_asked_for_twice_is_executed_once(tmp_path):
    train = FakeTrain()
    execute(plan("lora", "lora:rank=16"), tmp_path, train, say=quiet, offer=OFFER)
    assert len(train.calls) == 1


def test_a_run_that_fails_does_not_stop_the_others_and_is_tried_again(tmp_path):
    said = []
    outcomes = execute(plan("full", "lora", "lte"), tmp_path, FakeTrain(failing="lora"), say=said.append, offer=OFFER)
    assert [each.error for each in outcomes] == [None, "RuntimeError: it went wrong", None]
    assert any("it went wrong" in line for line in said)
    train = FakeTrain()
    again = execute(plan("full", "lora", "lte"), tmp_path, train, say=quiet, offer=OFFER)
    assert [each.executed for each in again] == [False, True, False]
    assert train.calls[0][1] != outcomes[1].folder, "the failed run's folder is kept for looking at"


@pytest.mark.parametrize("summary", [None, '{"steps": 4', '{"steps": 20}'])
def test_a_run_with_a_checkpoint_and_no_sound_summary_of_its_end_is_resumed(tmp_path, summary):
    """Killed between its last checkpoint and its summary, or while that was written, or continued with more steps."""
    execute(plan("full"), tmp_path, FakeTrain(), say=quiet, offer=OFFER)
    folder, said = tmp_path / "full_seed_0", []
    (folder / "summary.json").unlink()
    if summary is not None:
        (folder / "summary.json").write_text(summary)
    (folder / "checkpoints" / "step-00000040").mkdir(parents=True)
    train = FakeTrain()
    execute(plan("full"), tmp_path, train, say=said.append, offer=OFFER)
    assert [(path, resume) for _, path, resume in train.calls] == [(folder, True)]
    assert any(f"{folder / 'summary.json'} is damaged" in line for line in said) == (summary == '{"steps": 4')
    assert not execute(plan("full"), tmp_path, train, say=quiet, offer=OFFER)[0].executed


def test_a_run_killed_between_its_last_checkpoint_and_its_summary_is_finished(tmp_path):
    runs = [Planned(name="lora", run=tiny("lora"))]
    (first,) = execute(runs, tmp_path, partial(train, quiet=True), say=quiet)
    before = json.loads((first.folder / "summary.json").read_text())
    (first.folder / "summary.json").unlink()
    (again,) = execute(runs, tmp_path, partial(train, quiet=True), say=quiet)
    assert (again.folder, again.executed, again.error) == (first.folder, True, None)
    after = json.loads((first.folder / "summary.json").read_text())
    assert [after[name] for name in ("steps", "val_loss")] == [before[name] for name in ("steps", "val_loss")]
    assert not execute(runs, tmp_path, train, say=quiet)[0].executed


def test_stopping_a_run_stops_the_comparison(tmp_path):
    train = FakeTrain(interrupting="lora")
    with pytest.raises(KeyboardInterrupt):
        execute(plan("full", "lora", "lte"), tmp_path, train, say=quiet, offer=OFFER)
    assert [run.method.name for run, _, _ in train.calls] == ["full", "lora"]
    assert json.loads((tmp_path / "lora_seed_0" / "summary.json").read_text())["interrupted"]
    again = execute(plan("full", "lora"), tmp_path, FakeTrain(), say=quiet, offer=OFFER)
    assert [each.executed for each in again] == [False, True], "what was stopped is not taken for finished"


def test_folders_that_hold_no_run_are_passed_over(tmp_path):
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "run.json").write_text("{}")
    assert execute(plan("full"), tmp_path, FakeTrain(), say=quiet, offer=OFFER)[0].executed


def test_runs_on_changed_data_join_finished_ones_only_where_it_is_meant(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_bytes(TEXT.read_bytes())
    size = "--data.context 16 --model.n_layer 1 --model.n_head 2 --model.n_embd 32 --batch-size 4 --device cpu"
    size += f" --steps 2 --eval-batches 1 --quiet --data {text} --out {out}"
    words = ["compare", "gpt-mini", *size.split()]
    assert main([*words, "--methods", "full"]) == 0
    text.write_bytes(TEXT.read_bytes() + b"More of it.")
    capsys.readouterr()
    assert main([*words, "--methods", "full,frozen"]) == 1
    told = capsys.readouterr()
    assert re.search(r"failed: frozen.*text.txt has changed .* give --out NEW, or put the data back", told.err)
    assert [path.parent.name for path in out.glob("*/summary.json")] == ["full_seed_0"]
    assert main([*words, "--methods", "full,frozen", "--allow-changed-data"]) == 0
    assert "the data has changed between these runs, which stand apart" in capsys.readouterr().out
