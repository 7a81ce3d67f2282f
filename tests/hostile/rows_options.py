"""Options, models and names: numbers out of their range, words that are none, names that steer terminals."""

import shutil
from pathlib import Path
from typing import Any

from tests.hostile.world import TEXT, TINY_TEXT, Row

SHORT = "train gpt-mini --data {text_txt} --device cpu --quiet --out o"


FINETUNE = "train finetune --model.path {plain} --device cpu --quiet --out o --data f.jsonl"
SILENT = '{"messages": [{"role": "user"}, {"role": "assistant", "content": "y"}]}\n' * 40
READING = """
from torch import nn
import torch.nn.functional as F
from lowrank.models.text import gpt2
class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)
    def forward(self, x):
        return COMPUTED
def m(data):
    model = gpt2(data, n_layer=1, n_head=2, n_embd=16)
    model.transformer.h[0].mlp = M()
    return model
"""


def option(words: str, *says: str) -> Row:
    return Row(name=f"train {words}", words=f"{SHORT} {words}", says=says)


def row(words: str, *says: str, **rest: Any) -> Row:
    return Row(name=words, words=words, says=says, **rest)


OPTIONS = [
    option("--seed 18446744073709551616", "--seed", "below 2^63"),
    option("--seed -1", "--seed -1"),
    option("--seed 1.5", "--seed 1.5: expected a whole number"),
    option("--lr 0", "--lr 0 must be above 0"),
    option("--lr inf", "--lr inf: expected a number"),
    option("--lr 1e400", "--lr 1e400: expected a number"),
    option("--weight-decay -1", "--weight-decay -1"),
    option("--warmup 5000", "longer than the run"),
    option("--warmup nan", "--warmup nan"),
    option("--min-lr-ratio 2", "between 0 and 1"),
    option("--batch-size 0", "--batch-size 0: at least 1"),
    option("--batch-size 99999999999", "at most 2147483647"),
    option("--grad-accum 0", "--grad-accum 0"),
    option("--steps 0", "--steps 0: at least 1 step"),
    option("--steps 1e3.5", "--steps 1e3.5"),
    option("--steps ½", "--steps ½"),
    option("--steps 1e30", "at most 2147483647"),
    option("--epochs 0", "--epochs 0 must be above 0"),
    option("--epochs 1e300", "--epochs 1e+300: at most"),
    option("--steps 1 --epochs 1", "leave one out"),
    option("--stop-at 0", "--stop-at 0"),
    option("--keep 0", "--keep 0"),
    option("--eval-batches 0", "--eval-batches 0"),
    option("--log-every 0", "--log-every 0"),
    option("--checkpoint-every -1", "--checkpoint-every -1"),
    option("--precision fp8", "--precision fp8", "did you mean 'fp32'"),
    option("--workers 3", "--engine"),
    option("--engine ddp --workers 0", "--workers 0"),
    option("--max-grad-norm 0", "--max-grad-norm 0", "or none"),
    option("--clip-per-layer nan", "--clip-per-layer nan"),
    option("--schedule x", "--schedule x", "cosine"),
    option("--compile maybe", "unexpected 'maybe'"),
    option("--wandb", "pip install wandb"),
    option("--model gpt3", "'gpt3'", "did you mean 'gpt2'"),
    option("--model nix.py:f", "nix.py"),
    option("--model.n_layer 0", "--model.n_layer 0"),
    row("plan llama-1b --model.n_layer 4", "--model.n_layer is given by --model.size 1b", "say --model.size none"),
    option("--model.n_layer nan", "--model.n_layer nan"),
    option("--model.n_embd 7", "multiple of model.n_head"),
    option("--model.dropout 2", "dropout", "2.0"),
    option("--model.vocab_size 10000000000000", "out of memory", "smaller"),
    option("--method lora --method.rank -1", "rank=-1"),
    option("--method lora --method.alpha nan", "--method.alpha nan"),
    option("--method lora --method.dropout 2", "dropout=2.0"),
    option("--method lora --method.target_modules ,", "names nothing", "all-linear"),
    option("--method lora --method.target_modules '['", "matched no linear layer", "c_attn"),
    option("--method lora --method.exclude_modules nope", "exclude_modules='nope'"),
    option("--method galore --method.rank 0", "rank=0"),
    option("--method galore --method.refresh_every 0", "refresh_every=0"),
    option("--method galore --method.scale nan", "--method.scale nan"),
    option("--method lte --method.heads 0", "heads=0"),
    option("--method lte --method.merge_every 0", "merge_every=0"),
    option("--method lte --method.exchange 3bit", "--method.exchange", "2bit"),
    option("--method lte --method.exchange topk3 --method.keep false", "use keep=True, or exchange='int8'"),
    option("--method lte --method.merge_every 3 --method.fragments 4", "use at most 3 fragments"),
    option("--method lte --method.fragments 2 --method.weigh tokens", "use weigh='equal', or fragments=1"),
    option("--method relora --method.merge_every 5000", "longer than the run"),
    option("--method.rank 4", "method full has no 'rank'"),
    option("--method lora:rank=4", "there is no method 'lora:rank=4'"),
    option("--data.tokenizer ''", "--data.tokenizer is empty"),
    option("--resume x --elastic", "--elastic"),
    option("--init-from nix", "nix is no run's folder"),
    option("--out x", "--out is given twice"),
    option("--methd lte", "train has no option --methd (did you mean '--method'?)"),
    option("--method ltee", "there is no method 'ltee' (did you mean 'lte'?)"),
    option("--method lora --method.rnk 4", "did you mean 'rank'"),
    option("--method lora --method.rank 4096", "at most 128"),
    option("--method lte --method.heads 64", "heads"),
    option("--method lora --method.target_modules '*.attnn.*'", "did you mean"),
    option("--method lora --method.target_modules ln_1", "no matrix to adapt"),
    option("--method no.py:method", "no.py, asked for its function method"),
    option("--task imags", "there is no task 'imags' (did you mean 'images'?)"),
    option("--per-layer", "--max-grad-norm none --clip-per-layer 1"),
    option("--model.n_head 0", "--model.n_head 0: at least 1 is needed"),
    option("--model.vocab_size 50", "vocabulary"),
    option("--data.context 0", "data.context=0 must be at least 1"),
    row("train gptmini", "there is no recipe 'gptmini' (did you mean 'gpt-mini'?)"),
    row("train gpt-mini --data nothere.txt", "no file or folder 'nothere.txt'"),
    row("train --resume nothing", "there is no run at nothing/run.json"),
    row("train gpt-mini --resume nothing", "leave the recipe, --out, --init-from and"),
    row("compare gpt-mini --methods full --method.rank 3", "none of full has an argument 'rank'"),
    row("compare gpt-mini --methods ''", "--methods is empty"),
    row("compare gpt-mini --seeds one", "--seeds one: expected a whole number"),
    row("report .", "there is no finished run"),
    row("methods lroa", "there is no method 'lroa' (did you mean 'lora'?)"),
    row("data prepare", "usage: lowrank data list"),
    row("generate gpt2 --device x", "--device x: expected one of auto, cpu, cuda"),
    row("export . out", "no run.json"),
    row("train", "what is to be trained"),
    row("train GPT-MINI", "'GPT-MINI'", "gpt-mini"),
    row("train .", "there is no recipe '.'"),
    row("train {text_txt}", "text.txt is damaged, or no JSON"),
    row("train gpt-mini extra", "unexpected 'extra'"),
    row("train gpt-mini ---steps 5", "no option ---steps"),
    row("train gpt-mini --=5", "no option --"),
    row("trian gpt-mini", "did you mean 'train'"),
    row("'' x", "no command ''"),
    row("recipes nope", "'nope'"),
    row("methods ''", "something is missing"),
    row("data", "something is missing"),
    row("data prepare nix.txt", "nix.txt"),
    row("data prepare {text_txt} --val-fraction 1.5", "1.5"),
    row("export {images} o --adapter a", "give one folder"),
    row("export {text} o --checkpoint x", "best or latest"),
    row("export {images} --adapter a --format x", "--format is lowrank or peft"),
    row("export {text} --adapter a", "full trains the weights themselves"),
    row("report nix", "there is no nix: name a folder of finished runs"),
    row("plan gpt-mini --link 1Gbit --ranks 0", "--ranks 0"),
    row("plan gpt-mini --batch-size 0", "--batch-size 0: at least 1"),
    row("plan gpt-mini --fit -3GB", "--fit '-3GB' is no size: give 24GB (24·10⁹ bytes), 24GiB"),
    row("plan gpt-mini --fit 1MB", "nothing found fits 977 KiB: the least needs", "what would help: a smaller model"),
    row("plan gpt-mini --methods full,galor", "there is no method 'galor' (did you mean 'galore'?)"),
    row("plan finetune --model.path ./d", "has no config.json", given={"d/x": ""}),
    row("plan gpt-mini --link 0 --ranks 2", "--link 0"),
    row("plan gpt-mini --link 1Gbit --ranks 2 --latency -1ms", "--latency -1ms"),
    row("compare gpt-mini --seeds ''", "--seeds is empty"),
    row("compare gpt-mini --lrs ''", "--lrs is empty"),
    row("compare arena-llama --lrs 1e-3", "an experiment tunes rates itself"),
    row("compare arena-llama --trials 0", "--trials 0: at least 1"),
    row("compare arena-llama --jobs 0", "--jobs 0: at least 1"),
    row("compare arena-llama --allow-changed-data", "runs on other data stand in no table together"),
    row("compare gpt-mini --out ''", "--out is empty"),
    row("compare gpt-mini --methods ,", "names nothing"),
    row("compare gpt-mini --seeds ,", "names nothing"),
    row("compare gpt-mini --data {text_txt} {tiny} --lrs -1 --out c", "--lr -1"),
    row("compare gpt-mini --data {text_txt} {tiny} --seeds 99999999999999999999 --out c", "below 2^63"),
    row("compare gpt-mini --data {text_txt} {tiny} --methods lora:rank= --out c", "--method.rank"),
    row("compare gpt-mini --data {text_txt} {tiny} --methods lora:rank=4:rank=8 --out c", "gives rank twice"),
    row("compare gpt-mini --out f", "--out f is a file", given={"f": "x"}),
    row("train gpt-mini --data {text_txt} {tiny} --out f", "f: File exists", given={"f": "x"}),
    row("train gpt-mini --data {text_txt} {tiny} --out f/x", "f/x", given={"f": "x"}),
    row(
        "train gpt-mini --data {text_txt} {tiny} --out d",
        "d already holds a run",
        "--resume d",
        given=lambda w: shutil.copytree(w.root / "text" / "checkpoints", "d/checkpoints"),
    ),
    row("export {text} f", "f is a file", given={"f": "x"}),
    row("export {text} d", "d is not empty", given={"d/f": "x"}),
    row("report {text} --out f", "f", given={"f": "x"}),
]

