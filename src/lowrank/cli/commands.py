"""What each command of the command line does: take the words apart, call the library, print.

Everything done here can be done from Python by the functions called; nothing is decided here but defaults of folders
and the look of what is printed.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank.cli.arguments import WIDTH, Parsed, UsageError, argument_help, fitted, number, row, several, switch, whole
from lowrank.cli.reporting import show
from lowrank.infra.convert import convert, nearest
from lowrank.infra.progress import short_bytes, short_count
from lowrank.infra.signatures import Signature, module_file, read
from lowrank.infra.text import printable
from lowrank.methods.options import OPTIONS
from lowrank.recipes import RECIPES, find
from lowrank.recipes.experiments import EXPERIMENTS, find_experiment
from lowrank.run import own_files
from lowrank.run.experiment import Experiment
from lowrank.run.overrides import catalogue, override, resolve
from lowrank.run.run import Run
from lowrank.run.validation import refuse_changed, refuse_occupied, validated


def train(parsed: Parsed) -> int:
    """A new run, or with --resume the same one further; with --elastic whichever of the two is due."""
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
        from lowrank.run.estimate import estimate, on_card

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


def evaluate(parsed: Parsed) -> int:
    """Loss and perplexity of a run, a checkpoint, or a model that was never trained here."""
    options = arguments("score", parsed.options)
    from lowrank.evaluate.score import score

    print(_aligned(score(_existing(parsed.positions[0]), **options)))
    return 0


def compare(parsed: Parsed) -> int:
    """Many runs, the missing ones executed, and their report."""
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
    from lowrank.report.compare import execute, parse_variant, planned
    from lowrank.report.compared import of_runs
    from lowrank.report.runs import find_results, find_unfinished
    from lowrank.report.table import apart, groups
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
    from lowrank.report.compared import of_results
    from lowrank.report.results import FILE
    from lowrank.run.experiment import chosen
    from lowrank.train.arena import run_experiment

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
    told = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in words.items()]
    command = " ".join(["lowrank compare", parsed.positions[0], *told])
    results = run_experiment(experiment, out, command=command, jobs=numbers.get("jobs", 1), say=_say)
    show([of_results(results)], out)
    print(out / FILE)
    return 1 if any(row.error for row in results.rows) else 0


def _say(text: str) -> None:
    print(printable(text), flush=True)


def doctor(parsed: Parsed) -> int:
    """What is silently wrong in a training script; 1 with faults, 0 without, 2 where its first step was not reached."""
    seconds = number(parsed.options.get("seconds", "60"), "--seconds")
    from lowrank.doctor.script import examine_script

    found = examine_script(Path(parsed.positions[0]), parsed.positions[1:], seconds=seconds)
    if found.why is not None:
        output = f"; the end of what it printed:\n{found.output}" if found.output else ""
        raise ValueError(f"{parsed.positions[0]}: {found.why}{output}")
    faults = sum(not each.note for each in found.faults)
    print(printable("\n\n".join(map(str, found.faults)) or "its first step shows nothing wrong"))
    return 1 if faults else 0


def generate(parsed: Parsed) -> int:
    """Text from a run or a model."""
    options = arguments("generate", parsed.options)
    from lowrank.evaluate.generate import generate as generate_text

    text = generate_text(_existing(parsed.positions[0]), **options)
    print(printable(text) if sys.stdout.isatty() else text)
    return 0


def chat(parsed: Parsed) -> int:
    """Questions from standard input, one a line, and a model's answers, until the input ends."""
    options = arguments("chat", parsed.options)
    from lowrank.evaluate.chat import chat as answers

    def questions() -> Iterator[str]:
        while True:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline()):
                return
            yield line.rstrip("\n")

    def note(text: str) -> None:
        print(text, file=sys.stderr)

    for answer in answers(_existing(parsed.positions[0]), questions(), **options, note=note):
        print(printable(answer) if sys.stdout.isatty() else answer, flush=True)
    return 0


