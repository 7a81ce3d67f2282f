"""Runs and adapters as plain models, which their libraries open without ours.

export            a run's merged weights under their original keys, with the tokenizer or the classes
export_with_base  the same of an adapter's folder
export_nanogpt    a run's as nanoGPT's `ckpt.pt`
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lowrank.adapters import merge_and_unload
from lowrank.adapters.layers import quantised_layers
from lowrank.data.text.pretrained_tokenizer import model_tokenizer
from lowrank.data.text.tokenizer_export import save_for_transformers
from lowrank.infra.files import refuse_filled, user_mode_, write_json
from lowrank.interop.adapter_bank import restored_for
from lowrank.interop.adapter_start import base_of, base_options, use_adapter_
from lowrank.models.nanogpt import check_nanogpt, is_nanogpt, write_nanogpt
from lowrank.models.text import load_pretrained, without_bars
from lowrank.models.vision import timm_config
from lowrank.run.run import Run


def export(source: Path, out: Path, *, which: str = "best") -> int:
    """Write a run's model, adapters merged, as a plain one, with what its library needs to load it.

    Of transformers: `config.json`, `model.safetensors`, `generation_config.json` and the tokenizer. Of timm:
    `config.json` and `model.safetensors`, which `timm.create_model("local-dir:OUT", pretrained=True)` opens.

    Returns:
        The step of the checkpoint that was exported.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: no such checkpoint kind.
    """
    session, step = restored_for(out, source, which)
    if quantised_layers(session.model):
        warnings.warn(
            "the base was quantised: plain weights are written, as the codes say them, with the adapters merged",
            stacklevel=2,
        )
    model: Any = merge_and_unload(session.model)
    out.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        if classes := getattr(session.data, "classes", ()):
            _name_classes(model, classes, Path(str(session.run.model.args.get("path", ""))), out)
        with without_bars():
            model.save_pretrained(out)
    else:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, out / "model.safetensors")
        if hasattr(model, "made_by_timm_as"):
            write_json(out / "config.json", timm_config(model, session.data.classes))
    user_mode_(out)
    session.data.write_beside(model, out, _origins(session.run))
    return step


def export_with_base(folder: Path, out: Path, *, base: str | None = None) -> str:
    """Write an adapter of text, ours or PEFT's, merged into its base, as a plain model; returns where the base was.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: it does not fit the base, does not say where that is, or is for images.
    """
    refuse_filled(out)
    place = base_of(folder, base)
    model: Any = load_pretrained(place, **{"dtype": "auto", **base_options(folder)})
    model = merge_and_unload(use_adapter_(model, folder))
    with without_bars():
        model.save_pretrained(out)
    own = str(folder) if (folder / "tokenizer_config.json").is_file() else place
    if not is_nanogpt(own):
        context = getattr(model.config, "max_position_embeddings", None)
        save_for_transformers(model_tokenizer(own), out, origins=[own], context=context)
    user_mode_(out)
    return place


def export_nanogpt(source: Path, out: Path, *, which: str = "best") -> tuple[int, str]:
    """Write a run's model, adapters merged, as nanoGPT's `ckpt.pt`, with its tokenizer beside.

    Returns:
        The step of the checkpoint that was exported, and in what the two models differ, if in anything.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: the model is no GPT-2.
    """
    session, step = restored_for(out, source, which)
    model = merge_and_unload(session.model)
    check_nanogpt(model)
    out.mkdir(parents=True, exist_ok=True)
    note = write_nanogpt(model, out / "ckpt.pt", step=step)
    session.data.write_beside(model, out, _origins(session.run))
    return step, note


def _origins(run: Run) -> list[str]:
    """Where a run's tokenizer may be whole."""
    return [str(told) for told in (run.model.args.get("path"), run.data.args.get("tokenizer")) if told]


def _name_classes(model: Any, classes: Sequence[str], base: Path, out: Path) -> None:
    """The classes into the configuration of a model of transformers, and how its images are read beside it."""
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: i for i, name in enumerate(classes)}
    reading = base.expanduser() / "preprocessor_config.json"
    if reading.is_file():
        (out / reading.name).write_bytes(reading.read_bytes())
