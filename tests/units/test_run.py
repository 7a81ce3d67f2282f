"""Runs as data: JSON and back, options against signatures, fingerprints, and what is refused."""

import copy
import dataclasses
import doctest
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from tests.units.fakes import OFFER, a_run, lora

from lowrank.infra import convert as convert_module
from lowrank.infra.convert import convert, describe
from lowrank.infra.signatures import signature_of
from lowrank.recipes import RECIPES, find
from lowrank.run import overrides as settings
from lowrank.run import run
from lowrank.run import validation as checks
from lowrank.run.overrides import catalogue, fingerprint, override, resolve
from lowrank.run.run import Call, Run
from lowrank.run.validation import refuse_changed, refuse_occupied, validate


def changed(options, **fields):
    return override(a_run(**fields), options, OFFER)


def test_examples_in_the_docstrings():
    assert sum(doctest.testmod(module).failed for module in (run, settings, checks, convert_module)) == 0


# --- data ------------------------------------------------------------------------------------------------------------


def test_json_and_back():
    one = changed({"method": "lora", "method.target_modules": "q,k", "max_grad_norm": "none", "warmup": "10"})
    assert Run.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert list(one.to_json()) == [field.name for field in dataclasses.fields(Run)]


def test_files_and_back(tmp_path):
    a_run().write(tmp_path / "run.json")
    assert Run.read(tmp_path / "run.json") == a_run()


def test_runs_are_hashable_and_survive_pickle_and_copy():
    assert hash(a_run()) == hash(a_run())
    assert len({a_run(), a_run(), a_run(seed=1)}) == 2
    assert pickle.loads(pickle.dumps(a_run())) == copy.deepcopy(a_run()) == a_run()


def test_runs_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_run().steps = 3
    with pytest.raises(TypeError):
        a_run().method.args["rank"] = 3
    with pytest.raises(TypeError):
        a_run().per_method["lora"] = {}


def test_calls_hold_plain_data_only():
    assert Call(name="lora", args={"parts": ["q", "v"]}).args["parts"] == ("q", "v")
    with pytest.raises(TypeError, match="lora: rule is <object"):
        Call(name="lora", args={"rule": object()})
    with pytest.raises(TypeError, match="lora: alpha is inf"):
        Call(name="lora", args={"alpha": float("inf")})


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda content: content | {"stepz": 3}, r"a run has no 'stepz' \(did you mean 'steps'\?\)"),
        (
            lambda content: content | {"model": {"name": "gpt", "arg": {}}},
            r"a call has no 'arg' \(did you mean 'args'\?\)",
        ),
        (lambda content: {name: content[name] for name in content if name != "data"}, "a run needs data"),
        (lambda content: content | {"steps": "many"}, "steps many: expected a whole number or none"),
        (lambda content: content | {"schedule": "step"}, "expected one of cosine, linear, constant"),
        (lambda content: content | {"method": "lora"}, "a call is written as an object, got 'lora'"),
        (lambda content: content | {"method": {"name": 3}}, "a call has a name, which is text, got 3"),
        (lambda content: content | {"method": {"name": "full", "args": 3}}, "args is written as an object, got 3"),
        (lambda content: content | {"method": {"name": "full", "args": {"a": {}}}}, "full: a is {}; a run holds text"),
        (lambda content: content | {"per_method": []}, r"per_method is written as an object, got \[\]"),
        (lambda content: content | {"per_method": {"lora": 3}}, "lora is written as an object, got 3"),
        (lambda content: [content], "a run is written as an object"),
    ],
)
def test_unsound_json_is_refused_with_the_file(tmp_path, harm, says):
    (tmp_path / "run.json").write_text(json.dumps(harm(a_run().to_json())))
    with pytest.raises(ValueError, match=rf"run\.json: .*{says}"):
        Run.read(tmp_path / "run.json")


def test_no_json_at_all(tmp_path):
    (tmp_path / "run.json").write_text("steps: 3")
    with pytest.raises(ValueError, match=r"run\.json is damaged, or no JSON: "):
        Run.read(tmp_path / "run.json")
    with pytest.raises(FileNotFoundError, match="there is no run at"):
        Run.read(tmp_path / "missing.json")