MODELS = [
    row("eval {plain}", "on what text", "--data"),
    *(
        Row(
            name=f"a model that computes {computed}",
            words=f"{SHORT} --model f.py:m --method lora --method.target_modules fc",
            says=(says, "exclude_modules"),
            given={"f.py": READING.replace("COMPUTED", computed)},
            writes=("o", "o/*"),
        )
        for computed, says in (
            ("F.linear(self.fc(x), self.fc.weight)", "fc, which is adapted, and also reads its weight"),
            ("F.linear(x, self.fc.weight)", "h.0.mlp.fc were never called"),
        )
    ),
    row(
        f"{SHORT} --method f.py:m",
        "m returned int, and a method is wanted",
        given={"f.py": "def m(): return 7\n"},
    ),
    row(
        f"{SHORT} --task f.py:T",
        "makes a T, and a task is wanted",
        given={"f.py": "class T:\n    unit = 'x'\n"},
    ),
    row("plan finetune --model.path d --data x", "config.json is none of", given={"d/config.json": "{"}),
    row(f"{FINETUNE}", "line 1: turn 1 of 'messages' says nothing", given={"f.jsonl": SILENT}),
    row(f"{FINETUNE} --data.completion prompt", "both name 'prompt'", given={"f.jsonl": '{"prompt": "a"}\n' * 40}),
    row("eval {plain} --data {text_txt} --context 1000", "data.context=1000", "16 positions"),
    row("eval {text} --context 1000", "data.context=1000", "16 positions"),
    row("eval {text} --context 0", "data.context=0"),
    row("eval {text} --split nope", "no split 'nope'", "train, val, test"),
    row("eval {text} --batches 0", "--batches"),
    row("eval {text} --column x", "no columns"),
    row("eval {text} --val-fraction 2", "val_fraction"),
    row("eval {text} --tokenizer chars", "tokenizer of its own"),
    row("eval {text} --device x", "--device x", "cpu"),
    row("eval {text} --data {photos}", "no text files"),
    row("eval {images} --data {text_txt}", "text.txt"),
    row("eval {text_txt}", "is a file"),
    row("eval nix/nix/nix", "there is no run or model nix/nix/nix"),
    row("generate {text}/checkpoints/nix", "no run or model"),
    row("generate {text} --prompt ''", "--prompt is empty"),
    row("generate {text} --tokens 0", "tokens=0"),
    row("generate {text} --tokens 99999999999", "tokens=99999999999"),
    row("generate {text} --temperature -0.5", "temperature=-0.5"),
    row("generate {text} --temperature nan", "--temperature nan"),
    row("generate {text} --temperature 1e-300", "temperature=1e-300", "at least 1e-6"),
    row("generate {text} --temperature 1e300 --tokens 3", status=0),
    row("generate {text} --top-k 0", "top_k=0"),
    row("generate {text} --seed -1", "seed=-1"),
    row("generate {text} --seed 99999999999999999999", "below 2^63"),
    row("generate {images}", "is a run on images"),
    Row(name="half a letter", words=["generate", "{text}", "--prompt", "a\udcff"], says=("'a\\udcff' is not UTF-8",)),
]

