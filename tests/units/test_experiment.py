"""Experiments as data: what is tuned by what, at which edge, and what may be compared."""

import math
from dataclasses import replace

import pytest
from tests.runs.tiny import tiny

from lowrank.recipes.experiments import EXPERIMENTS, find_experiment
from lowrank.run.experiment import Contender, Experiment, chosen, incomparable, refuse_spaces, reported, sample, tune
from lowrank.run.validation import validate

SPACE = {"lr": (1e-3, 1e-2, 1e-1), "weight_decay": (0.0, 0.1)}


def experiment(space=SPACE, **changes):
    contenders = [Contender(name=m, run=tiny(m, steps=16), space=space) for m in ("full", "lora")]
    about = {"name": "tiny", "question": "Which?", "caveat": "None.", "baseline": "full", "seeds": (1, 2, 3)}
    return Experiment(**{**about, "contenders": contenders, "trials": 6, "shrink": 3, **changes})


def tuned(made, value, **changes):
    """Tune the first contender with a function of settings for a run's value; the trials in order, and the end."""
    found, done = {}, []

    def known(each):
        return key(each) in found, found.get(key(each))

    while True:
        state = tune(made.contenders[0], made, known)
        if not state.missing:
            return done, state
        done += state.missing
        found |= {key(each): value(each) for each in state.missing}


def key(each):
    return each.rung, tuple(each.settings.items())


def bowl(best):
    return lambda each: abs(math.log10(each.settings["lr"]) - best) + each.settings.get("weight_decay", 0)


def test_halving_gives_every_point_a_short_run_and_the_best_a_long_one():
    made = experiment()
    trials, end = tuned(made, bowl(-2))
    assert [each.steps for each in trials] == [5] * 6 + [16] * 2
    assert len({tuple(each.settings.items()) for each in trials[:6]}) == 6
    assert end.best == {"lr": 1e-2, "weight_decay": 0.0}
    assert end.edge == []
    assert {each.run.seed for each in trials} == {made.tuning_seed}
    assert all(each.run.min_lr_ratio == 0 and each.run.eval_every == each.steps for each in trials)
    runs = reported(made.contenders[0], replace(made, horizons=(0.5, 1.0)), end.best)
    assert [(each.steps, each.run.seed) for each in runs] == [(s, seed) for s in (8, 16) for seed in (1, 2, 3)]


def test_an_optimum_beyond_the_edge_is_followed_twice_and_then_flagged():
    trials, end = tuned(experiment(), bowl(0))
    assert end.best["lr"] == 1.0, "found by one extension, the next being worse"
    assert end.edge == []
    trials, end = tuned(experiment(), bowl(9))
    assert [each.settings["lr"] for each in trials[-2:]] == [1.0, 10.0]
    assert end.edge == ["lr"]


def test_failed_trials_lose_and_a_method_without_any_other_has_none_that_won():
    _, end = tuned(experiment(), lambda each: None if each.settings["lr"] > 5e-3 else 2.0)
    assert end.best["lr"] == 1e-3
    trials, end = tuned(experiment(), lambda each: None)
    assert end.best is None
    assert len(trials) == 6, "nothing goes on to all steps"
    _, end = tuned(experiment(), lambda each: math.nan if each.settings["lr"] == 1e-2 else each.settings["lr"])
    assert end.best["lr"] != 1e-2


def test_one_point_is_not_tuned():
    for space in ({}, {"lr": (3e-3,)}):
        trials, end = tuned(experiment(space), bowl(0))
        assert trials == []
        assert end.best == {name: values[0] for name, values in space.items()}


def test_every_value_occurs_as_often_as_any_other():
    points = sample({"lr": (1, 2, 3, 4), "decay": (0, 1), "warmup": (0, 1)}, 8, 0)
    assert len(points) == 8
    for name, values in {"lr": (1, 2, 3, 4), "decay": (0, 1)}.items():
        counts = [sum(point[name] == value for point in points) for value in values]
        assert len(set(counts)) == 1, name
    assert points == sample({"lr": (1, 2, 3, 4), "decay": (0, 1), "warmup": (0, 1)}, 8, 0)
    wide = sample({"lr": tuple(range(100))}, 4, 0)
    assert [point["lr"] for point in wide] == [12, 37, 62, 87]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch-size": 8}, "batch_size=8 .the baseline: 4."),
        ({"data.context": 8}, "data.context=8"),
        ({"steps": 4}, "steps=4"),
    ],
)
def test_what_cannot_be_compared_is_named(changes, says):
    made = experiment()
    assert incomparable(made) == {}
    changed = chosen(made, changes=changes)
    assert changed.caveat.endswith(f"But here: {' '.join(map(str, *changes.items()))}.")
    other = changed.contenders[1]
    found = incomparable(replace(made, contenders=[made.contenders[0], other]))
    assert list(found) == ["lora"]
    assert says.replace(".", "") in found["lora"].replace(".", "").replace("(", "").replace(")", "")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": (1001, 2)}, "seed 1001 tunes, so it cannot report"),
        ({"trials": 0}, None),
        ({"methods": ("muno",)}, "has no 'muno'"),
        ({"equal": "luck"}, "tokens, seconds or memory"),
        ({"changes": {"lr": 1}}, "--lr is chosen by tiny itself"),
        ({"changes": {"stpes": 1}}, "did you mean '--steps'"),
    ],
)
def test_a_choice_that_makes_no_experiment_is_refused(changes, says):
    if says is None:
        with pytest.raises(ValueError, match="at least 1"):
            experiment(**changes)
        return
    with pytest.raises(ValueError, match=says):
        chosen(experiment(), **{"changes": {}, **changes})


@pytest.mark.parametrize("size", ["small", "paper"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_sound_and_comparable(name, size):
    for preset in ("as-meant", "as-published"):
        made = find_experiment(name, size=size, preset=preset)
        assert (made.name, incomparable(made)) == (name, {})
        assert len(made.seeds) >= (3 if size == "small" else 5)
        refuse_spaces(made)
        for each in made.contenders:
            validate(each.run)
            assert (preset == "as-published") == (each.space == {})


def test_a_space_that_would_waste_trials_is_refused_before_any_run():
    made = experiment(space={"lr": (1e-3, 1e-2), "method.head_lr": (1.0, 10.0)})
    assert made.contenders[0].run.model.name == "gpt2", "whose output layer is its embedding"
    with pytest.raises(ValueError, match=r"tiny, full, .*head_lr=10.0.* nothing to act on"):
        refuse_spaces(made)
    refuse_spaces(experiment())


def test_choices_of_an_experiment_are_checked():
    assert find_experiment("gpt-mini") is None
    with pytest.raises(ValueError, match=r"--size papre .did you mean 'paper'"):
        find_experiment("arena-llama", size="papre")
