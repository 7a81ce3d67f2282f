"""The command ``plan``: will it fit, side by side, backwards from a budget, and over a link."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowrank.cli.arguments import Option, Parsed, UsageError, command, several, switch, whole
from lowrank.cli.run_options import DOTTED, RUN
from lowrank.infra.convert import convert
from lowrank.infra.text import printable
from lowrank.recipes import find
from lowrank.run.overrides import catalogue, override
from lowrank.run.run import Run
from lowrank.run.validation import validated

_PLANNED = (
    Option(name="methods", value="A,B,…", help="methods side by side, with the largest batch for usual cards"),
    Option(name="fit", value="SIZE", help="find what fits: 24GB, 24GiB, or 24 for a card sold as that"),
    Option(name="out", value="FILE", help="the picture of --methods (PNG), or the run.json of --fit"),
    Option(name="calibrate", help="first measure this machine (a minute); plans then say seconds as well"),
    Option(name="layers", help="also every parameter: its shape, who trains it, and why"),
)
_LINKED = (
    Option(name="ranks", value="N", group="Ranks", help="as if on so many processes: what one of them takes"),
    Option(name="link", value="SPEED", group="Ranks", help="100Mbit, 1Gbit, 10GB/s, …: of each rank, either way"),
    Option(name="latency", value="TIME", group="Ranks", help="until a message has arrived: 1ms, 50us; default 0"),
    Option(name="step_seconds", value="TIME", group="Ranks", help="what a rank computes; default: measured here"),
)
_LINK = tuple(option.name for option in _LINKED)


@command((*_PLANNED, *_LINKED, *RUN), DOTTED, (0, 1))
def plan(parsed: Parsed) -> int:
    """plan RECIPE [options], or plan --calibrate
    will it fit: what a run takes in memory, and what would train

    Says what a run needs at its peak, where that is and what the bytes are: a step of each kind (the first, an ordinary
    one, a refresh of bases, a merge, an evaluation) is gone through with tensors that have shapes and no numbers, so
    that neither weights nor data are needed. It is what torch holds, to the byte on a CPU but for scratch space within
    kernels; for a GPU its allocator's rounding is added, and 512 MiB that a CUDA process is assumed to take. Takes the
    options of lowrank train.

    With --methods it sets several side by side, with the largest micro-batch for each of the usual cards (interpolated
    between traces of three sizes). With --fit it looks for the least that must be given up for the run to fit:
    micro-batch, activations, precision, method, per-layer steps, rank; it says what it gave up, and --out writes a
    run.json that trains.

    With --ranks it says what the one of several processes takes that takes most, and what it sends, under --engine and
    --workers as in lowrank train; none is started. With --link it also says what such a link makes of it: bytes and
    seconds a step, beside DDP's, and from which merge interval on communication hardly matters. One rank's step is
    measured here unless --step-seconds says what it takes on the machines that are meant.

    It also says what a step computes and what the optimizer moves. Seconds are said once --calibrate has timed a few
    steps of small models on this machine; they hold for its device, number of threads and version of torch, and for no
    other.

    Examples:
      lowrank plan gpt2-pretrain
      lowrank plan gpt2-pretrain --calibrate
      lowrank plan llama-7b --method galore_8bit --per-layer --grad-accum 1
      lowrank plan llama-7b --methods full,lora,galore,galore_8bit --per-layer --out memory.png
      lowrank plan llama-1b --fit 12GB --out fits.json
      lowrank plan gpt-mini --method lte --method.target_modules attention --layers
      lowrank plan llama-7b --engine fsdp --ranks 8
      lowrank plan gpt2-pretrain --method.heads 64 --batch-size 64 --ranks 64 --link 1Gbit --step-seconds 0.2
    """
    if switch(parsed, "calibrate"):
        _calibrate(parsed)
        if not parsed.positions:
            return 0
    if not parsed.positions:
        raise UsageError("plan what? give a recipe (lowrank recipes), a run.json, or --calibrate alone")
    given = parsed.only(_LINK)
    changes = parsed.without((*_LINK, "layers", "methods", "fit", "out", "calibrate"))
    if "methods" in parsed.options or "fit" in parsed.options:
        return _side_by_side(parsed, changes) if "methods" in parsed.options else _fit(parsed, changes)
    if "out" in parsed.options:
        raise UsageError("--out names the picture of --methods, or the run that --fit writes: give one of these")
    run = validated(override(find(parsed.positions[0]), changes))
    if (given and "ranks" not in given) or (len(given) > 1 and "link" not in given):
        raise UsageError("--link SPEED needs --ranks N, and --latency and --step-seconds need --link")
    ranks = whole(given.get("ranks", "1"), "--ranks")
    if ranks < 1:
        raise UsageError(f"--ranks {ranks}: give at least 1")
    show = _outlook(run, given) if "link" in given else None
    from lowrank.run.duration import duration
    from lowrank.run.memory_estimate import estimate

    sheet = estimate(run, ranks=ranks, works=True)
    time = [textwrap.fill(line, 100, subsequent_indent="  ") for line in duration(run, sheet, ranks=ranks)]
    print(printable("\n".join([str(sheet), "", *time])))
    if switch(parsed, "layers"):
        print(f"\n{printable(sheet.layers)}")
    if show is not None:
        from lowrank.evaluate.score import planned_session

        print(f"\n{show(planned_session(run))}")
    return 0


def _calibrate(parsed: Parsed) -> None:
    """Measure this machine, and keep it for plans to come."""
    from lowrank.run.session import pick_device
    from lowrank.train.calibration import calibrated

    speed = calibrated(pick_device(parsed.options.get("device", "auto")), lambda text: print(f"measuring {text}"))
    print(f"{speed.machine} is calibrated: {speed.write()}\n")


def _side_by_side(parsed: Parsed, changes: Mapping[str, str]) -> int:
    """A row a method: what it needs, and which batch fits which card."""
    if parsed.only(("fit", "layers", *_LINK)):
        raise UsageError("--methods shows methods side by side: leave --fit, --layers, --ranks and --link out")
    offer = catalogue()
    names = several(parsed, "methods")
    for name in names:
        offer.check("method", name.partition(":")[0])
    from lowrank.plan.memory_sheet import CARDS, gib
    from lowrank.plan.speed import Speed
    from lowrank.report.table import text_table
    from lowrank.report.variants import parse_variant, planned
    from lowrank.run.duration import CALIBRATE, here, pace_of
    from lowrank.run.fit import largest_batches

    variants = [parse_variant(name, offer) for name in names]
    base = find(parsed.positions[0])
    runs = planned(base, variants, changes=_per_layer_allowed(changes), offer=offer)
    found = {name: largest_batches(validated(one.run), works=True) for name, one in zip(names, runs, strict=True)}
    machine = here(override(base, parsed.only(("device",))))
    speed = Speed.read(machine)
    seconds = {name: pace_of(sheet, speed) for name, (sheet, _) in found.items()}
    timed = [] if speed is None else ["s/step"]
    header = ["method", "peak", "bytes/param", "trained", *timed, *(f"{card} GB" for card in CARDS)]
    body = [
        [name, gib(sheet.total), f"{sheet.bytes_per_parameter:.2f}", f"{sheet.trained / 1e6:.1f} M"]
        + [f"{pace.total:.3g}" if (pace := seconds[name]) else "?" for _ in timed]
        + [str(batches[card]) if batches[card] else "–" for card in CARDS]
        for name, (sheet, batches) in found.items()
    ]
    print(text_table(header, body))
    print("\npeak of one step, CUDA's context of 512 MiB assumed; then the largest micro-batch that fits a card")
    how = "is not calibrated, so that no seconds are told" if speed is None else "is calibrated; evaluations apart"
    print(textwrap.fill(f"{machine} {how}" + (f": {CALIBRATE}" if speed is None else ""), 100))
    for name, (sheet, _) in found.items():
        print(f"{name}: " + sheet.answer().replace("; ", "\n    "))
    for note in dict.fromkeys(note for sheet, _ in found.values() for note in sheet.notes):
        print(textwrap.fill(f"note: {note}", 100))
    if "out" in parsed.options:
        from lowrank.report.memory import draw

        draw({name: sheet for name, (sheet, _) in found.items()}, Path(parsed.options["out"]))
        print(f"\n{parsed.options['out']}")
    return 0


def _per_layer_allowed(changes: Mapping[str, str]) -> dict[str, str]:
    """With --per-layer the recipe's clipping of the global norm is left out, which could not be had."""
    asked = convert(changes.get("per_layer", "false"), bool, "--per-layer")
    return {**({"max_grad_norm": "none"} if asked and "max_grad_norm" not in changes else {}), **changes}


