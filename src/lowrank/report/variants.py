"""Many runs of one recipe: methods × learning rates × seeds, only the missing ones executed.

A variant is a method with settings of its own, written `lte`, `lte:merge_every=1` or `lora:rank=16:lr=3e-3`. Runs are
recognised by their fingerprint, so that a comparison that was interrupted, or is asked for again with one method more,
does the rest only. A run that fails is reported at the end and does not stop the others.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowrank.infra import checkpoint
from lowrank.infra.files import write_json
from lowrank.report.runs import FAILED, is_finished
from lowrank.run.overrides import Catalogue, catalogue, fingerprint, options, override, resolve, told_to_learn
from lowrank.run.own_files import is_own, short
from lowrank.run.run import Run
from lowrank.run.validation import validate

Train = Callable[..., Mapping[str, Any]]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method and its settings, in the words of the command line: {"method.rank": "16", "lr": "3e-3"}."""

    method: str
    settings: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{name.removeprefix('method.')}={value}" for name, value in self.settings.items()]
        return ":".join([short(self.method), *parts])


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run that a comparison consists of, and what to call it."""

    name: str
    run: Run


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a planned run: its folder, whether it was executed just now, the error's text if it failed."""

    name: str
    folder: Path
    executed: bool
    error: str | None = None


def parse_variant(text: str, offer: Catalogue | None = None) -> Variant:
    """`lora:rank=16:lr=3e-3`: arguments of the method, or options of the run where the method has none of that name.

    Raises:
        ValueError: it is not written like that; unknown names are found by `planned`.
    """
    offer = offer or catalogue()
    method, *parts = re.split(r":(?=[\w.-]+=)", text)
    known = offer.signature("method", method).kinds if method in offer.method or is_own(method) else {}
    settings: dict[str, object] = {}
    for part in parts:
        name, _, value = part.partition("=")
        name = name.replace("-", "_")
        of_the_run = "." in name or (name in options() and name not in known)
        option = name if of_the_run else f"method.{name}"
        if option in settings:
            raise ValueError(f"{text!r} gives {name} twice")
        settings[option] = value
    if ":" in method and not is_own(method):
        raise ValueError(f"{text!r}: a colon is followed by name=value, as in lora:rank=16:lr=3e-3")
    return Variant(method=method, settings=settings)


def planned(
    base: Run,
    variants: Sequence[Variant],
    *,
    seeds: Sequence[int] = (),
    rates: Sequence[float] = (),
    folds: int | None = None,
    changes: Mapping[str, object] | None = None,
    offer: Catalogue | None = None,
) -> list[Planned]:
    """Every run of a comparison, checked: one seed of all variants before the next.

    Args:
        base: the recipe's run.
        variants: methods with their settings.
        seeds: by default the recipe's one.
        rates: learning rates to try for every variant; by default each variant's own.
        folds: cross-validation: every run once for each of so many folds of its images.
        changes: settings for all; an argument of a method ("method.rank") reaches the variants that have it.

    Raises:
        ValueError: no variant, an unknown or contradictory setting in any of them, or an argument that no method has.
    """
    if not variants:
        raise ValueError(f"--methods names no method; give some, as in --methods full,{base.method.name}:lr=1e-3")
    offer = offer or catalogue()
    changes = changes or {}
    _refuse_unreached(variants, changes, offer)
    if folds is not None and folds < 2:
        raise ValueError(f"--folds {folds}: at least 2")
    runs = []
    places: Sequence[int | None] = (None,) if folds is None else range(1, folds + 1)
    for seed, fold, variant, rate in itertools.product(seeds or (base.seed,), places, variants, rates or (None,)):
        run = _one(base, variant, changes, offer)
        extra: dict[str, object] = {"seed": seed} | ({} if rate is None else {"lr": rate})
        extra |= {} if fold is None else {"data.folds": folds, "data.fold": fold}
        run = resolve(override(run, extra, offer), offer)
        validate(run, offer)
        where = "" if fold is None else f" fold {fold}"
        runs.append(Planned(name=f"{variant}{'' if rate is None else f':lr={rate:g}'} seed {seed}{where}", run=run))
    return runs


