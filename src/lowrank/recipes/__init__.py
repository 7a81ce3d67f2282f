"""What we run: functions that return a complete `Run`; each docstring gives the command, the time and the result.

`find` takes the name of a recipe, a `run.json` (or the folder it lies in), or `file.py:function` of your own:

    from dataclasses import replace
    from lowrank.recipes.gpt import gpt_mini
    def mine():
        return replace(gpt_mini(), recipe="mine", steps=1000)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

from lowrank.infra.convert import nearest
from lowrank.recipes import gpt, llama, vit
from lowrank.run.run import Run

Recipe = Callable[[], Run]

RECIPES: Mapping[str, Recipe] = {
    "gpt-mini": gpt.gpt_mini,
    "shakespeare-char": gpt.shakespeare_char,
    "babygpt": gpt.babygpt,
    "gpt2-pretrain": gpt.gpt2_pretrain,
    "gpt2-slow-link": gpt.gpt2_slow_link,
    "gpt2-finetune": gpt.gpt2_finetune,
    "llama-mini": llama.llama_mini,
    "llama-60m": llama.llama_60m,
    "llama-130m": llama.llama_130m,
    "llama-350m": llama.llama_350m,
    "llama-1b": llama.llama_1b,
    "llama-7b": llama.llama_7b,
    "vit-mini": vit.vit_mini,
    "vit-finetune": vit.vit_finetune,
    "vit-pretrain": vit.vit_pretrain,
}


def find(name: str) -> Run:
    """The run that a name stands for.

    Raises:
        ValueError, FileNotFoundError: no recipe, file or function of that name (the nearest is named), or a function
            that returns something else than a `Run`.
    """
    if name in RECIPES:
        return RECIPES[name]()
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file), function)
    path = Path(name)
    if path.is_dir() and (path / "run.json").is_file():
        path = path / "run.json"
    if path.suffix == ".json" or path.is_file():
        return Run.read(path)
    raise ValueError(
        f"there is no recipe {name!r}{nearest(name, RECIPES)}; there are {', '.join(RECIPES)}, "
        "and a run.json or file.py:function works too"
    )


def _from_file(file: Path, function: str) -> Run:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}, asked for its function {function}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec, "a .py file always has a loader"
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = getattr(module, function, None)
    if not callable(recipe):
        functions = [name for name, value in vars(module).items() if callable(value)]
        raise ValueError(f"{file} has no function {function!r}{nearest(function, functions)}")
    run = recipe()
    if not isinstance(run, Run):
        raise ValueError(f"{file}:{function} returned {type(run).__name__}; a recipe returns a lowrank.run.Run")
    return run