def _fit(parsed: Parsed, changes: Mapping[str, str]) -> int:
    """The run with the least changes that fits a budget, said and written."""
    from lowrank.plan.memory_sheet import parse_size
    from lowrank.run.fit import fitted

    if parsed.only(("layers", *_LINK)):
        raise UsageError("--fit looks for a run that fits: leave --layers, --ranks and --link out")
    size = parse_size(parsed.options["fit"])
    run = validated(override(find(parsed.positions[0]), changes))
    found = fitted(run, size)
    print(printable(str(found.sheet)))
    print("\ngiven up, the least lossy first:" if found.gave_up else "\nit fits as it is: nothing is given up")
    for what in found.gave_up:
        print(f"  {what}")
    if "out" in parsed.options:
        out = Path(parsed.options["out"])
        found.run.write(out)
        print(f"\n{out}: train it with: lowrank train {out}")
    return 0


def _outlook(run: Run, given: Mapping[str, str]) -> Callable[[Any], str]:
    """The text about a session over a link; what was given is checked at once."""
    from lowrank.evaluate.score import planned_session
    from lowrank.plan import network
    from lowrank.train import step_time

    ranks = whole(given["ranks"], "--ranks")
    link = network.parse_link(given["link"], given.get("latency", "0"))
    alone = step_time.rank_of(run, ranks)
    if "step_seconds" in given:
        compute = network.parse_seconds(given["step_seconds"], "--step-seconds")
        if not compute:
            raise ValueError("--step-seconds 0: a step takes time; leave it out to have it measured here")
        return lambda session: network.table(step_time.outlook(session, ranks, link, compute), "as given")

    def show(session: Any) -> str:
        compute = step_time.measured(planned_session(alone))
        rows = f"{alone.batch_size} row{'s' if alone.batch_size > 1 else ''}"
        return network.table(step_time.outlook(session, ranks, link, compute), f"measured here, {rows} a rank")

    return show