def export(parsed: Parsed) -> int:
    """A plain model from a run, adapters merged, original keys; or what it trained apart from its base."""
    from lowrank.evaluate.score import export as export_run
    from lowrank.evaluate.score import export_nanogpt, export_with_base
    from lowrank.interop import export_adapter, export_difference, export_peft
    from lowrank.interop.adapter_start import is_adapter

    source, *outs = map(Path, parsed.positions)
    which = parsed.options.get("checkpoint", "best")
    if ("adapter" in parsed.options) == bool(outs):
        raise UsageError("give one folder: lowrank export RUN OUT, or lowrank export RUN --adapter OUT")
    form = parsed.options.get("format", "lowrank")
    if "format" in parsed.options and form not in (("nanogpt",) if outs else ("lowrank", "peft")):
        raise UsageError("--format is lowrank or peft with --adapter OUT, or nanogpt with a whole model")
    cut = parsed.only(("rank", "energy"))
    if cut and (form != "peft" or len(cut) > 1):
        raise UsageError("--rank N or --energy 0.9, one of them, goes with --adapter OUT --format peft")
    if not outs:
        out = Path(parsed.options["adapter"])
        if cut:
            rank = whole(cut["rank"], "--rank") if "rank" in cut else None
            energy = number(cut["energy"], "--energy") if "energy" in cut else None
            step, kept = export_difference(source, out, which=which, rank=rank, energy=energy)
            print(filled(f"{out}: what {source} changed by step {step}, for PEFT: {kept}"))
            return 0
        if form == "peft":
            step = export_peft(source, out, which=which)
            print(printable(f"{out}: the adapter of {source} at step {step}, for PEFT"))
            return 0
        info = export_adapter(source, out, which=which)
        size = short_bytes((out / "adapter.safetensors").stat().st_size)
        print(printable(f"{out}: the adapter and head of {info.origin}, {size}"))
        return 0
    if form == "nanogpt":
        step, note = export_nanogpt(source, outs[0], which=which)
        print(f"{outs[0]}/ckpt.pt: the merged model of {source} at step {step}" + (f"\n{note}" if note else ""))
        return 0
    if is_adapter(source):
        if "checkpoint" in parsed.options:
            raise UsageError("--checkpoint picks one of a run's, and an adapter's folder has none: leave it out")
        base = export_with_base(source, outs[0], base=parsed.options.get("base"))
        print(printable(f"{outs[0]}: {base} with the adapter {source} merged"))
        return 0
    if "base" in parsed.options:
        raise UsageError(f"--base goes with the folder of an adapter, which {source} is not")
    step = export_run(source, outs[0], which=which)
    print(printable(f"{outs[0]}: the merged model of {source} at step {step}"))
    return 0


def predict(parsed: Parsed) -> int:
    """A line of each image file: its class with probabilities, or where its mask lies."""
    options, images = arguments("predict", parsed.options), list(parsed.positions)
    if not {"base", "adapter"} & options.keys() and len(images) > 1 and (Path(images[0]) / "run.json").is_file():
        options["base"] = images.pop(0)
    from lowrank.evaluate.predict import predict as predict_images

    for each in predict_images(images, **options):
        print(printable(str(each), keep=""))
    return 0


def data(parsed: Parsed) -> int:
    """Which texts there are, and preparing one."""
    from lowrank.data import list_sources, prepare
    from lowrank.report.table import text_table

    what, *names = parsed.positions
    if what == "list" and not names:
        header = ["name", "size", "licence", "network", "prepared", "about"]
        fold = textwrap.TextWrapper(28, break_on_hyphens=False).wrap
        body: list[list[str]] = []
        for each in list_sources():
            network, prepared = "yes" if each.needs_network else "no", str(len(each.prepared))
            licence, about = textwrap.wrap(each.licence, 13), fold(each.about)
            lines = list(itertools.zip_longest(licence, about, fillvalue=""))
            body.append([each.name, each.size, lines[0][0], network, prepared, lines[0][1]])
            body += [["", "", more, "", "", text] for more, text in lines[1:]]
        print(text_table(header, body, left=(0, 2, 3, 5)))
        return 0
    if what == "prepare" and len(names) == 1:
        tokens = prepare(names[0], **arguments("prepare", parsed.options))
        print(tokens)
        place = shlex.quote(str(tokens.folder))
        print(f"\nTrain on it:\n  lowrank train gpt-mini --data {place}")
        return 0
    raise UsageError("usage: lowrank data list, or lowrank data prepare NAME|FILE [options]")


def methods(parsed: Parsed) -> int:
    """The catalogue, or one method with its options."""
    offer = catalogue()
    if not parsed.positions:
        print(_catalogue({name: offer.signature("method", name).doc for name in offer.method}))
        return 0
    told = offer.signature("method", parsed.positions[0])
    about = OPTIONS | argument_help(told.doc)
    text = fitted(told.doc.partition("\nArgs:")[0])
    print(f"{parsed.positions[0]}\n\n{text}\n\nOptions, with their defaults:")
    for name, default in told.defaults.items():
        print(row(f"  --method.{name} {_written(default)}", about.get(name, "").rstrip(".")))
    return 0


