"""How long a run takes: its work, and seconds where this machine is calibrated (``plan.speed``)."""

from __future__ import annotations

from lowrank.infra.progress import short_bytes, short_count
from lowrank.plan.memory_sheet import Sheet
from lowrank.plan.speed import Machine, Pace, Speed, pace, parts_of
from lowrank.run.run import Run
from lowrank.run.session import pick_device, task_of

CALIBRATE = "lowrank plan --calibrate measures it in a minute"
_DAY = 86_400


def here(run: Run) -> Machine:
    """The machine that a run would train on, as it is now."""
    return Machine.here(pick_device(run.device))


def pace_of(sheet: Sheet, speed: Speed | None) -> Pace | None:
    """What a step takes; None where the machine is not calibrated, or not for all that a step does."""
    if speed is None or sheet.rhythm is None or speed.unknown(sheet.counts.work):
        return None
    return pace(sheet.counts.work, sheet.rhythm, speed)


def duration(run: Run, sheet: Sheet, *, ranks: int = 1) -> list[str]:
    """Sentences about a run's time: operations, bytes that the optimizer moves, seconds or how to know them. The
    sheet's steps must have been counted with ``works``."""
    if sheet.rhythm is None:
        return []
    work, rhythm = sheet.counts.work, sheet.rhythm
    flops, moved = (
        parts_of(work, rhythm, lambda kinds, part, what=what: sum(getattr(amount, what) for amount in kinds.values()))
        for what in ("flops", "bytes")
    )
    again = f", {_count(flops['again'])} computed again" if flops["again"] else ""
    lines = [
        f"FLOP a step: {_count(flops['forward'])} forward, {_count(flops['backward'])} backward{again}, "
        f"{_count(flops['step'])} in the optimizer",
        f"in the mean {_count(flops['refresh'])} for refreshes, {_count(flops['merge'])} for merges; "
        f"{_count(flops['evaluation'])} for a batch of an evaluation",
        f"the optimizer reads and writes {short_bytes(moved['step'] + moved['refresh'])} a step",
    ]
    machine = here(run)
    speed = Speed.read(machine)
    found = pace_of(sheet, speed)
    if found is not None and found.total > 0:
        return [*lines, *_seconds(run, sheet, found, machine, ranks)]
    if speed is not None:
        missing = ", ".join(speed.unknown(work))
        return [*lines, f"no seconds: {machine} is calibrated, but not for {missing}"]
    others = machine.others()
    known = f" (it is for {', '.join(others)})" if others else ""
    return [*lines, f"no seconds: {machine} is not calibrated{known}; {CALIBRATE}"]


def _seconds(run: Run, sheet: Sheet, found: Pace, machine: Machine, ranks: int) -> list[str]:
    parts = {name: seconds / found.total for name, seconds in vars(found).items() if name != "evaluation"}
    shares = [f"{name} {share:.0%}" for name, share in parts.items() if share >= 0.005]
    unit, size = task_of(run).unit, sheet.size * run.grad_accum
    alone = "" if ranks == 1 else ", without what it sends"
    lines = [
        f"{found.total:.3g} s a step{alone} ({', '.join(shares)})",
        f"{short_count(size / found.total)} {unit} a second, {short_count(size / found.total * _DAY)} a day",
    ]
    if run.steps is not None:
        hours = run.steps * found.total / 3600
        lines.append(f"{run.steps:,} steps take {hours:.3g} hours, {hours / 24:.2g} days, evaluations apart")
    lines.append(f"a batch of an evaluation takes {found.evaluation:.3g} s; all as {machine} is calibrated")
    return lines


def _count(number: float) -> str:
    return short_count(number) if number else "0"
