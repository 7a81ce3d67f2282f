"""Options that several commands take: the settings of a run, and what is said of files and of the progress line."""

from __future__ import annotations

from dataclasses import fields

from lowrank.cli.arguments import Option, placeholder
from lowrank.run.overrides import TASKS, options
from lowrank.run.run import Run

TRUST = Option(name="trust_files", help="execute the .py files that a run.json names, if they are still the same")
QUIET = Option(name="quiet", help="no progress line")
CHANGED = Option(name="allow_changed_data", help="go on although the data's content is not what it was")
DOTTED = ("method.", "model.", "data.")  # of options that reach a function's arguments

_WHAT = tuple(
    Option(name=name, value=value, group="What", help=text)
    for name, value, text in (
        ("method", "NAME", "see lowrank methods, or your file.py:function; its options are --method.rank 8 …"),
        ("data", "SOURCE", "a file, a folder, a name (lowrank data list) or your file.py:function"),
        ("model", "NAME", "gpt2, vit, … or your file.py:function; its options are --model.n_layer 4 …"),
        ("task", "NAME", f"{', '.join(TASKS)} or your file.py:class"),
        ("labels", "FILE", "a folder of images' labels: CSV with path, label, …"),
    )
)


_KINDS = options()
_SETTINGS = tuple(
    Option(name=each.name, value=placeholder(_KINDS[each.name]), help=each.metadata["help"], group=group)
    for each in fields(Run)
    if (group := each.metadata.get("group"))
)
RUN = (*_WHAT, *_SETTINGS, TRUST)