def test_lengths():
    assert a_run(steps=100, warmup=0.05).warmup_steps(100) == 5
    assert a_run(warmup=7).warmup_steps(100) == 7
    assert a_run(steps=100).horizon(3) == 100
    assert a_run(steps=None, epochs=2.5, grad_accum=2).horizon(10) == 13


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("4", int, 4),
        ("5e4", int, 50_000),
        ("10_000", int, 10_000),
        ("9007199254740993", int, 9007199254740993),
        ("4", float, 4.0),
        ("1e-3", float, 1e-3),
        ("true", bool, True),
        ("off", bool, False),
        ("none", int | None, None),
        ("4", int | str, 4),
        ("q", int | str, "q"),
        ("1.5", int | float, 1.5),
        ("none", str, "none"),
        ("runs/a", Path | None, "runs/a"),
        ("q,v", str | Sequence[str], ("q", "v")),
        ("q", str | Sequence[str], "q"),
        ("q", list[str], ("q",)),
        ("1, 2", tuple[int, ...], (1, 2)),
        ("[1, 2]", list[int] | None, (1, 2)),
        ("auto", int | Literal["auto"], "auto"),
        ("7", int | Literal["auto"], 7),
        (3, float, 3.0),
        (["q", "v"], list[str], ("q", "v")),
        (None, float | None, None),
        (4.0, int, 4),
    ],
)
def test_conversion(text, annotation, value):
    found = convert(text, annotation, "--x")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation", "says"),
    [
        ("four", int, "--x four: expected a whole number"),
        ("1.5", int, "a whole number"),
        ("nan", float, "a number"),
        ("inf", float | None, "a number or none"),
        ("maybe", bool, "true or false"),
        (True, int, "a whole number"),
        ("none", int, "a whole number"),
        ("1,x", list[int], r"a list \(of a whole number, separated by commas\)"),
        ("cosin", Literal["cosine", "linear"], r"one of cosine, linear \(did you mean 'cosine'\?\)"),
        ("x", object, "something that cannot be written as text: set it in Python"),
    ],
)
def test_conversion_refuses(text, annotation, says):
    with pytest.raises(ValueError, match=says):
        convert(text, annotation, "--x")


def test_only_data_can_be_set():
    assert list(signature_of(lora).kinds) == ["target_modules", "rank", "alpha"]
    assert describe(bool | None) == "true or false or none"


# --- overrides -------------------------------------------------------------------------------------------------------


def test_options_reach_their_places():
    one = changed({"steps": "200", "batch-size": "8", "method": "lte", "method.keep": "false", "data": "a.csv"})
    assert (one.steps, one.batch_size) == (200, 8)
    assert one.method == Call(name="lte", args={"keep": False})
    assert one.data == Call(name="text", args={"tokenizer": "bytes", "source": "a.csv"})
    assert changed({"data.tokenizer": "bpe:4096"}).data.args["tokenizer"] == "bpe:4096"
    assert changed({"model.n-layer": 6}).model.args == {"n_layer": 6}


def test_a_method_starts_from_its_defaults_and_the_recipe_s_hints_under_the_options():
    assert changed({"method": "lora"}).lr == 3e-3
    assert changed({"method": "lora"}).method.args == {"rank": 16}
    assert changed({"method.rank": 2, "method": "lora", "lr": 0.5}).method.args == {"rank": 2}
    assert changed({"method.rank": 2, "method": "lora", "lr": 0.5}).lr == 0.5
    back = override(changed({"method": "lora"}), {"method": "lte"}, OFFER)
    assert (back.lr, dict(back.method.args)) == (1e-3, {})


def test_the_method_that_is_there_already_keeps_its_settings():
    once = changed({"method": "lora", "method.rank": 3, "lr": 0.5})
    assert override(once, {"method": "lora", "steps": 5}, OFFER) == dataclasses.replace(once, steps=5)


def test_another_model_starts_from_its_defaults():
    offer = dataclasses.replace(OFFER, model={**OFFER.model, "other": OFFER.model["gpt"]})
    assert override(a_run(), {"model": "other"}, offer).model == Call(name="other")


def test_epochs_take_the_place_of_steps_and_back():
    assert (changed({"epochs": "2"}).steps, changed({"epochs": "2"}).epochs) == (None, 2.0)
    back = override(changed({"epochs": "2"}), {"steps": "7"}, OFFER)
    assert (back.steps, back.epochs) == (7, None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stepz": "3"}, r"there is no option --stepz \(did you mean '--steps'\?\)"),
        ({"method": "lroa"}, r"there is no method 'lroa' \(did you mean 'lora'\?\); there are full, lora, lte"),
        ({"method": "lora", "method.rnak": "3"}, r"--method.rnak: method lora has no 'rnak' \(did you mean 'rank'\?\)"),
        ({"method": "lora", "method.rule": "3"}, "method lora has no 'rule'"),
        ({"method.rank": "3"}, "method full has no 'rank'.*; it takes rest"),
        ({"method": "lora", "method.rank": "four"}, "--method.rank four: expected a whole number"),
        ({"model.data": "x"}, "model gpt has no 'data'"),
        ({"lr": "fast"}, "--lr fast: expected a number"),
        ({"steps": "3", "epochs": "1"}, "--steps and --epochs both"),
        ({"recipe": "x"}, "there is no option --recipe"),
    ],
)
def test_unknown_options_and_values_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        changed(options)


