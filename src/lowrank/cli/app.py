"""The command line: which commands there are, how they explain themselves, and how errors look.

`main` parses, calls (`lowrank.cli.commands`) and prints. An error that the user can mend is one clear message and exit
status 2; one that should not have been is a short message, a file with all about it, and status 70. LOWRANK_DEBUG=1
shows the traceback of either.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

from lowrank import __version__
from lowrank.cli import commands, planning, reporting
from lowrank.cli.arguments import Command, Option, Parsed, explain, options_of, overview, parse, placeholder, switch
from lowrank.cli.streams import ready_streams
from lowrank.infra.convert import nearest
from lowrank.infra.text import printable
from lowrank.run import own_files
from lowrank.run.overrides import options
from lowrank.run.run import Run

_ABOUT = "Train neural networks with low-rank weights and low-rank gradients, and compare the methods honestly."

_CLOSING = """
Begin with:
  lowrank train gpt-mini                      a small GPT, in a minute
  lowrank train gpt-mini --method lte         the same with LoRA-the-Explorer
  lowrank compare gpt-mini --methods full,lora,multihead_lora,lte,relora

lowrank COMMAND --help explains a command. LOWRANK_DEBUG=1 shows where an error came from.
"""

_WHAT = tuple(
    Option(name=name, value=value, group="What", help=text)
    for name, value, text in (
        ("method", "NAME", "see lowrank methods, or your file.py:function; its options are --method.rank 8 …"),
        ("data", "SOURCE", "a file, a folder, a name (lowrank data list) or your file.py:function"),
        ("model", "NAME", "gpt2, vit, … or your file.py:function; its options are --model.n_layer 4 …"),
        ("task", "NAME", "text, images or your file.py:class"),
        ("labels", "FILE", "a folder of images' labels: CSV with path, label, …"),
    )
)

_TRAIN = """
train RECIPE|run.json|file.py:function [options]
train a recipe, or go on with a run

Trains a recipe (see lowrank recipes), a run.json, or a Run that a function of yours returns (file.py:function).
Everything a recipe sets can be overridden; --method.X, --model.X and --data.X reach the arguments of the method, the
model and the data by name (lowrank methods NAME lists the first).

A method, model, source of data or task of your own is named as file.py:function. Its file goes into run.json with its
digest, and is executed only where you name it or say --trust-files.

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

_EVAL = """
eval RUN|MODEL [options]
loss and perplexity on any split

Scores every token of a split exactly once, on the merged weights. MODEL is a folder of transformers' format or a name
on the hub that was never trained here, or the folder of an adapter, PEFT's or of lowrank export.

Examples:
  lowrank eval runs/articles
  lowrank eval runs/articles --data other.txt --split train --checkpoint latest
  lowrank eval gpt2 --data articles.csv --context 512
  lowrank eval adapters/sft --data articles.csv --base models/gpt2
"""

_COMPARE = """
compare RECIPE|EXPERIMENT|file.py:function [options]
train several methods under one budget, and say what is true

Trains a recipe under several methods with the same seeds and budget, each run in a folder of its own, and reports.
Runs that exist already are not repeated, one that fails does not stop the others, so the same command again, perhaps
with more methods or seeds, does what is missing.

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

_REPORT = """
report DIR… [--out NAME.html|DIR] [--watch]
one page of runs: the answer, tables and pictures

Prints tables of the finished runs in the folders (or right below them) and of experiments' results, and what their
seeds allow to be said. --out NAME.html writes one page, which needs nothing but itself; any other name is a folder for
report.html, report.md, curves.png, and figures/ with each picture as SVG and CSV and the table for LaTeX. Runs that
cannot be compared with each other stand in tables of their own; a run that failed is a row with its reason.

Examples:
  lowrank report runs/first runs/second --out report.html
  lowrank report results/heads-ranks-merge --out table1.html
  lowrank report runs/first --out live.html --watch
"""

_PLAN = """
plan RECIPE [options], or plan --calibrate
will it fit: what a run takes in memory, and what would train

