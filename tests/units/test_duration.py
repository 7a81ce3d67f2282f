"""How long a step takes: its work is counted, seconds follow from a calibration, and without one none are said."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.units.test_ledger import small

from lowrank.cli import main
from lowrank.plan.flops import JOINED, LARGEST, STEP, Amount, Kind, Work, of_blocks
from lowrank.plan.memory_sheet import Sheet
from lowrank.plan.speed import Machine, Rhythm, Speed, Timing, fitted, pace, with_around
from lowrank.run.duration import duration
from lowrank.run.memory_estimate import estimate

WIDTH, TOKENS = 32, 4 * 32
MEMORY = {size: 1e-10 * (1 + size) for size in range(LARGEST + 1)}
BLOCK = 2 * 12 * WIDTH**2 * TOKENS  # operations of the products of one layer, forward


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))


def sheet_of(**changes: object) -> Sheet:
    return estimate(small("gpt-mini", method="full", model__n_layer=2, **changes), on_card=False, works=True)


def test_operations_are_those_of_the_formulae() -> None:
    plain, again = sheet_of(), sheet_of(checkpoint_activations=True)
    head = 2 * WIDTH * 256 * TOKENS
    attention = 2 * 4 * 32 * TOKENS * WIDTH  # in each of two layers QKᵀ and the sum of the values, whatever is masked
    assert plain.counts.work.total("first", "forward").flops == 2 * BLOCK + head + attention
    assert plain.counts.work.total("first", "backward").flops == 2 * (2 * BLOCK + head) + 2.5 * attention
    needed = BLOCK * 8 // 12  # torch stops before a layer's last product, whose result nothing needs
    assert again.counts.work.total("first", "again").flops == 2 * needed + attention
    assert again.counts.work.total("first", "backward").flops == plain.counts.work.total("first", "backward").flops
    adamw = plain.counts.work.at("first", "step")[Kind("_fused_adamw_", "float32", JOINED)]
    assert adamw.bytes == pytest.approx(7 * 4 * plain.parameters, rel=0.01)  # reads p, g, m, v; writes p, m, v


def test_a_step_per_layer_is_the_optimizer_s_although_it_is_in_the_backward_pass() -> None:
    apart, inside = sheet_of(), sheet_of(per_layer=True)
    assert inside.counts.work.total("first", "backward") == apart.counts.work.total("first", "backward")
    assert inside.counts.work.total("first", "step").bytes > 6 * 4 * inside.parameters


def test_work_grows_by_as_much_with_each_block() -> None:
    few, more = Work(), Work()
    kind = Kind("add", "float32", 3)
    few.add(("first", "forward"), kind, Amount(5, 50, 0, 2))
    more.add(("first", "forward"), kind, Amount(7, 70, 0, 3))
    assert of_blocks(few, more, (2, 3, 12)).at("first", "forward")[kind] == Amount(25, 250, 0, 12)


def made_of(kind: Kind, amount: Amount, own: float) -> float:
    """Seconds by the module's equations, a call taking 10 µs."""
    if amount.flops:
        return amount.calls * 1e-5 + own * amount.flops
    return amount.calls * 1e-5 + amount.bytes * (MEMORY[max(0, kind.size)] + own)


def speed_of(threads: int = 0) -> Speed:
    machine = Machine.here(torch.device("cpu"))
    own = {"view": 0.0, "gelu": 3e-10, "mm inner": 2e-11, "mm outer": 4e-11}
    timings = []
    for name, value in own.items():
        for size in range(4):
            amount = Amount(1, 4.0**size * (1 << 15), 1e6 * 2**size if name.startswith("mm") else 0.0)
            amount = replace(amount, bytes=0.0) if name == "view" else amount
            kind = Kind(name, "float32", size)
            timings.append(Timing(kind, amount.bytes, amount.flops, 0.0, made_of(kind, amount, value)))
    return fitted(replace(machine, threads=threads or machine.threads), MEMORY, 1e-9, timings)


def test_a_calibration_finds_what_timings_were_made_of_and_tells_others(tmp_path: Path) -> None:
    speed = speed_of()
    assert speed.call == pytest.approx(1e-5)
    kind, amount = Kind("gelu", "float32", 5), Amount(3, 6e7)
    assert speed.seconds({kind: amount}, "forward") == pytest.approx(made_of(kind, amount, 3e-10), rel=1e-6)
    wide, amount = Kind("mm outer", "float32", 9), Amount(1, 1e6, 1e9)
    assert speed.seconds({wide: amount}, "forward") == pytest.approx(1e-5 + 4e-11 * 1e9, rel=1e-6)
    work = Work()
    work.add(("ordinary", STEP), kind, amount)
    late = with_around(speed, [("ordinary", work, {STEP: speed.seconds({kind: amount}, STEP) + 2e-3})])
    assert late.around == pytest.approx({STEP: 2e-3})
    late.write()
    assert Speed.read(late.machine) == late
    assert Speed.read(replace(late.machine, version="1.0")) is None


def test_what_happens_now_and_then_counts_in_the_mean() -> None:
    speed, work = speed_of(), Work()
    kind = Kind("view", "float32", 0)
    for place, calls in {
        ("ordinary", "forward"): 2,
        ("ordinary", "backward"): 4,
        ("ordinary", "step"): 10,
        ("refresh", "step"): 60,
        ("merge", "step"): 30,
        ("evaluation", "forward"): 1,
        ("first", "forward"): 1000,
    }.items():
        work.add(place, kind, Amount(calls))
    found = pace(work, Rhythm(micro_batches=6, traced=2, refresh_every=50, merge_every=10), speed)
    assert found.total == pytest.approx(1e-5 * (3 * 2 + 3 * 4 + 10 + 50 / 50 + 30 / 10))
    assert found.evaluation == pytest.approx(1e-5)


def test_seconds_are_said_for_the_machine_that_is_calibrated_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    run, sheet = small("gpt-mini", method="full"), sheet_of()
    assert "is not calibrated; lowrank plan --calibrate" in duration(run, sheet)[-1]
    speed_of(threads=99).write()
    assert "is not calibrated (it is for " in duration(run, sheet)[-1]
    assert "with 99 threads" in duration(run, sheet)[-1]
    speed = speed_of()
    replace(speed, own={}).write()
    assert "but not for _scaled_dot_product" in duration(run, sheet)[-1]
    attention = dict.fromkeys(_names(speed, sheet), 1e-11)
    replace(speed, own={**speed.own, **attention}).write()
    lines = "\n".join(duration(run, sheet))
    assert re.search(r"s a step \(forward \d+%, backward \d+%, step \d+%\)", lines)
    assert re.search(r"tokens a second, .* a day\n400 steps take .* hours, .* days", lines)
    shape = ["--model.n_layer", "2", "--model.n_embd", "16", "--model.n_head", "1", "--data.context", "8"]
    words = ["gpt-mini", *shape, "--device", "cpu", "--methods", "full"]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "s/step" in out.splitlines()[0]
    assert main(["plan"]) == 2
    assert "--calibrate alone" in capsys.readouterr().err


def _names(speed: Speed, sheet: Sheet) -> list[str]:
    return [f"{name.replace(' in ', ' ')} model" for name in speed.unknown(sheet.counts.work)]
