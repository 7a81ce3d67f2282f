"""The commands that train: ``train``, one run, and ``compare``, several, or an experiment."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.cli.arguments import Option, Parsed, UsageError, command, number, several, switch, whole
from lowrank.cli.reporting import show
from lowrank.cli.run_options import CHANGED, DOTTED, QUIET, RUN
from lowrank.infra.convert import as_option, nearest
from lowrank.infra.progress import short_bytes, short_count
from lowrank.infra.text import printable
from lowrank.recipes import RECIPES, find
from lowrank.recipes.experiments import EXPERIMENTS, find_experiment
from lowrank.run import own_files
from lowrank.run.experiment import Experiment
from lowrank.run.overrides import catalogue, override, resolve
from lowrank.run.run import Run
from lowrank.run.validation import refuse_changed, refuse_occupied, validated

_TRAINING = (
    Option(name="out", value="DIR", help="the run's folder; default runs/<recipe>-<method>-<n>"),
    Option(name="resume", value="DIR", help="go on with the run in DIR; --steps may be larger than before"),
    Option(name="elastic", help="go on with the run in --out if it holds this one, else start it there"),
    Option(name="init_from", value="DIR", help="start from the merged weights of another run"),
    Option(name="init_adapter", value="DIR", help="train an adapter further: PEFT's folder, or one of export"),
    Option(name="dry_run", help="check the run and print what it would take in memory; nothing is read or written"),
    CHANGED,
    QUIET,
)
_SEVERAL = (
    Option(name="methods", value="A,B,…", help="methods, each perhaps with settings, or an experiment's by name"),
    Option(name="folds", value="N", help="of images: every run for each of N folds, by patient and class"),
    Option(name="seeds", value="N,N,…", help="report every method under each of these; fewer than 3: no test"),
    Option(name="lrs", value="X,X,…", help="learning rates to try; the table keeps the best of each method"),
    Option(name="out", value="DIR", help="holds one folder a run and the report; default runs/compare-<recipe>"),
    Option(name="size", value="NAME", group="Experiment", help="small (two cores, the default) or paper (a GPU)"),
    Option(name="preset", value="NAME", group="Experiment", help="as-meant (the default) or as-published"),
    Option(name="trials", value="N", group="Experiment", help="points of its space that each method is tuned by"),
    Option(name="equal", value="WHAT", group="Experiment", help="equal tokens (the default), seconds or memory"),
    Option(name="jobs", value="N", group="Experiment", help="runs at a time; default 1"),
    CHANGED,
    QUIET,
)


@command((*_TRAINING, *RUN), DOTTED, (0, 1))
def train(parsed: Parsed) -> int:
    """train RECIPE|run.json|file.py:function [options]
    train a recipe, or go on with a run

    Trains a recipe (see lowrank recipes), a run.json, or a Run that a function of yours returns (file.py:function).
    Everything a recipe sets can be overridden; --method.X, --model.X and --data.X reach the arguments of the method,
    the model and the data by name (lowrank methods NAME lists the first).

    A method, model, source of data or task of your own is named as file.py:function. Its file goes into run.json with
    its digest, and is executed only where you name it or say --trust-files.

    The run's folder gets run.json (all settings: training it again gives the same numbers), env.json, log.jsonl,
    checkpoints/ and summary.json. Ctrl-C saves and stops; --resume goes on. With --elastic the same command goes on by
    itself whenever it is started again, as torchrun --max-restarts does, on as many processes as there are then.

    Examples:
      lowrank train gpt-mini --method lora --method.rank 4 --lr 3e-3
      lowrank train gpt-mini --data articles.csv --data.tokenizer bpe:4096 --steps 1000 --out runs/articles
      lowrank train runs/articles/run.json --out runs/again
      lowrank train --resume runs/articles --steps 2000
      lowrank train finetune --model.path MODEL --data pairs.jsonl --out runs/sft
      lowrank train gpt-mini --method relora --init-from runs/warm-up
      lowrank train gpt-mini --method examples/new_optimizer.py:method
      torchrun --nproc-per-node 2 --max-restarts 3 -m lowrank train gpt-mini --method lte --elastic --out runs/lte
    """
    own = ("out", "resume", "elastic", "init_from", "init_adapter", "allow_changed_data", "quiet", "dry_run")
    changes = parsed.without(own)
    resumed, elastic = parsed.options.get("resume"), switch(parsed, "elastic")
    if elastic and (resumed is not None or "out" not in parsed.options):
        raise UsageError("--elastic starts a run or goes on with it, in the folder that --out names: give --out DIR")
    if resumed is None:
        if len(parsed.positions) != 1:
            raise UsageError("what is to be trained? usage: lowrank train RECIPE [options]; see: lowrank recipes")
        run = validated(override(find(parsed.positions[0]), changes))
        out = Path(parsed.options["out"]) if "out" in parsed.options else _free_folder(run)
        if not elastic:
            refuse_occupied(out)
        elif (out / "run.json").exists():
            refuse_changed(resolve(Run.read(out / "run.json")), run)
    else:
        if parsed.positions or parsed.only(("out", "init_from", "init_adapter")):
            raise UsageError(
                "--resume DIR goes on in DIR with its own recipe: leave the recipe, --out, --init-from and "
                "--init-adapter out"
            )
        out = Path(resumed)
        before = Run.read(out / "run.json")
        run = validated(override(before, {"stop_at": None, **changes}))
        refuse_changed(resolve(before), run)
    if switch(parsed, "dry_run"):
        from lowrank.run.memory_estimate import estimate, on_card

        print(
            printable(f"{estimate(run, on_card=on_card(run))}\n\nnothing was trained and nothing written (--dry-run)")
        )
        return 0
    from lowrank.distributed.process_group import is_first
    from lowrank.train.loop import train as train_run

    starts: dict[str, Any] = {name: Path(folder) for name, folder in parsed.only(("init_from", "init_adapter")).items()}
    how: dict[str, Any] = {name: switch(parsed, name) for name in ("allow_changed_data", "quiet")}
    summary = train_run(run, out, resume=resumed is not None, elastic=elastic, **starts, **how)
    if is_first():
        print(printable(_verdict(out, summary)))
    return 130 if summary.get("interrupted") else 0


@command((*_SEVERAL, *(option for option in RUN if option.name != "method")), DOTTED)
def compare(parsed: Parsed) -> int:
    """compare RECIPE|EXPERIMENT|file.py:function [options]
    train several methods under one budget, and say what is true

    Trains a recipe under several methods with the same seeds and budget, each run in a folder of its own, and reports.
    Runs that exist already are not repeated, one that fails does not stop the others, so the same command again,
    perhaps with more methods or seeds, does what is missing.

    An experiment (arena-llama, heads-ranks-merge, sequential-parallel, layers-replaced, adam-galore-memory, vit-ranks,
    lte-galore, lora-rate, switching, tissue) also tunes each method by the same number of trials, on other seeds and
    another split than it reports, and ends in a sentence that claims what a paired test, corrected for all comparisons,
    allows.

    A method may carry settings: lte:merge_every=1 or lora:rank=16:lr=3e-3. All options of lowrank train hold for every
    method; --method.X for those that have X.

    Examples:
      lowrank compare gpt-mini --methods full,lora,multihead_lora,lte,relora --seeds 1,2,3 --out runs/first
      lowrank compare gpt-mini --methods lte:merge_every=1,lte:merge_every=10 --lrs 1e-3,2e-3,4e-3 --steps 200
      lowrank compare arena-llama --data articles.csv --seeds 1,2,3,4,5 --out runs/arena
    """
    found = find_experiment(parsed.positions[0], **parsed.only(("size", "preset")))
    if found is not None:
        return _experiment(parsed, found)
    meant = nearest(parsed.positions[0], [*RECIPES, *EXPERIMENTS])
    if parsed.positions[0] not in RECIPES and any(name in meant for name in EXPERIMENTS):
        raise UsageError(f"there is no experiment {parsed.positions[0]!r}{meant}; there are {', '.join(EXPERIMENTS)}")
    if extra := sorted(parsed.only(("size", "preset", "trials", "equal", "jobs"))):
        raise UsageError(f"--{extra[0]} goes with an experiment, one of {', '.join(EXPERIMENTS)}: leave it out")
    base, offer = find(parsed.positions[0]), catalogue()
    texts = several(parsed, "methods", [base.method.name])
    for name in (re.split(r":(?=[\w.-]+=)", text)[0] for text in texts):
        offer.check("method", name)
        if own_files.is_own(name) and "methods" in parsed.options:
            own_files.given(name)
    from lowrank.distributed.process_group import world_size
    from lowrank.report.comparison import of_runs
    from lowrank.report.runs import find_results, find_unfinished
    from lowrank.report.table import apart, groups
    from lowrank.report.variants import execute, parse_variant, planned
    from lowrank.train.loop import train as train_run

    if world_size() > 1:
        raise UsageError(
            "lowrank compare trains its runs one after the other in one process: start it without torchrun"
        )
    variants = [parse_variant(text, offer) for text in texts]
    runs = planned(
        base,
        variants,
        seeds=[whole(text, "--seeds") for text in several(parsed, "seeds")],
        rates=[number(text, "--lrs") for text in several(parsed, "lrs")],
        folds=whole(parsed.options["folds"], "--folds") if "folds" in parsed.options else None,
        changes=parsed.without(("methods", "seeds", "lrs", "folds", "out", "allow_changed_data", "quiet")),
        offer=offer,
    )
    out = Path(parsed.options.get("out", f"runs/compare-{base.recipe}"))
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: give the name of a folder that is to hold the runs")
    how: dict[str, Any] = {name: switch(parsed, name) for name in ("allow_changed_data", "quiet")}
    outcomes = execute(runs, out, lambda run, folder, resume: train_run(run, folder, resume=resume, beside=True, **how))
    finished = list(dict.fromkeys(each.folder for each in outcomes if each.error is None))
    failed = [each for each in outcomes if each.error is not None]
    if finished:
        results, broken = find_results(finished), find_unfinished([each.folder for each in failed])
        show(of_runs(results, broken), out, apart(groups([*results, *(each.result for each in broken)])))
        if "folds" not in parsed.options and len({each.settings.get("data.fingerprint") for each in results}) > 1:
            print(
                "\nnote: the data has changed between these runs, which stand apart: --out NEW trains all of them anew"
            )
    for each in failed:
        print(printable(f"failed: {each.name}: {each.error}"), file=sys.stderr)
    return 1 if failed else 0


def _experiment(parsed: Parsed, experiment: Experiment) -> int:
    """An experiment's missing runs, its table and its sentence."""
    from lowrank.distributed.process_group import world_size
    from lowrank.infra.extras import import_extra
    from lowrank.report.comparison import of_results
    from lowrank.report.results import FILE
    from lowrank.run.experiment import chosen
    from lowrank.train.experiments import run_experiment

    if world_size() > 1:
        raise UsageError("lowrank compare trains its runs in processes of its own: start it without torchrun")
    import_extra("scipy", "report")
    own = ("size", "preset", "trials", "equal", "jobs", "methods", "seeds", "out", "quiet")
    if "lrs" in parsed.options:
        raise UsageError("an experiment tunes rates itself, over the space that it declares: leave --lrs out")
    if "folds" in parsed.options:
        raise UsageError("--folds goes with a recipe of images: an experiment repeats its runs by --seeds")
    if "allow_changed_data" in parsed.options:
        raise UsageError("runs on other data stand in no table together: leave --allow-changed-data out, or --out NEW")
    numbers = {name: whole(parsed.options[name], f"--{name}") for name in ("trials", "jobs") if name in parsed.options}
    if numbers.get("jobs", 1) < 1:
        raise UsageError(f"--jobs {numbers['jobs']}: at least 1 run at a time")
    seeds = tuple(whole(text, "--seeds") for text in several(parsed, "seeds"))
    experiment = chosen(
        experiment,
        changes=parsed.without(own),
        methods=several(parsed, "methods"),
        seeds=seeds,
        trials=numbers.get("trials"),
        equal=parsed.options.get("equal"),
    )
    out = Path(parsed.options.get("out", f"runs/{experiment.name}"))
    words = {name: value for name, value in parsed.options.items() if name not in ("out", "quiet", "jobs")}
    told = [f"{as_option(name)} {shlex.quote(str(value))}" for name, value in words.items()]
    command = " ".join(["lowrank compare", parsed.positions[0], *told])
    results = run_experiment(experiment, out, command=command, jobs=numbers.get("jobs", 1), say=_say)
    show([of_results(results)], out)
    print(out / FILE)
    return 1 if any(row.error for row in results.rows) else 0


