"""The command line: how it reads, explains itself, refuses, and what it does from end to end on a tiny model."""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest

from lowrank.cli import app as cli
from lowrank.cli import listing
from lowrank.cli.arguments import Command, Option, Parsed, UsageError, options_of, parse
from lowrank.cli.run_options import RUN
from lowrank.infra.signatures import signature_of
from lowrank.recipes import RECIPES
from lowrank.run.overrides import catalogue, options

TINY = [
    "gpt-mini",
    *["--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--data.context", "16"],
    *["--batch-size", "4", "--steps", "6", "--eval-every", "3", "--eval-batches", "2", "--device", "cpu", "--quiet"],
]


@pytest.fixture
def lowrank(capsys, monkeypatch, tmp_path):
    """Runs a command line in a folder of its own; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def a_command(**changes):
    settings = {
        "usage": "do WHAT",
        "summary": "does it",
        "about": "Does it.",
        "options": (Option(name="batch_size", value="N", help="size"), Option(name="per_layer", help="switch")),
        "prefixes": ("method.",),
        "positions": (1, 1),
        "call": lambda parsed: 0,
    }
    return Command(**(settings | changes))


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["x", "--batch-size", "4"], {"batch_size": "4"}),
        (["x", "--batch_size=4"], {"batch_size": "4"}),
        (["--batch-size", "-1", "x"], {"batch_size": "-1"}),
        (["x", "--per-layer"], {"per_layer": "true"}),
        (["--per-layer", "x"], {"per_layer": "true"}),
        (["x", "--per-layer", "false"], {"per_layer": "false"}),
        (["x", "--method.merge-every", "3", "--method.a=b=c"], {"method.merge_every": "3", "method.a": "b=c"}),
        (["--", "x"], {}),
    ],
)
def test_words_are_read(words, found):
    assert parse(words, a_command()) == Parsed(positions=["x"], options=found)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["x", "--batchsize", "4"], r"do has no option --batchsize \(did you mean '--batch-size'\?\)"),
        (["x", "--batch-size"], "--batch-size needs a value"),
        (["x", "--batch-size="], "--batch-size is empty"),
        (["x", "--batch-size", "--per-layer"], "--batch-size needs a value"),
        (["x", "--batch-size", "1", "--batch_size", "2"], "--batch_size is given twice"),
        ([], "something is missing; usage: lowrank do WHAT"),
        (["x", "y"], "unexpected 'y'; usage: lowrank do WHAT"),
        (["x", "--data.source", "y"], "do has no option --data.source"),
    ],
)
def test_unsound_words_are_refused(words, says):
    with pytest.raises(UsageError, match=says):
        parse(words, a_command())


def test_options_come_from_signatures_and_docstrings():
    def function(source: str, *, rank: int = 4, kind: str | None = None, on: bool = False, near: object = None):
        """Something.

        Args:
            source: where from.
            rank: how many,
                at most.
            kind, on: both of these.

        Raises:
            rank: never.
        """

    assert [(o.name, o.value, o.help) for o in options_of(signature_of(function))] == [
        ("rank", "N", "how many, at most"),
        ("kind", "TEXT", "both of these"),
        ("on", "", "both of these"),
    ]


# --- help ------------------------------------------------------------------------------------------------------------


def test_every_setting_of_a_run_has_an_option_in_one_group():
    names = [option.name for option in RUN]
    assert sorted(names) == sorted([*options(), "model", "data", "method", "labels", "trust_files"])


def test_help_in_every_place(lowrank):
    overview = lowrank("--help")[1]
    assert lowrank()[1] == lowrank("help")[1] == overview
    for command in cli.COMMANDS:
        assert f"  {command.name} " in overview
        status, text, _ = lowrank(command.name, "--help")
        assert (status, text.splitlines()[0]) == (0, f"usage: lowrank {command.usage}")
        assert max(map(len, text.splitlines())) <= 80
        assert all(option.help for option in command.options)
        assert all(f"--{option.name.replace('_', '-')}" in text for option in command.options)


def test_examples_in_the_help_are_read_without_error():
    known = {command.name: command for command in cli.COMMANDS}
    lines = [line for command in known.values() for line in command.about.splitlines() if line.startswith("  lowrank ")]
    assert len(lines) > 12
    for line in lines:
        name, *words = shlex.split(line)[1:]
        parse(words, known[name])


HEAVY = ("torch", "numpy", "transformers")
WITHOUT_TORCH = [
    *[[], ["--version"], ["methods"], ["methods", "lte"], ["recipes"], ["recipes", "vit-mini"]],
    *[[command.name, "--help"] for command in cli.COMMANDS],
    *[
        ["trian"],
        ["train", "gptmini"],
        ["recipes", "gptmini"],
        ["methods", "lroa"],
        ["train", "gpt-mini", "--stepz", "3"],
    ],
    *[["train", "gpt-mini", "--method", "ltee"], ["train", "gpt-mini", "--method", "lora", "--method.rnk", "3"]],
    *[["train", "gpt-mini", "--steps", "many"], ["eval", "x", "--batch-size", "y"], ["train", "--resume", "nothing"]],
    *[["train", "gpt-mini", "--data", "x.py:data"], ["compare", "gpt-mini", "--methods", "ltee"]],
]


def test_help_and_refusals_import_no_torch():
    """The modules are counted, not the seconds: torch alone takes more than all of this."""
    code = (
        f"import contextlib, io, sys\nfrom lowrank.cli import main\nfor words in {WITHOUT_TORCH!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        status = main(words)\n"
        f"    print(status, *[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    helps = 6 + len(cli.COMMANDS)
    assert done.stdout.split("\n")[:-1] == ["0"] * helps + ["2"] * (len(WITHOUT_TORCH) - helps), done.stderr


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "lowrank", "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("lowrank ")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_debugging_shows_where_an_error_came_from(lowrank, monkeypatch):
    monkeypatch.setenv("LOWRANK_DEBUG", "1")
    with pytest.raises(ValueError, match="there is no command"):
        lowrank("trian")


def failing(monkeypatch, error):
    def fails(parsed):
        raise error

    monkeypatch.setattr(cli, "COMMANDS", [replace(listing.recipes, call=fails)])


def test_faults_of_our_own_are_a_short_message_and_a_report(lowrank, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    failing(monkeypatch, KeyError("x"))
    status, out, err = lowrank("recipes", "gpt-mini")
    assert (status, out) == (70, "")
    assert err.startswith("lowrank: this should not have happened: KeyError: 'x'\n")
    (report,) = tmp_path.glob("lowrank-error-*.txt")
    assert str(report) in err
    assert "lowrank recipes gpt-mini\n\nTraceback" in report.read_text()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (EOFError("ended before the end-of-stream marker"), "cannot be read (EOFError: ended before"),
        (re.error("missing )"), "cannot be read (error: missing )"),
        (MemoryError(), "out of memory (MemoryError): use a smaller --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory ("),
        (
            RuntimeError("aten.mm got mixed torch.Tensor and DTensor"),
            "reads a weight past its layer, which is in shards",
        ),
    ],
)
def test_what_input_or_the_machine_has_caused_is_an_error_in_words(lowrank, monkeypatch, error, says):
    failing(monkeypatch, error)
    status, _, err = lowrank("recipes")
    assert status == 2
    assert says in err


def test_interruption_has_a_status_of_its_own(lowrank, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    assert lowrank("recipes") == (130, "", "lowrank: interrupted\n")


@pytest.mark.parametrize("redirected", ["", ">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed_or_cannot_write_our_letters_are_no_error(redirected):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = f"{sys.executable} -m lowrank recipes {redirected}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()


@pytest.mark.parametrize("switch", ["-c", "-uc"], ids=["buffered", "unbuffered"])
def test_a_reader_that_leaves_is_no_error(switch):
    code = "import sys; from lowrank.cli.app import main; sys.exit(main(['methods']) or main(['recipes', 'gpt-mini']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, switch, code], stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


# --- catalogues ------------------------------------------------------------------------------------------------------


def test_methods_and_recipes_are_listed_and_shown(lowrank):
    listed = lowrank("methods")[1]
    assert all(any(line.startswith(f"{name} ") for line in listed.splitlines()) for name in catalogue().method)
    one = lowrank("methods", "lora")[1]
    assert "arXiv 2106.09685" in one
    assert "  --method.rank 8" in one
    assert "  --method.target_modules q,v" in one
    listed = lowrank("recipes")[1]
    assert all(any(line.startswith(f"{name} ") for line in listed.splitlines()) for name in RECIPES)
    shown = lowrank("recipes", "gpt-mini")[1]
    assert "Expected:" in shown
    assert json.loads(shown[shown.index("{\n") :])["model"]["args"]["n_embd"] == 128


def test_data_is_listed_and_prepared(lowrank, tmp_path):
    assert "builtin" in lowrank("data", "list")[1]
    (tmp_path / "text.txt").write_text("One line of text.\n" * 200)
    status, out, _ = lowrank("data", "prepare", "text.txt", "--tokenizer", "chars", "--out", "tokens")
    assert status == 0
    assert "chars" in out
    assert (tmp_path / "tokens" / "train.bin").is_file()


def test_plan_needs_no_data_where_the_vocabulary_is_given(lowrank):
    words = [*TINY[:-1], "--data", "c4", "--model.vocab_size", "300", "--method", "lora"]
    status, out, err = lowrank("plan", *words, "--layers")
    assert (status, err) == (0, "")
    assert "method lora" in out
    assert "300 × 16" in out


def test_the_plan_of_gpt2_names_what_trains_and_the_tied_head(lowrank):
    said = lowrank("plan", "gpt2-pretrain", "--method.freeze", "*.attn.*.bias", "--layers")[1]
    assert "96.619 M" in said
    assert "transformer.wte.weight is also lm_head.weight (tied)" in said


# --- end to end ------------------------------------------------------------------------------------------------------


def losses(folder):
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.mark.parametrize("source", ["builtin", "cnn_dailymail_sample.csv"])
def test_a_run_repeated_and_a_run_resumed_are_the_same_run(source, lowrank, tmp_path, request):
    data = source if source == "builtin" else request.getfixturevalue("shared_data") / source
    lte = ["--method", "lte", "--method.rank", "2", "--method.heads", "2", "--method.merge_every", "2", "--data", data]
    status, out, err = lowrank("train", *TINY, *lte, "--out", "a", "--stop-at", "4")
    assert (status, err) == (0, "")
    assert out.startswith("a: step 4: validation loss ")
    assert lowrank("train", "a/run.json", "--out", "b", "--stop-at", "6", "--quiet")[0] == 0
    assert lowrank("train", "--resume", "a", "--quiet")[0] == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert list(losses(tmp_path / "a")) == [1, 2, 3, 4, 5, 6]

    status, out, _ = lowrank("train", "--resume", "a", "--steps", "8", "--quiet")
    assert out.startswith("a: step 8: ")
    assert lowrank("train", "--resume", "a", "--quiet")[0] == 2, "there is nothing left to do"
    status, _, err = lowrank("train", "--resume", "a", "--method.rank", "3", "--steps", "9")
    assert status == 2
    assert "--method.rank (2 -> 3)" in err
    status, _, err = lowrank("train", *TINY, "--out", "a")
    assert status == 2
    assert "go on with it by --resume a" in err


def test_compare_report_eval_export_and_generate(lowrank, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["compare", *TINY, "--methods", "full,lora:rank=2", "--seeds", "1,2", "--out", "all"]
    status, out, err = lowrank(*words)
    assert (status, err) == (0, "")
    assert {"report.html", "report.md", "curves.png"} <= {file.name for file in (tmp_path / "all").iterdir()}
    table = [line.split() for line in out.splitlines() if line.startswith(("full ", "lora "))]
    assert list(dict.fromkeys(line[0] for line in table)) == ["full", "lora"]
    assert lowrank(*words)[1].count("already in") == 4

    assert lowrank("report", "all/full_seed_1", "--out", "one")[0] == 0
    assert (tmp_path / "one" / "report.html").is_file()

    run = tmp_path / "all" / "lora_rank=2_seed_1"
    status, scored, _ = lowrank("eval", run, "--batches", "2")
    assert status == 0
    assert {line.split()[0] for line in scored.splitlines()} >= {"loss", "perplexity", "bits_per_byte", "tokens"}
    assert "is beyond the 16 positions of the model" in lowrank("eval", run, "--context", "4096")[2]
    assert lowrank("export", run, "plain")[0] == 0
    again = lowrank("eval", "plain", "--data", "builtin", "--context", "16", "--batches", "2")[1]
    assert again == scored, "the exported model computes the same function"
    text = lowrank("generate", run, "--prompt", "The", "--tokens", "5", "--temperature", "0")[1]
    assert text.startswith("The")
    assert lowrank("generate", "plain", "--prompt", "The", "--tokens", "5", "--temperature", "0")[1] == text
    status, _, err = lowrank("export", run, "plain")
    assert status == 2
    assert "plain is not empty" in err


def test_a_failed_run_of_a_comparison_shows_in_the_status(lowrank):
    pytest.importorskip("matplotlib")
    words = ["compare", *TINY, "--methods", "full,lora:target_modules=nothing", "--out", "all"]
    status, out, err = lowrank(*words)
    assert status == 1
    assert "failed: lora:target_modules=nothing seed 0: ValueError: target_modules='nothing' matched no linear" in err
    assert any(line.startswith("full ") for line in out.splitlines())


def test_folders_are_numbered_by_default(lowrank, tmp_path):
    for number in (1, 2):
        assert lowrank("train", *TINY, "--stop-at", "1")[1].startswith(f"runs/gpt-mini-full-{number}: step 1")
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_warm_start_takes_the_weights_of_another_run(lowrank, tmp_path):
    lowrank("train", *TINY, "--out", "warm")
    assert lowrank("train", *TINY, "--method", "lora", "--init-from", "warm", "--out", "next")[0] == 0
    assert losses(tmp_path / "next")[1] < losses(tmp_path / "warm")[1]
