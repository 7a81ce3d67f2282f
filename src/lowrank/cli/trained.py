"""The commands for what is trained already: ``eval``, ``generate``, ``chat``, ``export`` and ``predict``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank.cli.arguments import (
    Option,
    Parsed,
    UsageError,
    arguments,
    command,
    filled,
    number,
    options_of,
    signature,
    whole,
)
from lowrank.cli.run_options import TRUST
from lowrank.infra.convert import nearest
from lowrank.infra.progress import short_bytes
from lowrank.infra.text import printable

_EXPORTED = (
    Option(name="checkpoint", value="best|latest", help="which of the run's checkpoints; default best"),
    Option(name="adapter", value="OUT", help="write the adapter alone, into this folder"),
    Option(name="format", value="NAME", help="of an adapter lowrank or peft; of a model nanogpt (ckpt.pt)"),
    Option(name="rank", value="N", help="for PEFT: what changed in the weights, as a LoRA of this rank"),
    Option(name="energy", value="X", help="or of the ranks that keep this share of it, such as 0.9"),
    Option(name="base", value="DIR|NAME", help="of an adapter's folder: where its base is; default where it says"),
)


@command((*options_of(signature("score")), TRUST))
def evaluate(parsed: Parsed) -> int:
    """eval RUN|MODEL [options]
    loss and perplexity on any split

    Scores every token of a split exactly once, on the merged weights. MODEL is a folder of transformers' format or a
    name on the hub that was never trained here, or the folder of an adapter, PEFT's or of lowrank export.

    Examples:
      lowrank eval runs/articles
      lowrank eval runs/articles --data other.txt --split train --checkpoint latest
      lowrank eval gpt2 --data articles.csv --context 512
      lowrank eval adapters/sft --data articles.csv --base models/gpt2
    """
    options = arguments("score", parsed.options)
    from lowrank.evaluate.score import score

    print(_aligned(score(_existing(parsed.positions[0]), **options)))
    return 0


@command((*options_of(signature("generate")), TRUST))
def generate(parsed: Parsed) -> int:
    """generate RUN|MODEL --prompt TEXT [options]
    text from a run or a model

    Continues a prompt with a run's best checkpoint, a certain checkpoint, a model of transformers, or an adapter's
    folder, PEFT's or of lowrank export, on the base that it names (--base says where it is).

    Examples:
      lowrank generate runs/articles --prompt "The president said" --tokens 100
      lowrank generate runs/articles/checkpoints/step-00000100 --temperature 0
    """
    options = arguments("generate", parsed.options)
    from lowrank.evaluate.generate import generate as generate_text

    text = generate_text(_existing(parsed.positions[0]), **options)
    print(printable(text) if sys.stdout.isatty() else text)
    return 0


@command((*options_of(signature("chat")), TRUST))
def chat(parsed: Parsed) -> int:
    """chat RUN|MODEL [options]
    a conversation with a run or a model

    Answers what is typed, a line each, through the chat template of the model's tokenizer, with all that has been said
    before. Ends where the input ends (Ctrl-D).

    Examples:
      lowrank chat runs/sft
      echo "What is a tensor?" | lowrank chat runs/sft --temperature 0
    """
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


@command((*_EXPORTED, TRUST), positions=(1, 2))
def export(parsed: Parsed) -> int:
    """export RUN|ADAPTER OUT, or export RUN --adapter OUT [options]
    a plain model from a run or an adapter; or a run's adapter alone

    Merges the adapters of a run into its weights and writes a plain model. One of transformers gets config.json,
    model.safetensors and all of its tokenizer (characters and bytes too), which transformers loads, and so do lowrank
    eval, generate and train gpt2-finetune --model.path OUT. A vision transformer of timm gets what timm.create_model
    opens by local-dir:OUT, and lowrank train by --model.weights OUT. With --format nanogpt a GPT-2 becomes nanoGPT's
    ckpt.pt, which eval, generate and --model.path read as well. Of an adapter's folder, PEFT's or ours, on a language
    model, it writes the base with the adapter merged. A quantised base is written as its codes say it.

    With --adapter OUT it writes instead what was trained and nothing of the base: adapter and head, for lowrank predict
    and lowrank.interop.AdapterBank; with --format peft in the format of PEFT, whose PeftModel.from_pretrained opens it.
    Methods that train or merge into the weights (full, galore, lte, relora, …) have no adapter apart: with --rank or
    --energy the difference to the base is written as a LoRA, the base being what it was when the run began.

    Examples:
      lowrank export runs/articles exported
      lowrank export runs/vit --adapter adapters/pneumonia
      lowrank export runs/sft --adapter adapters/sft --format peft
      lowrank export runs/pairs --adapter adapters/pairs --format peft --energy 0.9
    """
    from lowrank.evaluate.export import export as export_run
    from lowrank.evaluate.export import export_nanogpt, export_with_base
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


@command((*options_of(signature("predict")), TRUST), positions=(1, None))
def predict(parsed: Parsed) -> int:
    """predict RUN IMAGE…, or predict --adapter DIR IMAGE… [options]
    what image files show

    Says which class image files show, or draws their masks into a new folder, by a run, or by an adapter on its base.
    The adapter names the base that it was trained on; --base says where that is: a run's folder, a file of weights, a
    timm name or hub. A mask has its file's size; a NIfTI file gets one in its own array and affine, others a PNG of
    class numbers.

    Examples:
      lowrank predict --base runs/vit --adapter adapters/pneumonia new/*.png
      lowrank predict runs/digits scans --out predictions.csv
      lowrank predict runs/tissue scan.nii.gz --out masks
    """
    options, images = arguments("predict", parsed.options), list(parsed.positions)
    if not {"base", "adapter"} & options.keys() and len(images) > 1 and (Path(images[0]) / "run.json").is_file():
        options["base"] = images.pop(0)
    from lowrank.evaluate.predict import predict as predict_images

    for each in predict_images(images, **options):
        print(printable(str(each), keep=""))
    return 0


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


def _aligned(figures: Mapping[str, Any]) -> str:
    width = max(map(len, figures))
    return "\n".join(
        f"{name.ljust(width)}  {f'{value:.6g}' if isinstance(value, float) else value}"
        for name, value in figures.items()
    )