def _say(text: str) -> None:
    print(printable(text), flush=True)


def _free_folder(run: Run) -> Path:
    """runs/<recipe>-<method>-<n>, the first that there is not."""
    number, name = 1, re.sub(r"[^\w.=-]+", "_", f"{run.recipe}-{own_files.short(run.method.name)}")
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def _verdict(out: Path, summary: Mapping[str, Any]) -> str:
    """One line about a run that has ended."""
    parts = []
    if isinstance(loss := summary.get("val_loss"), float):
        parts.append(f"validation loss {loss:.4f}")
    if isinstance(best := summary.get("best_val_loss"), float):
        parts.append(f"best {best:.4f}")
    parts += [
        f"{split} {name} {value:.4f}"
        for split in ("val", "test")
        for name in ("auc", "acc", "dice")
        if isinstance(value := summary.get(f"{split}_{name}"), float)
    ]
    parts.append(
        f"{short_count(summary['parameters_trained'])} of {short_count(summary['parameters_total'])} parameters trained"
    )
    parts.append(f"optimizer state {short_bytes(summary['state_bytes'])}")
    if isinstance(seconds := summary.get("step_seconds"), float):
        parts.append(f"{seconds:.3g} s a step")
    return f"{out}: step {summary['steps']}: " + ", ".join(parts)
