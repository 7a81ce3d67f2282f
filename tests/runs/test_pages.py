"""Every command and every Python block of README and docs/ is run: page by page, in order, in one folder a page.

Commands by the command line's ``main`` in this process, ``torchrun`` as a fork for each rank of all its nodes.
Two things differ from a reader's machine: runs are tiny (:func:`tiny`), and what a reader brings is made (``BROUGHT``).
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import chats, models
from tests.hostile.world import working_in
from tests.images import class_folders, medmnist_file
from tests.pages import DOCS, ROOT, SHELL, blocks, commands
from tests.units.test_adapter_files import lora_vit_file, trained
from tests.units.test_medical_files import series

import lowrank
from lowrank.cli import app
from lowrank.cli.arguments import parse
from lowrank.distributed.process_group import joined
from lowrank.interop import write_adapter
from lowrank.methods import METHODS
from lowrank.recipes import RECIPES, find
from lowrank.recipes.experiments import EXPERIMENTS
from lowrank.run.overrides import options as run_options
from lowrank.run.overrides import override, resolve

# What is not run, and why; each must still be on a page.
NOT_RUN = {
    r"pip install": "installs",
    r"make (demo|test|gpu)": "installs, then runs what has tests of its own",
    r"python examples/\w+\.py": "run by tests/runs/test_examples.py",
    r"PYTHONPATH=src python -m benchmarks\.gpu": "for a GPU; its dry run by tests/units/test_gpu_benchmark.py",
    r"python -c .*TCPStore": "waits for ever",
    r"lowrank plan.* --calibrate": "measures for a minute; tests/units/test_duration.py does, by a clock of its own",
}

# --- what makes a command tiny ---------------------------------------------------------------------------------------

_TEXT = {"model.n_layer": "1", "model.n_head": "2", "data.context": "16"}
_VIT = {"model.width": "16", "model.depth": "1", "model.heads": "2"}
LEAST: Mapping[str, Mapping[str, str]] = {
    "gpt2": {**_TEXT, "model.n_embd": "16", "model.vocab_size": "300"},
    "llama": {**_TEXT, "model.size": "none", "model.hidden": "16", "model.feed_forward": "24"},
    "pretrained": {"data.context": "64"},
    "vit-mini": {**_VIT, "model.patch_size": "14"},
    "vit": _VIT,
    "vit-3d": _VIT,
    "vit-segment": {
        "model.name": "vit_tiny_patch16_224",
        "model.image_size": "32",
        "model.hidden": "16",
        "model.depths": "1",
    },
    "vit-mini-segment": {**_VIT, "model.patch_size": "24", "model.hidden": "16", "model.depths": "1"},
}
SHORT = {"eval": {"batches": "1"}, "generate": {"tokens": "3"}, "chat": {"tokens": "3"}}
TUNED = {**LEAST["llama"], "trials": "1", "seeds": "1", "steps": "4", "eval_every": "2", "data": "articles.csv"}
OF_THE_HUB = {
    "gpt2": ("data.tokenizer", "bytes"),
    "cnn_dailymail": ("data", "articles.csv"),
    "hub": ("model.weights", "none"),
}


def tiny(words: Sequence[str]) -> list[str]:
    """A command with other options: the least model, a hundredth of its steps, one seed, nothing of the hub."""
    name, *rest = words
    parsed = parse(rest, KNOWN[name])
    options, what = dict(parsed.options), next(iter(parsed.positions), "")
    planned = name == "plan" and not {"methods", "fit"} & options.keys()  # which is fast at any size
    if what in EXPERIMENTS:
        options |= TUNED
    elif name in ("train", "compare", "plan") and what in RECIPES and not planned:
        settings = (*run_options(), "model", "method", "data", "task", "epochs")
        run = resolve(override(find(what), {n: v for n, v in options.items() if n in settings or "." in n}))
        options = {**LEAST[run.model.name], **options}
        options |= dict(OF_THE_HUB[v] for v in (*run.data.args.values(), *run.model.args.values()) if v in OF_THE_HUB)
        methods = options.get("methods", run.method.name).split(",")
        known = {each for method in methods for each in METHODS.signature(method.partition(":")[0]).defaults}
        options |= {"method.rank": str(min(8, int(options.get("method.rank", 4))))} if "rank" in known else {}
        if name != "plan":
            options |= {"method.merge_every": "1"} if "merge_every" in known else {}
            options |= {"steps": str(max(2, run.steps // 100))} if run.steps else {"epochs": "1"}
            options |= {"epochs": "0.1"} if run.data.args.get("source") in ("digits", "mni152") else {}
            options |= {each: value for each, value in (("seeds", "1"), ("folds", "2")) if each in options}
    elif "resume" in options:
        options["steps"] = str(int(options["steps"]) // 100)
    options |= SHORT.get(name, {})
    return [name, *parsed.positions, *(f"--{n.replace('_', '-')}={value}" for n, value in options.items())]


KNOWN = {command.name: command for command in app.COMMANDS}

# --- what a reader brings --------------------------------------------------------------------------------------------


def made(*words: str) -> Callable[[Path], None]:
    """What a command writes, the place being its last word."""
    return lambda place: lowrank_(*words, str(place))


def scan(path: Path) -> None:
    import nibabel
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


def scans(folder: Path) -> None:
    for place in (f"{split}/{name}" for split in ("train", "val", "test") for name in ("ill", "well")):
        scan(folder / place / "a.nii.gz")
        scan(folder / place / "b.nii.gz")


def masked(table: Path) -> None:
    """A table of images with masks of two classes, two of each split."""
    import numpy as np
    from PIL import Image

    rows = ["image,mask,patient,split"]
    for i, split in enumerate(("train", "train", "val", "val", "test", "test")):
        labels = np.kron(np.eye(4, dtype=np.uint8) + i % 2 * np.eye(4, dtype=np.uint8)[::-1], np.ones((8, 8))) > 0
        for kind, values in (("image", labels * 200), ("mask", labels * 1)):
            Image.fromarray(values.astype(np.uint8)).save(table.parent / f"{kind}-{i}.png")
        rows.append(f"image-{i}.png,mask-{i}.png,patient-{i},{split}")
    table.write_text("\n".join(rows))


def new(folder: Path) -> None:
    class_folders(folder, per_class=1)
    for picture in folder.glob("*/*.png"):
        picture.rename(folder / picture.name)
    series(folder / "series-1")
    scan(folder / "scan.nii.gz")


def nanogpt(file: Path) -> None:
    lowrank_("train", "gpt-mini", "--data.context", "64", "--out", "runs/theirs")
    lowrank_("export", "runs/theirs", "theirs", "--format", "nanogpt")
    Path("theirs", "ckpt.pt").rename(file)


def vit_small(file: Path) -> None:
    import timm
    from safetensors.torch import save_file

    shape = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 64}
    save_file(timm.create_model("vit_small_patch16_224", **shape).state_dict(), file)


def adapter_of_vit(folder: Path) -> None:
    write_adapter(folder, *trained("lora", seed=1)[:2])


def text(content: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(content)


ROWS = [f"The {n}th line of a text that is long enough." for n in range(300)]
ARTICLES = text("\n".join(["article,highlights", *(f'"{row} It says so.","{n}"' for n, row in enumerate(ROWS))]))
SFT = ("train", "finetune", "--model.path", "MODEL", "--data", "pairs.jsonl")
SCRIPT = """
import torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(2):
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
BROUGHT: Mapping[str, Callable[[Path], Any]] = {
    "MODEL": chats.saved,
    "pairs.jsonl": text("".join(f'{{"prompt": "What is {n}?", "completion": "It is {n}."}}\n' for n in range(40))),
    "articles.csv": ARTICLES,
    "here.csv": ARTICLES,
    "there.csv": ARTICLES,
    "articles.txt": text("\n".join(ROWS)),
    "shakespeare.txt": text("\n".join(ROWS)),
    "pneumoniamnist.npz": medmnist_file,
    "organmnist3d.npz": lambda file: medmnist_file(file, classes=11, slices=28),
    "images": class_folders,
    "image.png": lambda file: class_folders(file.parent, per_class=1).joinpath("ill/patient00_0.png").rename(file),
    "new": new,
    "scans": scans,
    "scans.csv": masked,
    "scan.nii.gz": scan,
    "slice.nii.gz": scan,
    "photos": lambda folder: class_folders(folder, per_class=1),
    "vit_small.safetensors": vit_small,
    "lora-vit.safetensors": lora_vit_file,
    "ckpt.pt": nanogpt,
    "train.py": text(SCRIPT),
    "examples": lambda folder: folder.symlink_to(ROOT / "examples"),
    "runs/lte": made("train", "gpt-mini", "--method", "lte", "--out"),
    "runs/pairs": made(*SFT, "--method", "full", "--out"),
    "runs/sft": made(*SFT, "--out"),
    "runs/dora": made(*SFT, "--method", "dora", "--out"),
    "adapters/mine": made("export", "runs/sft", "--format", "peft", "--adapter"),
    "adapters/pneumonia": adapter_of_vit,
    "adapters/skin": adapter_of_vit,
}
WRITES = ("--out", "--adapter")


