"""Peak memory and tokens a second of whole steps, and what the ledger said before: LLaMA 1B and 7B, sequence 256.

predicted   weights, factors, kept copies, gradients (per layer: the largest) and state, by ``plan.ledger``
held        what the allocator holds between two steps, beside the ledger's part of it, which should be all
rest        peak − predicted: activations, logits and workspace, which the plan's ledger does not count
traced      the peak of the first and of an ordinary step that ``lowrank plan`` tells by taking them on tensors without
            numbers, activations and workspace included; beside it what the allocator saw
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import lowrank
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import CONTEXT, batch, llama, mean_loss, parameters_of
from lowrank.recipes import find
from lowrank.run.memory_estimate import estimate
from lowrank.run.run import Call, Run, Settings

GIB = 2**30


@dataclass(frozen=True)
class Case:
    size: str
    method: str
    options: dict[str, Any]
    rows: int
    per_layer: bool = False

    @property
    def name(self) -> str:
        words = [f"{self.size} {self.method}"]
        words += ["per layer"] if self.per_layer else []
        words += [f"rank {self.options['rank']}"] if "rank" in self.options else []
        return ", ".join([*words, f"{self.rows} × {CONTEXT}"])


CASES = (
    Case("1b", "galore_8bit", {"rank": 512}, 16, per_layer=True),
    Case("7b", "galore_8bit", {"rank": 1024}, 1, per_layer=True),
    Case("1b", "full", {}, 16),
    Case("1b", "galore", {"rank": 512}, 16),
    Case("1b", "apollo", {"rank": 256}, 16, per_layer=True),
    Case("1b", "lora", {"rank": 16, "target_modules": "all-linear"}, 16),
    Case("7b", "lora", {"rank": 16, "target_modules": "all-linear"}, 4),
    Case("7b", "apollo_mini", {}, 1, per_layer=True),
    Case("7b", "full", {}, 1),
)
SMALLER = tuple(
    Case("350m", method, options, 16, per_layer=per_layer)
    for method, options, per_layer in (("full", {}, False), ("galore", {"rank": 256}, False), ("lora", {}, False))
)
TINY = (
    Case("tiny", "galore_8bit", {"rank": 4}, 1, per_layer=True),
    Case("tiny", "lora", {"rank": 4, "target_modules": "all-linear"}, 2),
)


def run(bench: Bench) -> None:
    fitted, measured = 0, []
    for case in TINY if bench.tiny else CASES:
        found = bench.item(case.name, partial(measure, bench, case), needs=0.0 if bench.tiny else 10.0)
        if found is not None and "seconds" in found:
            fitted += 1
            measured.append((case, found))
    if fitted < 3 and not bench.tiny:  # a small card
        for case in SMALLER:
            bench.item(case.name, partial(measure, bench, case), needs=5.0)
    for case, found in measured[-1:] if bench.tiny else measured:  # last, since they take the host's time alone
        bench.item(f"traced: {case.name}", partial(traced, bench, case, found))


def measure(bench: Bench, case: Case) -> dict[str, Any]:
    """Some steps: the first, in which all bases are made, and ordinary ones."""
    room = bench.free_bytes()
    told = predicted(case)
    if told["predicted_gib"] * GIB > room:
        return {**told, "skipped": f"{room / GIB:.1f} GiB are free"}
    model, plan = planned(case, bench.device)
    optimizer = plan.optimizer(lr=1e-4, per_layer=case.per_layer)
    model.train()
    data = [batch(model, case.rows) for _ in range(4)]
    bench.begin_peak()

    def step(number: int) -> None:
        mean_loss(model, data[number % 4]).backward()
        optimizer.step()
        optimizer.zero_grad()

    first, _ = bench.once(lambda: step(0))
    at_first = bench.peak_bytes()
    bench.begin_peak()
    seconds, count, begin = [], 0, time.monotonic()
    while count < (2 if bench.tiny else 3) or (count < 20 and time.monotonic() - begin < 8 and not bench.tiny):
        count += 1
        seconds.append(bench.once(partial(step, count))[0])
    middle = sorted(seconds)[len(seconds) // 2]
    record = {**told, "tokens_a_second": case.rows * CONTEXT / middle, "seconds": middle, "first_step_seconds": first}
    return record | allocator(bench, told, at_first)


def planned(case: Case, device: torch.device) -> tuple[Any, Any]:
    model = llama(case.size, device, torch.bfloat16)
    return model, lowrank.apply_(model, lowrank.METHODS[case.method](**case.options))


def predicted(case: Case) -> dict[str, Any]:
    """The ledger of the plan, of a model without storage."""
    model, plan = planned(case, torch.device("meta"))
    sheet = plan.ledger
    held = sheet.weights + sheet.factors + sheet.kept + sheet.state
    return {
        "parameters": parameters_of(model),
        "state_bytes_a_parameter": sheet.state / plan.parameters_total,
        "predicted_gib": (sheet.total_per_layer if case.per_layer else sheet.total) / GIB,
        "predicted_held_gib": held / GIB,
    }


def traced(bench: Bench, case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """The peaks that ``lowrank plan`` tells of such a run, beside those that the allocator saw (``found``)."""
    if bench.tiny:
        model, plan = planned(case, bench.device)
        data = batch(model, case.rows)
        sheet = lowrank.ledger(model, plan.optimizer(per_layer=case.per_layer), data, loss=mean_loss).predicted
    else:
        sheet = estimate(run_of(case))
    peaks: dict[str, float] = {}
    for (step, _), peak in sheet.counts.peaks.items():
        peaks[step] = max(peaks.get(step, 0.0), (peak.total + peak.rounding) / GIB)
    told = {"gib": peaks.get("ordinary", peaks["first"]), "first_step_gib": peaks["first"]}  # of like steps one is told
    seen = {"gib": found.get("peak_gib"), "first_step_gib": found.get("peak_first_step_gib")}
    ratios = {f"peak_over_traced_{key}": value / told[key] for key, value in seen.items() if value is not None}
    return {**{f"traced_{key}": value for key, value in told.items()}, **ratios}


def run_of(case: Case) -> Run:
    """The run of the command line that makes the steps of ``case``."""
    words: Settings = {"source": "c4", "tokenizer": "t5-base", "context": CONTEXT}
    return replace(
        find(f"llama-{case.size}"),
        method=Call(name=case.method, args=case.options),
        data=Call(name="stream", args=words),
        per_method={},
        batch_size=case.rows,
        grad_accum=1,
        per_layer=case.per_layer,
    )


def allocator(bench: Bench, told: dict[str, Any], at_first: int | None) -> dict[str, Any]:
    """What the allocator saw: ``peak`` of ordinary steps, of the first step, and what is held between two."""
    peak, held = bench.peak_bytes(), bench.held_bytes()
    if peak is None or held is None or at_first is None:
        return {}
    return {
        "peak_gib": peak / GIB,
        "peak_first_step_gib": at_first / GIB,
        "rest_gib": peak / GIB - told["predicted_gib"],
        "held_gib": held / GIB,
        "held_over_predicted": held / GIB / told["predicted_held_gib"],
    }