def recipes(parsed: Parsed) -> int:
    """The recipes, or one with everything that it sets."""
    if not parsed.positions:
        print(_catalogue({name: inspect.getdoc(recipe) or "" for name, recipe in RECIPES.items()}))
        return 0
    name = parsed.positions[0]
    run = resolve(find(name))
    if name in RECIPES:
        summary, _, rest = (inspect.getdoc(RECIPES[name]) or "").partition("\n\n")
        print(f"{name}\n\n{filled(summary)}\n\n{_entries(rest)}\n")
    print(json.dumps(run.to_json(), indent=2))
    return 0


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
        for name in ("auc", "acc")
        if isinstance(value := summary.get(f"{split}_{name}"), float)
    ]
    parts.append(
        f"{short_count(summary['parameters_trained'])} of {short_count(summary['parameters_total'])} parameters trained"
    )
    parts.append(f"optimizer state {short_bytes(summary['state_bytes'])}")
    if isinstance(seconds := summary.get("step_seconds"), float):
        parts.append(f"{seconds:.3g} s a step")
    return f"{out}: step {summary['steps']}: " + ", ".join(parts)


FUNCTIONS = {
    "score": "lowrank.evaluate.score",
    "generate": "lowrank.evaluate.generate",
    "chat": "lowrank.evaluate.chat",
    "predict": "lowrank.evaluate.predict",
    "prepare": "lowrank.data.text.prepare",
}


def signature(function: str) -> Signature:
    """Of a function of the library whose arguments are a command's options; read, not imported."""
    return read(module_file(FUNCTIONS[function]), function)


def arguments(function: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Options converted for the function whose signature they were made from."""
    known = signature(function).kinds
    return {name: convert(value, known[name], f"--{name.replace('_', '-')}") for name, value in options.items()}


def _existing(source: str) -> str:
    """A run or model that is looked for on the hub only if it cannot have been a folder here.

    A name on the hub looks like a folder in a folder: where the outer one is here, the inner one was meant.

    Raises:
        FileNotFoundError: a folder was meant, and there is none; the nearest is named.
    """
    folder = Path(source).expanduser()
    parent = folder.parent
    deep = len(folder.parts) > 2 or source.endswith(("/", ".json", ".txt"))
    meant = source.startswith((".", "/", "~")) or deep or (parent != Path(".") and parent.is_dir())
    if meant and not folder.exists():
        beside = [str(other) for other in parent.iterdir()] if parent.is_dir() else []
        raise FileNotFoundError(f"there is no run or model {source}{nearest(source, beside)}")
    if folder.is_file() and folder.suffix not in (".pt", ".pth"):  # nanoGPT's ckpt.pt is a model
        raise ValueError(f"{source} is a file: give the folder of a run or a model, or nanoGPT's ckpt.pt")
    return source


def _catalogue(docs: Mapping[str, str]) -> str:
    """Names with the first paragraph of their docstrings."""
    indent = " " * (max(map(len, docs)) + 2)
    first = {name: " ".join(doc.partition("\n\n")[0].replace("``", "").split()) for name, doc in docs.items()}
    return "\n".join(
        textwrap.fill(about, WIDTH, initial_indent=name.ljust(len(indent)), subsequent_indent=indent)
        for name, about in first.items()
    )


def filled(text: str) -> str:
    """A sentence over as many lines as it takes; paths and names stay whole."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def _entries(text: str) -> str:
    """Lines of ``Key: what``, each filled under its key; commands stay whole, to be copied."""
    entries = re.sub(r"\n {2,}", " ", text).splitlines()
    return "\n".join(
        line if line.startswith("Command:") else textwrap.fill(line, WIDTH, subsequent_indent=" " * 10)
        for line in entries
    )


def _aligned(figures: Mapping[str, Any]) -> str:
    width = max(map(len, figures))
    return "\n".join(
        f"{name.ljust(width)}  {f'{value:.6g}' if isinstance(value, float) else value}"
        for name, value in figures.items()
    )


def _written(default: object) -> str:
    """A default as it would be typed."""
    if isinstance(default, (list, tuple)):
        return ",".join(map(str, default)) or "[]"
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