NAMES = ("$x^2$", "<b>&amp;", "=1+1", "a|b", "_lead", "\x1b[31mred", "\u202eabc", "new\nline", "tab\there", "é½", "'\"")


def classes(world: Any) -> None:
    """Photos in two classes of hostile names."""
    world.copy("photos")
    Path("photos/ill").rename(f"photos/{NAMES[0]}")
    Path("photos/well").rename(f"photos/{NAMES[5]}")


NAMED = [
    *(
        Row(name=f"a method {name!r}", words=["train", "gpt-mini", "--method", name], says=("there is no method",))
        for name in NAMES
    ),
    *(
        Row(
            name=f"a text {name!r}",
            words=["train", "gpt-mini", "--data", f"{name}.txt", "--out", "o"],
            says=("no file",),
        )
        for name in NAMES
    ),
    *(Row(name=f"a run {name!r}", words=["eval", f"./{name}"], says=("there is no run or model",)) for name in NAMES),
    Row(
        name="classes that steer",
        words="train vit-mini --data ./photos {small} --out o",
        given=classes,
        status=0,
        shows=("o: step 2",),
        writes=("o", "o/*"),
    ),
    Row(
        name="folders that steer",
        words=["train", "gpt-mini", "--data", "a.txt", *TINY_TEXT, "--out", "\x1b[31m$x$"],
        given={"a.txt": TEXT},
        status=0,
        shows=("\\x1b[31m$x$: step 4",),
        writes=("*$x$", "*$x$/*"),
    ),
]
ROWS = [*OPTIONS, *MODELS, *NAMED]
