"""The command ``doctor``."""

from __future__ import annotations

from pathlib import Path

from lowrank.cli.arguments import Option, Parsed, command, number
from lowrank.infra.text import printable

_SECONDS = Option(name="seconds", value="S", help="how long its first step may take; default 60")


@command((_SECONDS,), positions=(1, None))
def doctor(parsed: Parsed) -> int:
    """doctor SCRIPT.py [options] [-- ARGUMENTS]
    what is silently wrong in a training script, anybody's

    Runs a script that trains with torch, as it is, in a process of its own, until its first optimizer step is over;
    then stops it and says in plain words what cannot be meant, and the line to change: a scale of 0, adapters without
    gradient, a frozen head, parameters in no group or in two, projections that compress nothing,
    DistributedDataParallel before the adapters, clipping without effect, a step a micro-batch, steps that bfloat16
    rounds away, layers passed over, decay on factors, state that cannot be saved. What the script writes before its
    first step is written. For a model at hand there is lowrank.check(model, optimizer, batch).

    Exit status: 1 with faults, 0 without, 2 where the script did not get there.

    Examples:
      lowrank doctor train.py
      lowrank doctor finetune.py --seconds 300 -- --model gpt2 --lr 1e-4
    """
    seconds = number(parsed.options.get("seconds", "60"), "--seconds")
    from lowrank.doctor.script import examine_script

    found = examine_script(Path(parsed.positions[0]), parsed.positions[1:], seconds=seconds)
    if found.why is not None:
        output = f"; the end of what it printed:\n{found.output}" if found.output else ""
        raise ValueError(f"{parsed.positions[0]}: {found.why}{output}")
    faults = sum(not each.note for each in found.faults)
    print(printable("\n\n".join(map(str, found.faults)) or "its first step shows nothing wrong"))
    return 1 if faults else 0