def execute(
    runs: Sequence[Planned], out: Path, train: Train, *, say: Say = print, offer: Catalogue | None = None
) -> list[Outcome]:
    """Train what is missing under `out`, each run in a folder of its own.

    Args:
        runs: from `planned`.
        out: holds one folder a run; complete ones are recognised by fingerprint, whatever they are called.
        train: `lowrank.train.loop.train`, told in the run's data what finished runs of the same data have learnt.
        say: where to announce what happens.
        offer: as in `planned`.
    """
    found = _runs(out, offer)
    finished = [(folder, run) for folder, run in found if is_finished(folder, say=say)]
    done = {fingerprint(run, offer): folder for folder, run in finished}
    begun = {fingerprint(run, offer): folder for folder, run in found if checkpoint.saved(folder / "checkpoints")}
    contents = {told_to_learn(run, offer): run.data.fingerprint for _, run in finished}
    outcomes = []
    for number, each in enumerate(runs, start=1):
        mark = fingerprint(each.run, offer)
        if mark in done:
            say(f"[{number}/{len(runs)}] {each.name}: already in {done[mark]}")
            outcomes.append(Outcome(name=each.name, folder=done[mark], executed=False))
            continue
        folder = begun.get(mark) or _free(out, each.name)
        say(f"[{number}/{len(runs)}] {each.name} -> {folder}")
        same = told_to_learn(each.run, offer)
        data = replace(each.run.data, fingerprint=contents.get(same, ""))
        outcomes.append(_attempt(replace(each, run=replace(each.run, data=data)), folder, train, resume=mark in begun))
        if outcomes[-1].error is None:
            done[mark] = folder
            contents[same] = Run.read(folder / "run.json").data.fingerprint
        else:
            say(f"failed: {outcomes[-1].error}")
    return outcomes


def _attempt(each: Planned, folder: Path, train: Train, *, resume: bool) -> Outcome:
    """Train one run; what goes wrong in it is its own, and the others go on.

    Raises:
        KeyboardInterrupt: the run was stopped from outside, and so the comparison is.
    """
    try:
        summary = train(each.run, folder, resume=resume)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if (folder / "run.json").is_file():
            write_json(folder / FAILED, {"error": text})
        return Outcome(name=each.name, folder=folder, executed=True, error=text)
    (folder / FAILED).unlink(missing_ok=True)
    if summary.get("interrupted"):
        raise KeyboardInterrupt
    return Outcome(name=each.name, folder=folder, executed=True)


def _one(base: Run, variant: Variant, changes: Mapping[str, object], offer: Catalogue) -> Run:
    """The base under a variant: method first, then what all share, then the variant's own."""
    run = base if variant.method == base.method.name else override(base, {"method": variant.method}, offer)
    known = offer.signature("method", variant.method).kinds
    shared = {name: value for name, value in changes.items() if _argument(name) is None or _argument(name) in known}
    return override(override(run, shared, offer), variant.settings, offer)


def _refuse_unreached(variants: Sequence[Variant], changes: Mapping[str, object], offer: Catalogue) -> None:
    reached = {name for each in variants for name in offer.signature("method", each.method).kinds}
    for name in changes:
        argument = _argument(name)
        if argument is not None and argument not in reached:
            methods = ", ".join(each.method for each in variants)
            raise ValueError(f"--{name}: none of {methods} has an argument {argument!r}")


def _argument(name: str) -> str | None:
    kind, dot, argument = name.replace("-", "_").partition(".")
    return argument if kind == "method" and dot else None


def _runs(out: Path, offer: Catalogue | None) -> list[tuple[Path, Run]]:
    """Folders of runs under `out`; what cannot be read is no run of ours."""
    found = []
    for path in sorted(out.glob("*/run.json")):
        try:
            run = Run.read(path)
            fingerprint(run, offer)
            found.append((path.parent, run))
        except (ValueError, TypeError, OSError):
            continue
    return found


def _free(out: Path, name: str) -> Path:
    """A folder named after the run that does not exist yet."""
    slug = re.sub(r"[^\w.=-]+", "_", name).strip("_")
    folder, number = out / slug, 1
    while folder.exists():
        number += 1
        folder = out / f"{slug}_{number}"
    return folder
