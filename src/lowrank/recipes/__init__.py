"""What we run: functions that return a complete `Run`; each docstring gives the command, the time and the result.

`find` takes the name of a recipe, a `run.json` (or the folder it lies in), or `file.py:function` of your own:

    from dataclasses import replace
    from lowrank.recipes.gpt import gpt_mini
    def mine():
        return replace(gpt_mini(), recipe="mine", steps=1000)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lowrank.infra.convert import nearest
from lowrank.recipes import finetune, glue, gpt, llama, vit
from lowrank.run import own_files
from lowrank.run.run import Run

Recipe = Callable[[], Run]

_ALL = (
    *(gpt.gpt_mini, gpt.shakespeare_char, gpt.babygpt, gpt.gpt2_pretrain, gpt.gpt2_slow_link, gpt.gpt2_finetune),
    finetune.finetune,
    *(llama.llama_mini, llama.llama_60m, llama.llama_130m, llama.llama_350m, llama.llama_1b, llama.llama_7b),
    *(glue.glue_cola, glue.glue_sst2, glue.glue_mrpc, glue.glue_stsb, glue.glue_qqp),
    *(glue.glue_mnli, glue.glue_qnli, glue.glue_rte, glue.glue_wnli),
    *(vit.vit_mini, vit.vit_finetune, vit.vit_pretrain, vit.vit_3d, vit.vit_segment),
)
RECIPES: Mapping[str, Recipe] = {recipe.__name__.replace("_", "-"): recipe for recipe in _ALL}


def find(name: str) -> Run:
    """The run that a name stands for.

    Raises:
        ValueError, FileNotFoundError: no recipe, file or function of that name (the nearest is named), or a function
            that returns something else than a `Run`.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if own_files.is_own(name):
        full, file, digest = own_files.given(name)
        run = own_files.load("recipe", full, {file: digest})()
        if not isinstance(run, Run):
            raise ValueError(f"{name} returned {type(run).__name__}; a recipe returns a lowrank.run.Run")
        return run
    path = Path(name)
    if path.is_dir() and (path / "run.json").is_file():
        path = path / "run.json"
    if path.suffix == ".json" or path.is_file():
        return Run.read(path)
    raise ValueError(
        f"there is no recipe {name!r}{nearest(name, RECIPES)}; there are {', '.join(RECIPES)}, "
        "and a run.json or file.py:function works too"
    )