Says what a run needs at its peak, where that is and what the bytes are: a step of each kind (the first, an ordinary
one, a refresh of bases, a merge, an evaluation) is gone through with tensors that have shapes and no numbers, so that
neither weights nor data are needed. It is what torch holds, to the byte on a CPU but for scratch space within kernels;
for a GPU its allocator's rounding is added, and 512 MiB that a CUDA process is assumed to take. Takes the options of
lowrank train.

With --methods it sets several side by side, with the largest micro-batch for each of the usual cards (interpolated
between traces of three sizes). With --fit it looks for the least that must be given up for the run to fit: micro-batch,
activations, precision, method, per-layer steps, rank; it says what it gave up, and --out writes a run.json that trains.

With --ranks it says what the one of several processes takes that takes most, and what it sends, under --engine and
--workers as in lowrank train; none is started. With --link it also says what such a link makes of it: bytes and seconds
a step, beside DDP's, and from which merge interval on communication hardly matters. One rank's step is measured here
unless --step-seconds says what it takes on the machines that are meant.

It also says what a step computes and what the optimizer moves. Seconds are said once --calibrate has timed a few steps
of small models on this machine; they hold for its device, number of threads and version of torch, and for no other.

Examples:
  lowrank plan gpt2-pretrain
  lowrank plan gpt2-pretrain --calibrate
  lowrank plan llama-7b --method galore_8bit --per-layer --grad-accum 1
  lowrank plan llama-7b --methods full,lora,galore,galore_8bit --per-layer --out memory.png
  lowrank plan llama-1b --fit 12GB --out fits.json
  lowrank plan gpt-mini --method lte --method.target_modules attention --layers
  lowrank plan llama-7b --engine fsdp --ranks 8
  lowrank plan gpt2-pretrain --method.heads 64 --batch-size 64 --ranks 64 --link 1Gbit --latency 1ms --step-seconds 0.2
"""

_DOCTOR = """
doctor SCRIPT.py [options] [-- ARGUMENTS]
what is silently wrong in a training script, anybody's

Runs a script that trains with torch, as it is, in a process of its own, until its first optimizer step is over; then
stops it and says in plain words what cannot be meant, and the line to change: a scale of 0, adapters without gradient,
a frozen head, parameters in no group or in two, projections that compress nothing, DistributedDataParallel before the
adapters, clipping without effect, a step a micro-batch, steps that bfloat16 rounds away, layers passed over, decay on
factors, state that cannot be saved. What the script writes before its first step is written. For a model at hand there
is lowrank.check(model, optimizer, batch).

Exit status: 1 with faults, 0 without, 2 where the script did not get there.

Examples:
  lowrank doctor train.py
  lowrank doctor finetune.py --seconds 300 -- --model gpt2 --lr 1e-4
"""

_GENERATE = """
generate RUN|MODEL --prompt TEXT [options]
text from a run or a model

Continues a prompt with a run's best checkpoint, a certain checkpoint, a model of transformers, or an adapter's folder,
PEFT's or of lowrank export, on the base that it names (--base says where it is).

Examples:
  lowrank generate runs/articles --prompt "The president said" --tokens 100
  lowrank generate runs/articles/checkpoints/step-00000100 --temperature 0
"""

_CHAT = """
chat RUN|MODEL [options]
a conversation with a run or a model

Answers what is typed, a line each, through the chat template of the model's tokenizer, with all that has been said
before. Ends where the input ends (Ctrl-D).

Examples:
  lowrank chat runs/sft
  echo "What is a tensor?" | lowrank chat runs/sft --temperature 0
"""

_EXPORT = """
export RUN|ADAPTER OUT, or export RUN --adapter OUT [options]
a plain model from a run or an adapter; or a run's adapter alone

Merges the adapters of a run into its weights and writes a plain model. One of transformers gets config.json,
model.safetensors and all of its tokenizer (characters and bytes too), which transformers loads, and so do lowrank eval,
generate and train gpt2-finetune --model.path OUT. A vision transformer of timm gets what timm.create_model opens by
local-dir:OUT, and lowrank train by --model.weights OUT. With --format nanogpt a GPT-2 becomes nanoGPT's ckpt.pt, which
eval, generate and --model.path read as well. Of an adapter's folder, PEFT's or ours, on a language model, it writes the
base with the adapter merged. A quantised base is written as its codes say it.