def bring(words: Sequence[str]) -> None:
    """Make what the words name, unless it is there or is what they write."""
    for before, word in zip(["", *words], words, strict=False):
        for name, make in BROUGHT.items():
            if (word == name or word.startswith(f"{name}/")) and before not in WRITES and not Path(name).exists():
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                make(Path(name).resolve())


# --- running them ----------------------------------------------------------------------------------------------------


def lowrank_(*words: str, status: int = 0) -> str:
    """Run a command of a page, tiny; what it prints."""
    bring(words)
    found = [path for word in words for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    words = tuple(tiny(found))
    bring([word.partition("=")[2] for word in words if word.startswith(("--data=", "--model.path="))])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert app.main(words) == status, words
    return said.getvalue()


RANKS = multiprocessing.get_context("forkserver")  # since a process that has run autograd cannot be forked
RANKS.set_forkserver_preload(
    [
        *("tests.runs.test_pages", "lowrank.train.loop", "lowrank.evaluate.text_task", "lowrank.models.text"),
        *("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"),
        *(f"torch.distributed.{module}" for module in ("checkpoint", "device_mesh", "fsdp")),
    ]
)


def a_rank(settings: Mapping[str, str], do: Callable[..., object], *what: Any) -> None:
    """What one process of ``torchrun`` does."""
    torch.set_num_threads(1)
    os.environ.update(settings)
    do(*what)


def on_ranks(each: int, nodes: Sequence[tuple[Any, ...]]) -> None:
    """What ``torchrun`` does on these nodes, here: in ``each`` forks a node, call its function with its arguments."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "LOCAL_WORLD_SIZE": each}
    group |= {"WORLD_SIZE": len(nodes) * each, "GROUP_WORLD_SIZE": len(nodes)}
    started = []
    for rank in range(len(nodes) * each):
        own = {"RANK": rank, "LOCAL_RANK": rank % each, "GROUP_RANK": rank // each}
        settings = {**os.environ, **{name: str(value) for name, value in (group | own).items()}}
        started.append(RANKS.Process(target=a_rank, args=(settings, *nodes[rank // each])))
        started[-1].start()
    for process in started:
        process.join(200)
        process.kill()
    assert [process.exitcode for process in started] == [0] * len(started)


def torchrun(lines: Sequence[str]) -> None:
    """Lines of torchrun, one for each node; of several nodes each has two ranks at most."""
    nodes = [shlex.split(line.partition("-m lowrank ")[2], comments=True) for line in lines]
    for words in nodes:
        bring([*words, "articles.csv"])
    ranks = int(launcher(lines[0])["--nproc-per-node"])
    on_ranks(min(ranks, 2) if len(lines) > 1 else ranks, [(lowrank_, *words) for words in nodes])


def launcher(line: str) -> dict[str, str]:
    """The options of torchrun itself."""
    words = shlex.split(line.partition("-m lowrank ")[0])[1:]
    return dict(zip(words[::2], words[1::2], strict=True))


class Loss(SimpleNamespace):
    """A loss of a model as it is when its gradient is asked for."""

    def backward(self) -> None:
        models.text_loss(self.model, models.tokens()).backward()


def given(page: str) -> dict[str, Any]:
    """What the blocks of a page speak of and do not make."""
    model = models.gpt2(width=32)
    known: dict[str, Any] = {"torch": torch, "lowrank": lowrank, "model": model, "loss": Loss(model=model)}
    if page == "README":
        return known | {"loss": models.text_loss, "batches": [models.tokens(), models.tokens(seed=1)]}
    if page == "distributed":
        return known | {"method": lowrank.methods.lte(rank=2, heads=2, merge_every=1)}
    if page == "gpu":
        return known | {"plan": lowrank.apply_(model, models.small_method("galore"))}
    if page == "vision":
        return known | {"model": models.vit(), "images": models.images()}
    if page == "loops":
        from transformers import Trainer, TrainingArguments

        args = TrainingArguments(output_dir="out", report_to=[], use_cpu=True)
        return known | {"Trainer": Trainer, "args": args, "rows": [{"input_ids": [1, 2]}]}
    return known


def python(page: str, block: str) -> None:
    """A block of Python; of the page on ranks on two of them."""
    bring(re.findall(r'"([^"\n]+)"', block))
    on_ranks(2, [(execute, page, block, "joined(" not in block)]) if page == "distributed" else execute(page, block)


def execute(page: str, block: str, join: bool = False) -> None:
    with joined(torch.device("cpu")) if join else contextlib.nullcontext() as ranks:
        exec(compile(block, page, "exec"), given(page) | {"ranks": ranks})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 7?\n"))
    nodes: list[str] = []
    with working_in(tmp_path):
        for kind, block in blocks(page):
            if kind == "python":
                python(page.stem, block)
            for line, shown in commands(block) if kind in SHELL else ():
                if any(re.match(pattern, line) for pattern in NOT_RUN):
                    continue
                if found := re.fullmatch(r"export (\w+)=(\S+)", line):
                    monkeypatch.setenv(found[1], found[2])
                elif line.startswith("torchrun "):
                    nodes.append(line)
                    if len(nodes) == int(launcher(line).get("--nnodes", "1").partition(":")[0]):
                        torchrun(nodes)
                        nodes = []
                else:
                    called, *words = shlex.split(line, comments=True)
                    assert called == "lowrank", f"{line}: neither run, nor said why not"
                    said = lowrank_(*words, status=int("fault:" in "".join(shown)))
                    assert set(shown) <= {*said.splitlines(), "…"}, line
    assert not nodes, "a node is missing"


def test_what_is_not_run_is_still_on_a_page() -> None:
    lines = [line for page in DOCS for kind, text in blocks(page) if kind in SHELL for line, _ in commands(text)]
    assert all(any(re.match(pattern, line) for line in lines) for pattern in NOT_RUN)
    assert len(lines) > 90
