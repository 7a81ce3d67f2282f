"""Runs, checkpoints and adapters that somebody has edited, cut, emptied or taken apart."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.hostile.world import Row, World

from lowrank.infra.checkpoint_files import measure

RESUME, LAST = "train --resume text --steps 6 --quiet", "text/checkpoints/step-00000004"
PREDICT = "predict --adapter adapter --base {images} x.png"
Given = Callable[[World], None]


def put(file: str, content: str | bytes | None) -> Given:
    """A copy of what ``file`` belongs to, the file replaced, or gone."""

    def given(world: World) -> None:
        world.copy(file.split("/")[0])
        shutil.copy(world.image(), "x.png")
        path = Path(file)
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return given


def edit(file: str, *keys: str, to: Any) -> Given:
    """A copy with one value of a JSON file changed; a checkpoint's manifest says so."""

    def given(world: World) -> None:
        world.copy(file.split("/")[0])
        shutil.copy(world.image(), "x.png")
        path = Path(file)
        content = json.loads(path.read_text())
        at = content
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = to
        path.write_text(json.dumps(content))
        if path.name == "state.json":
            vouch_for(path.parent)

    return given


def change(file: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Given:
    """A copy with the tensors of a file, or of that file in all checkpoints, changed."""

    def given(world: World) -> None:
        world.copy(file.split("/")[0])
        shutil.copy(world.image(), "x.png")
        for path in Path().glob(file):
            save_file({name: how(t) for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
            if (path.parent / "manifest.json").is_file():
                vouch_for(path.parent)

    return given


def vouch_for(folder: Path) -> None:
    """Have a checkpoint's manifest say what its files are now."""
    content = json.loads((folder / "manifest.json").read_text())
    content["files"] = {name: measure(folder / name) for name in content["files"]}
    (folder / "manifest.json").write_text(json.dumps(content))


def nan(t: torch.Tensor) -> torch.Tensor:
    return t * float("nan") if t.is_floating_point() else t


def row(name: str, words: str, given: Given | None, *says: str, **rest: Any) -> Row:
    return Row(name=name, words=words, given=given, says=says, **rest)


RUN_JSON = "text/run.json"
MODELS = "text/checkpoints/*/model.safetensors"
COMMANDS = {
    "resume": RESUME,
    "eval": "eval text --checkpoint latest",
    "generate": f"generate {LAST} --tokens 3",
    "export": "export text e --checkpoint latest",
    "init": "train gpt-mini --data {text_txt} {tiny} --init-from text --out o",
}
BROKEN = {"empty": b"", "half": b'{"recipe": "gpt', "a list": b"[]", "no text": b"\xff\xfe\0"}

RUNS = [
    *(
        row(f"{name} of a run.json that is {what}", words, put("text/run.json", content), "text/run.json")
        for name, words in COMMANDS.items()
        for what, content in BROKEN.items()
    ),
    *(row(f"{name} without run.json", words, put("text/run.json", None), "run") for name, words in COMMANDS.items()),
    row("steps of letters", RESUME, edit(RUN_JSON, "steps", to="x"), "text/run.json: steps x", "whole number"),
    row("steps of infinity", RESUME, edit(RUN_JSON, "steps", to=1e999), "steps inf"),
    row("a rate of NaN", RESUME, edit(RUN_JSON, "lr", to="nan"), "text/run.json: lr nan"),
    row("a model that is none", "eval text", edit(RUN_JSON, "model", "name", to="nix"), "'nix'", "gpt2"),
    row("a model that is a number", "eval text", edit(RUN_JSON, "model", "name", to=5), "text/run.json", "5"),
    row(
        "a width of letters",
        "eval text",
        edit(RUN_JSON, "model", "args", "n_embd", to="x"),
        "text/run.json",
        "x",
    ),
    row("a width that does not divide", "eval text", edit(RUN_JSON, "model", "args", "n_embd", to=17), "17"),
    row("a width of no heads", "eval text", edit(RUN_JSON, "model", "args", "n_embd", to=32), "edited?"),
    row(
        "an argument that is none",
        "eval text",
        edit(RUN_JSON, "model", "args", "zz", to=1),
        "text/run.json",
        "zz",
    ),
    row("a longer context", RESUME, edit(RUN_JSON, "data", "args", "context", to=32), "step-00000004 is not of"),
    row(
        "a file to execute",
        "eval text",
        edit(RUN_JSON, "method", "name", to="/x.py:f"),
        "/x.py",
        "--trust-files",
    ),
    row("another task", "eval text", edit(RUN_JSON, "task", to="images"), "text/run.json", "for text"),
    row("a task that is none", "generate text", edit(RUN_JSON, "task", to=None), "task None: expected text"),
    row("a seed beyond 64 bits", "eval text", edit(RUN_JSON, "seed", to=2**70), "text/run.json", "below 2^63"),
    row("a device that is none", "eval text", edit(RUN_JSON, "device", to="tpu"), "device tpu"),
    row("a precision that is none", RESUME, edit(RUN_JSON, "precision", to="fp4"), "precision fp4"),
    row("a setting that is none", "eval text", edit(RUN_JSON, "nonsense", to=5), "a run has no 'nonsense'"),
    row("data that are gone", RESUME, edit(RUN_JSON, "data", "args", "source", to="x.txt"), "'x.txt'"),
    row("no tokenizer any more", "generate text", put("text/tokenizer/lowrank_tokenizer.json", "[]"), status=0),
    *(
        row(
            f"report on a summary that is {what}", "report text", put("text/summary.json", content), "text/summary.json"
        )
        for what, content in {**BROKEN, "of NaN": b'{"steps": NaN}', "of letters": b'{"steps": "4"}'}.items()
    ),
    *(
        row(f"{name} a log that is {what}", words, put("text/log.jsonl", content), "text/log.jsonl", writes=writes)
        for name, words, writes in (
            ("resume", RESUME, ("text/run.json", "text/env.json")),
            ("report", "report text", ()),
        )
        for what, content in {
            "lists": "[]\n[]\n",
            "without steps": '{"loss": 3}\n{"loss": 3}\n',
            "no text": b"\xff\xff\n{}\n",
            "of letters": '{"step": "1"}\n{"step": "2"}\n',
        }.items()
    ),
]

CHECKPOINTS = [
    *(
        row(f"{name} of {file} {what}", words, put(f"{LAST}/{file}", content), LAST, file)
        for name, words in COMMANDS.items()
        for file in ("model.safetensors", "optimizer.safetensors", "state.json")
        for what, content in {"emptied": b"", "cut": b"\x80\0\0\0\0\0\0\0{", "gone": None}.items()
    ),
    *(
        row(f"{name} of a manifest {what}", words, put(f"{LAST}/manifest.json", content), LAST, "manifest.json")
        for name, words in {**COMMANDS, "eval the best": "eval text"}.items()
        for what, content in {"emptied": b"", "gone": None}.items()
    ),
    *(
        row(f"{name} of {what}", words, edit(f"{LAST}/state.json", key, to=value), LAST, *says)
        for name, words in COMMANDS.items()
        for what, key, value, says in (
            ("a later format", "format", 99, ("format 99", "use the version that wrote it")),
            ("a format of letters", "format", "x", ("damaged", "'x'")),
            ("a step of letters", "step", "x", ("state.json",)),
            ("no tree", "tree", {}, ("state.json",)),
            ("notes that are none", "model", 5, ("state.json",)),
        )
    ),
    *(
        row(f"{name} without checkpoints", words, put("text/checkpoints", None), "text/checkpoints")
        for name, words in COMMANDS.items()
    ),
    row("the best is gone", "eval text", put(LAST, None), f"{LAST}, which was the best, is gone", status=0),
    row("the folder of checkpoints", "eval {text}/checkpoints", None, status=0, shows=("perplexity",)),
    row("resume NaN", RESUME, change(MODELS, nan), "nan", "step", writes=("text/*",)),
    row("eval NaN", "eval text", change(MODELS, nan), "text", "nan", "diverged"),
    row("generate NaN", "generate text", change(MODELS, nan), "not finite", "diverged"),
    row(
        "predict NaN",
        "predict --base images x.png",
        change("images/checkpoints/*/model.safetensors", nan),
        "not finite",
    ),
    row(
        "a manifest that leads outside",
        "eval text --checkpoint latest",
        edit(f"{LAST}/manifest.json", "files", "../../run.json", to={"bytes": 1, "crc32": 1}),
        LAST,
        "run.json has",
    ),
]

INFO = "adapter/adapter.json"
ADAPTERS = [
    *(
        row(f"a description that is {what}", PREDICT, put(INFO, content), "adapter.json")
        for what, content in {**BROKEN, "gone": None}.items()
    ),
    *(
        row(f"tensors that are {what}", PREDICT, put("adapter/adapter.safetensors", content), "adapter.safetensors")
        for what, content in {**BROKEN, "gone": None}.items()
    ),
    row("a later format of adapters", PREDICT, edit(INFO, "format", to=99), "format 99"),
    row("a method that is none", PREDICT, edit(INFO, "method", "name", to="nix"), "'nix'"),
    row("a method with a strange argument", PREDICT, edit(INFO, "method", "args", to={"zz": 1}), "zz"),
    row("a rank of letters", PREDICT, edit(INFO, "method", "args", "rank", to="x"), "rank='x'"),
    row("another rank", PREDICT, edit(INFO, "method", "args", "rank", to=3), "does not fit the base at blocks.0"),
    row("no classes", PREDICT, edit(INFO, "classes", to=[]), "adapter.json"),
    row("fewer classes", PREDICT, edit(INFO, "classes", to=["a"]), "only the class a"),
    row("a class twice", PREDICT, edit(INFO, "classes", to=["a", "a"]), "told apart", "a, a"),
    row("classes that are a number", PREDICT, edit(INFO, "classes", to=5), "classes", "5"),
    row("a size of letters", PREDICT, edit(INFO, "reading", "size", to="x"), "adapter.json"),
    row("a size of nothing", PREDICT, edit(INFO, "reading", "size", to=0), "size=0 must be at least 1"),
    row("a size of a million", PREDICT, edit(INFO, "reading", "size", to=10**6), "at most 16384"),
    row("a window of a number", PREDICT, edit(INFO, "reading", "window", to=5), "adapter.json"),
    row("no specification", PREDICT, edit(INFO, "spec", to=5), "spec", "5"),
    row("one mean", PREDICT, edit(INFO, "spec", "mean", to=[0]), "three channels"),
    row("deviations of nothing", PREDICT, edit(INFO, "spec", "std", to=[0, 0, 0]), "deviations above 0"),
    row("another base", PREDICT, edit(INFO, "base", to={"head.bias": "0"}), "another base", "head.bias"),
    row("a base of a number", PREDICT, edit(INFO, "base", to=5), "base", "5"),
    row("a kind that is none", PREDICT, edit(INFO, "kind", to="x"), "'x'", "multi-class"),
    row("an adapter for text", PREDICT, edit(INFO, "task", to="text"), "another task"),
    row("a seed of letters", PREDICT, edit(INFO, "seed", to="x"), "seed 'x'"),
    row("an adapter of NaN", PREDICT, change("adapter/adapter.safetensors", nan), "not finite"),
    row("an adapter of integers", PREDICT, change("adapter/adapter.safetensors", torch.Tensor.int), "damaged", "int32"),
    row(
        "an adapter of one row",
        PREDICT,
        change("adapter/adapter.safetensors", lambda t: t[:1] if t.dim() else t),
        "adapter",
    ),
    row(
        "an adapter in float64",
        PREDICT,
        change("adapter/adapter.safetensors", lambda t: t.double() if t.is_floating_point() else t),
        status=0,
        shows=("x.png: ",),
    ),
    row("a base on text", "predict --adapter adapter --base {text} x.png", edit(INFO, "seed", to=1), "run on text"),
    row("a base that is not", "predict --adapter adapter --base ./nix x.png", edit(INFO, "seed", to=1), "./nix"),
    row("a run for an adapter", "predict --adapter {images} --base {images} {images}", None, "lowrank export"),
    row("a file for an adapter", "predict --adapter x.png x.png", put(INFO, ""), "x.png is no adapter's folder"),
]
ROWS = [*RUNS, *CHECKPOINTS, *ADAPTERS]