def test_resolving_writes_every_default_out():
    one = resolve(changed({"method": "lora"}), OFFER)
    assert list(one.method.args.items()) == [("target_modules", ("q", "v")), ("rank", 16), ("alpha", None)]
    assert resolve(one, OFFER) == one
    with pytest.raises(ValueError, match="method lora has no 'rnk'"):
        resolve(a_run(method=Call(name="lora", args={"rnk": 3})), OFFER)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprints_see_what_determines_the_numbers_and_nothing_else():
    base = fingerprint(a_run(), OFFER)
    for same in (
        {"log_every": 5},
        {"keep": 7},
        {"checkpoint_every": 3},
        {"recipe": "x"},
        {"wandb": True},
        {"per_method": {}},
        {"method": Call(name="full", args={"rest": "train"})},
    ):
        assert fingerprint(a_run(**same), OFFER) == base
    for other in ({"seed": 1}, {"lr": 2e-3}, {"steps": 41}, {"stop_at": 20}, {"precision": "bf16"}, {"eval_every": 5}):
        assert fingerprint(a_run(**other), OFFER) != base
    assert fingerprint(changed({"method": "lte"}), OFFER) != base


def test_a_default_left_out_or_written_is_one_run():
    left, written = a_run(), a_run(data=Call(name="text", args={"context": 128, "tokenizer": "bytes"}))
    assert fingerprint(left, OFFER) == fingerprint(written, OFFER)


@pytest.mark.parametrize(
    "pair",
    [
        ({"method.alpha": 16}, {"method.alpha": 16.0}),
        ({"method.alpha": "16"}, {"method.alpha": "1.6e1"}),
        ({"method.rank": 8}, {"method.rank": 8.0}),
        ({"lr": 1}, {"lr": "1.0"}),
        ({"method.target_modules": "q,v"}, {"method.target_modules": ["q", "v"]}),
    ],
)
def test_one_number_written_in_two_ways_is_one_run(pair):
    base = override(find("gpt-mini"), {"method": "lora"})
    one, other = (fingerprint(override(base, options)) for options in pair)
    assert one == other
    assert fingerprint(override(base, {"method.alpha": 17})) != one


def test_a_run_json_with_numbers_of_another_kind_is_the_same_run():
    content = resolve(override(find("gpt-mini"), {"method": "lora"})).to_json()
    content["method"]["args"] |= {"alpha": 16, "rank": 8.0}
    del content["files"]
    other = Run.from_json(json.loads(json.dumps(content)))
    assert fingerprint(other) == fingerprint(override(find("gpt-mini"), {"method": "lora", "method.alpha": 16.0}))


# --- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": "none"}, "a run needs --steps or --epochs"),
        ({"stop_at": 41}, "--stop-at 41 must be at least 1 and at most --steps 40"),
        ({"warmup": 41}, "--warmup 41 is longer than the run, --steps 40"),
        ({"warmup": 1.5}, "neither a share"),
        ({"warmup": -1}, "--warmup -1"),
        ({"eval_every": 0}, "--eval-every 0"),
        ({"method": "lte", "method.heads": 17}, "use at most 16 heads or a batch of at least 17"),
        ({"method": "lte", "method.merge_every": 41}, "--method.merge_every 41 is longer than the run"),
        ({"method": "lora", "method.rank": 0}, "--method lora: rank=0 must be at least 1"),
        ({"model.context": 64}, "--data.context 128 is beyond the model's: add --model.context 128"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, says):
    """Single numbers out of their range are rows of the hostile table."""
    with pytest.raises(ValueError, match=says):
        validate(changed(options), OFFER)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epochs": 1},
        {"stop_at": 40},
        {"warmup": 40},
        {"method": "lte", "method.heads": 16, "method.merge_every": 40},
        {"per_layer": "true", "max_grad_norm": "none", "clip_per_layer": 1},
        {"model.context": 128},
    ],
)
def test_the_edges_are_allowed(options):
    validate(changed(options), OFFER)


def test_all_objections_come_at_once():
    with pytest.raises(ValueError, match=r"--steps 0.*\n--lr -1"):
        validate(changed({"steps": 0, "warmup": 0, "lr": -1}), OFFER)