With --adapter OUT it writes instead what was trained and nothing of the base: adapter and head, for lowrank predict and
lowrank.interop.AdapterBank; with --format peft in the format of PEFT, whose PeftModel.from_pretrained opens it.
Methods that train or merge into the weights (full, galore, lte, relora, …) have no adapter apart: with --rank or
--energy the difference to the base is written as a LoRA, the base being what it was when the run began.

Examples:
  lowrank export runs/articles exported
  lowrank export runs/vit --adapter adapters/pneumonia
  lowrank export runs/sft --adapter adapters/sft --format peft
  lowrank export runs/pairs --adapter adapters/pairs --format peft --energy 0.9
"""

_PREDICT = """
predict RUN IMAGE…, or predict --adapter DIR IMAGE… [options]
what image files show

Says which class image files show, or draws their masks into a new folder, by a run, or by an adapter on its base. The
adapter names the base that it was trained on; --base says where that is: a run's folder, a file of weights, a timm name
or hub. A mask has its file's size; a NIfTI file gets one in its own array and affine, others a PNG of class numbers.

Examples:
  lowrank predict --base runs/vit --adapter adapters/pneumonia new/*.png
  lowrank predict runs/digits scans --out predictions.csv
  lowrank predict runs/tissue scan.nii.gz --out masks
"""

_DATA = """
data list, or data prepare NAME|FILE [options]
the texts there are, and tokenising one

lowrank data list shows the texts that have a name; any .txt, .csv, .jsonl, .parquet or folder works beside them.
lowrank data prepare tokenises one into memory-mapped files; train does so by itself where it has not been done.

Examples:
  lowrank data prepare articles.csv --tokenizer bpe:4096 --column article
  lowrank data prepare openwebtext --tokenizer gpt2 --out data/openwebtext
"""

_METHODS = """
methods [NAME]
the catalogue of methods, or one with its options

Lists the methods; with a name, its source, defaults and options.
"""

_RECIPES = """
recipes [NAME]
the recipes, or one with everything it sets

Lists the recipes; with a name, its command, time, expected result and all its settings as JSON.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit status: 0, 1 (some runs of a comparison failed), 2 (an error that can be mended), 70 (one that should
        not have been), 130 (interrupted).
    """
    words = list(sys.argv[1:] if words is None else words)
    with ready_streams(trains=words[:1] in (["train"], ["compare"])):
        return _status(words)


def _status(words: list[str]) -> int:
    before, warnings.showwarning = warnings.showwarning, _warn
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # it tells of each attempt to connect
    try:
        status = _dispatch(words)
        sys.stdout.flush()  # a reader that has left is noticed here, and not when the interpreter ends
        return status
    except KeyboardInterrupt:
        print("lowrank: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has left
        return 0
    except Exception as error:
        if os.environ.get("LOWRANK_DEBUG", "0") not in ("", "0"):
            raise
        message = _mendable(error)
        with suppress(OSError):
            print(f"lowrank: {_short(printable(message or _reported(words, error)))}", file=sys.stderr)
        return 2 if message else 70
    finally:
        warnings.showwarning = before
        own_files.trust_nothing()


def _warn(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
    """A warning in the look of our messages; whose line of code it was is nobody's business but ours."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(f"lowrank: warning: {_short(printable(str(message)))}", file=sys.stderr)


def _short(text: str, most: int = 4000) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _mendable(error: Exception) -> str | None:
    """What to say of an error whose cause is input, the machine or a package that is missing; None of any other."""
    import csv
    import zipfile
    import zlib

    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in text:
        return (
            f"out of memory ({text.splitlines()[0]}): use a smaller --batch-size with a larger --grad-accum, a shorter "
            "context, --precision bf16 or --per-layer; what was saved is whole, --resume goes on from there"
        )
    if "mixed torch.Tensor and DTensor" in text:
        return (
            "the model reads a weight past its layer, which is in shards there: call the layer, or take --engine ddp "
            f"({text.splitlines()[0]})"
        )
    if type(error) is RuntimeError and _is_ours(error):
        return text
    if isinstance(error, OSError):
        return _of_the_system(error) or text
    if isinstance(error, (ValueError, ImportError, ArithmeticError)):
        return text
    damaged = (EOFError, re.error, csv.Error, zipfile.BadZipFile, zlib.error)
    if isinstance(error, damaged) or type(error).__name__ == "SafetensorError":
        return f"a file or pattern cannot be read ({type(error).__name__}: {text})"
    from lowrank.infra.checkpoint import CheckpointError  # and torch with it

    return text if isinstance(error, CheckpointError) else None


def _is_ours(error: Exception) -> bool:
    """Whether our own code raised it, which then has words for what a model does."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lowrank.")


def _of_the_system(error: OSError) -> str | None:
    """An error of the operating system, which has no words but its own, with the file and what helps."""
    if type(error).__module__ != "builtins" or error.filename is None or str(error)[:7] != "[Errno ":
        return None
    name = os.fsdecode(error.filename)
    remedies = {
        errno.ENOSPC: "make room, or choose another disk",
        errno.EDQUOT: "make room, or choose another disk",
        errno.EACCES: "give yourself the right to it, or choose another",
        errno.EROFS: "choose another place",
        errno.ENOENT: "make the folder first, or look at the name",
        errno.EEXIST: "choose another name",
        errno.ENOTDIR: "a folder is wanted where a file is: choose another name",
        errno.EISDIR: "a file is wanted, and this is a folder: choose another name",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
    }
    remedy = remedies.get(error.errno or 0)
    return f"{name if len(name) < 200 else name[:60] + '…'}: {error.strerror}" + (f"; {remedy}" if remedy else "")


def _reported(words: Sequence[str], error: Exception) -> str:
    """Words for an error that should not have been; all about it is in a file."""
    import platform
    import shlex
    import tempfile
    import traceback

    versions = f"lowrank {__version__}, Python {platform.python_version()}, {platform.platform()}"
    trace = "".join(traceback.format_exception(error))
    short = f"this should not have happened: {type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="lowrank-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"{versions}\nlowrank {shlex.join(words)}\n\n{trace}")
    except OSError:
        return f"{short}\n{trace}"
    return f"{short}\nWhat is known about it is in {file.name}: please report it with that file"


def _dispatch(words: list[str]) -> int:
    if words[:1] in ([], ["--help"], ["-h"], ["help"]):
        print(overview(_ABOUT, every_command(), _CLOSING))
        return 0
    if words == ["--version"]:
        print(f"lowrank {__version__}")
        return 0
    known = {command.name: command for command in every_command()}
    name, *rest = words
    if name not in known:
        raise ValueError(f"there is no command {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    before_end = rest[: rest.index("--")] if "--" in rest else rest
    if {"--help", "-h"} & set(before_end):
        print(explain(known[name]))
        return 0
    parsed = parse(rest, known[name])
    if switch(parsed, "trust_files"):
        own_files.trust_every_file()
    return known[name].call(Parsed(positions=parsed.positions, options=parsed.without(("trust_files",))))


def every_command() -> list[Command]:
    """The commands, in the order in which the overview shows them."""
    dotted = ("method.", "model.", "data.")
    trust = Option(name="trust_files", help="execute the .py files that a run.json names, if they are still the same")
    quiet = Option(name="quiet", help="no progress line")
    changed = Option(name="allow_changed_data", help="go on although the data's content is not what it was")
    run = (*run_options(), trust)
    training = (
        Option(name="out", value="DIR", help="the run's folder; default runs/<recipe>-<method>-<n>"),
        Option(name="resume", value="DIR", help="go on with the run in DIR; --steps may be larger than before"),
        Option(name="elastic", help="go on with the run in --out if it holds this one, else start it there"),
        Option(name="init_from", value="DIR", help="start from the merged weights of another run"),
        Option(name="init_adapter", value="DIR", help="train an adapter further: PEFT's folder, or one of export"),
        Option(name="dry_run", help="check the run and print what it would take in memory; nothing is read or written"),
        changed,
        quiet,
    )
    planned = (
        Option(name="methods", value="A,B,…", help="methods side by side, with the largest batch for usual cards"),
        Option(name="fit", value="SIZE", help="find what fits: 24GB, 24GiB, or 24 for a card sold as that"),
        Option(name="out", value="FILE", help="the picture of --methods (PNG), or the run.json of --fit"),
        Option(name="calibrate", help="first measure this machine (a minute); plans then say seconds as well"),
        Option(name="layers", help="also every parameter: its shape, who trains it, and why"),
    )
    linked = (
        Option(name="ranks", value="N", group="Ranks", help="as if on so many processes: what one of them takes"),
        Option(name="link", value="SPEED", group="Ranks", help="100Mbit, 1Gbit, 10GB/s, …: of each rank, either way"),
        Option(name="latency", value="TIME", group="Ranks", help="until a message has arrived: 1ms, 50us; default 0"),
        Option(name="step_seconds", value="TIME", group="Ranks", help="what a rank computes; default: measured here"),
    )
    several = (
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
        changed,
        quiet,
    )
    exported = (
        Option(name="checkpoint", value="best|latest", help="which of the run's checkpoints; default best"),
        Option(name="adapter", value="OUT", help="write the adapter alone, into this folder"),
        Option(name="format", value="NAME", help="of an adapter lowrank or peft; of a model nanogpt (ckpt.pt)"),
        Option(name="rank", value="N", help="for PEFT: what changed in the weights, as a LoRA of this rank"),
        Option(name="energy", value="X", help="or of the ranks that keep this share of it, such as 0.9"),
        Option(name="base", value="DIR|NAME", help="of an adapter's folder: where its base is; default where it says"),
    )
    patience = (Option(name="seconds", value="S", help="how long its first step may take; default 60"),)
    written = (
        Option(
            name="out", value="NAME.html|DIR", help="one page, or a folder; default DIR if it has runs, else report"
        ),
        Option(name="watch", help="write the page anew as runs grow, unfinished ones included, until interrupted"),
    )
    score, generate, chat, predict, prepare = (options_of(commands.signature(name)) for name in commands.FUNCTIONS)
    return [
        _command(_TRAIN, commands.train, (*training, *run), dotted, (0, 1)),
        _command(
            _COMPARE, commands.compare, (*several, *(option for option in run if option.name != "method")), dotted
        ),
        _command(_REPORT, reporting.report, written, positions=(1, None)),
        _command(_PLAN, planning.plan, (*planned, *linked, *run), dotted, (0, 1)),
        _command(_DOCTOR, commands.doctor, patience, positions=(1, None)),
        _command(_EVAL, commands.evaluate, (*score, trust)),
        _command(_GENERATE, commands.generate, (*generate, trust)),
        _command(_CHAT, commands.chat, (*chat, trust)),
        _command(_EXPORT, commands.export, (*exported, trust), positions=(1, 2)),
        _command(_PREDICT, commands.predict, (*predict, trust), positions=(1, None)),
        _command(_DATA, commands.data, prepare, positions=(1, 2)),
        _command(_METHODS, commands.methods, positions=(0, 1)),
        _command(_RECIPES, commands.recipes, positions=(0, 1)),
    ]


def _command(
    text: str,
    call: Callable[[Parsed], int],
    options: Sequence[Option] = (),
    prefixes: Sequence[str] = (),
    positions: tuple[int, int | None] = (1, 1),
) -> Command:
    """A command whose text begins with its usage and its summary, a line each."""
    usage, summary, about = text.strip().split("\n", 2)
    told = {"usage": usage, "summary": summary, "about": about}
    return Command(**told, call=call, options=options, prefixes=prefixes, positions=positions)


def run_options() -> tuple[Option, ...]:
    """The settings of a run as options, grouped for the reader."""
    kinds = options()
    settings = [
        Option(name=each.name, value=placeholder(kinds[each.name]), help=each.metadata["help"], group=group)
        for each in fields(Run)
        if (group := each.metadata.get("group"))
    ]
    return (*_WHAT, *settings)