def test_missing_packages_are_found_before_any_work(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--wandb needs the package wandb: pip install wandb"):
        validate(a_run(wandb=True), OFFER)


def test_resuming_may_change_lengths_and_logging_only():
    old = resolve(changed({"method": "lte"}), OFFER)
    allowed = {"steps": 80, "eval_every": 5, "keep": 9, "device": "cpu", "tensorboard": "true"}
    refuse_changed(old, override(old, allowed, OFFER))
    new = override(old, {"method.heads": 2, "lr": 0.5, "data": "x", "steps": 80}, OFFER)
    with pytest.raises(
        ValueError, match=r"--data.source \(builtin -> x\), --method.heads \(4 -> 2\), --lr \(0.001 -> 0.5\):"
    ):
        refuse_changed(old, new)
    with pytest.raises(ValueError, match=r"--method \(lte -> full\)"):
        refuse_changed(old, resolve(a_run(), OFFER))
    with pytest.raises(ValueError, match=r"--engine \(auto -> ddp or fsdp\)"):
        refuse_changed(old, override(old, {"engine": "ddp"}, OFFER))
    refuse_changed(override(old, {"engine": "fsdp"}, OFFER), override(old, {"engine": "ddp"}, OFFER))


def test_folders_with_a_run_are_refused(tmp_path):
    refuse_occupied(tmp_path)
    refuse_occupied(tmp_path / "missing")
    (tmp_path / "run.json").touch()
    with pytest.raises(FileExistsError, match="go on with it by --resume"):
        refuse_occupied(tmp_path)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_sound_under_every_method_they_speak_of(name):
    recipe = find(name)
    assert recipe.recipe == name
    offer = catalogue()
    spoken_of = {*recipe.per_method, recipe.method.name, "full"}
    for method in offer.method:
        if not spoken_of & {method, f"@{offer.facts('method', method)['family']}"}:
            continue
        run = resolve(override(recipe, {"method": method}))
        validate(run)
        assert Run.from_json(run.to_json()) == run


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_command_time_and_result(name):
    text = RECIPES[name].__doc__ or ""
    assert f"lowrank train {name}" in text
    assert "Time:" in text
    assert "Expected:" in text


def test_what_a_recipe_says_of_a_family_reaches_its_methods_where_they_have_it():
    base = find("gpt-mini")
    assert override(base, {"method": "rslora"}).method.args == {"rank": 8, "target_modules": "all-linear"}
    assert override(base, {"method": "fira"}).method.args == {"rank": 32, "refresh_every": 50}
    assert override(base, {"method": "apollo_mini"}).method.args["rank"] == 1, "its own name has the last word"
    new = dataclasses.replace(base, per_method={"@adapter": {"method.heads": 3, "method.rank": 5}})
    assert override(new, {"method": "dora"}).method.args == {"rank": 5}, "it has no heads"


def test_choosing_the_recipe_s_own_method_again_changes_nothing():
    for name in RECIPES:
        recipe = find(name)
        assert override(recipe, {"method": recipe.method.name}) == recipe


@pytest.mark.parametrize("kind", ["method", "model", "data"])
def test_signatures_read_from_the_source_are_those_of_the_functions(kind):
    offer = catalogue()
    for name, function in offer.of(kind).items():
        read, asked = offer.signature(kind, name), signature_of(function)
        assert read.doc == asked.doc
        assert read.defaults == asked.defaults
        assert {each: describe(of) for each, of in read.kinds.items()} == {
            each: describe(of) for each, of in asked.kinds.items()
        }
        assert asked.kinds, "it can be set from the command line"


def test_own_functions_and_files(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom lowrank.recipes.gpt import gpt_mini\n"
        "def mine(): return replace(gpt_mini(), recipe='mine')\ndef wrong(): return 3\n"
    )
    one = find(f"{tmp_path}/mine.py:mine")
    assert one.recipe == "mine"
    one.write(tmp_path / "run.json")
    assert find(str(tmp_path / "run.json")) == find(str(tmp_path)) == one
    with pytest.raises(ValueError, match=r"no function 'mien' \(did you mean 'mine'\?\)"):
        find(f"{tmp_path}/mine.py:mien")
    with pytest.raises(ValueError, match="returned int; a recipe returns"):
        find(f"{tmp_path}/mine.py:wrong")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*other\.py"):
        find(f"{tmp_path}/other.py:mine")
    with pytest.raises(FileNotFoundError, match="there is no run at"):
        find(f"{tmp_path}/other.json")
