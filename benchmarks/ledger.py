"""Is the ledger right? Predictions on tensors without numbers against what torch counts on a CPU.

static       bytes of weights, factors, kept copies and state, every method × GPT, LLaMA, ViT × float32, bfloat16
peaks        the first step's peak by the profiler's memory events, and what is held after the forward pass
published    GaLore's table 6 (arXiv 2403.03507): weights and optimizer state in decimal GB

python -m benchmarks.ledger            about five minutes on two cores; writes results/ledger_….json
python -m benchmarks.ledger published  that part alone, a minute; put into the newest result
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.common import newest, save
from lowrank.methods import METHODS
from lowrank.plan.live_bytes import STATIC, FakeLiveBytes, LiveBytes, undisturbed
from lowrank.plan.trace import Setup, Steps
from lowrank.recipes import find
from lowrank.run.memory_estimate import _made, estimate
from lowrank.run.overrides import catalogue, override, resolve
from lowrank.run.run import Run
from lowrank.run.validation import validate

MODELS: dict[str, dict[str, Any]] = {
    "gpt-mini": {"model.n_layer": 5, "model.n_embd": 64, "data.context": 64},
    "llama-mini": {"model.n_layer": 5, "model.hidden": 64, "model.feed_forward": 176, "data.context": 64},
    "vit-mini": {"model.depth": 5, "model.width": 64},
}
AFTER_FORWARD = ("first", "forward of the head")
PUBLISHED = {  # GaLore's table 6 in decimal GB: weights, and the state of each method
    "60m": {"weights": 0.12, "full": 0.23, "galore": 0.13, "lora": 0.17},
    "130m": {"weights": 0.25, "full": 0.51, "galore": 0.28, "lora": 0.37},
    "350m": {"weights": 0.68, "full": 1.37, "galore": 0.54, "lora": 0.72},
    "1b": {"weights": 2.60, "full": 5.20, "galore": 1.78, "lora": 2.38},
}


def run_of(model: str, method: str, **changes: Any) -> Run | None:
    """A run, its ranks small; None where the settings contradict each other."""
    known = catalogue().signature("method", method).kinds
    rank = {"method.rank": 8} if "rank" in known and method != "apollo_mini" else {}
    rank |= {"method.galore_rank": 8} if "galore_rank" in known else {}
    given = {"device": "cpu", "max_grad_norm": None, **MODELS[model], "method": method, **rank, **changes}
    run = resolve(override(find(model), given))
    try:
        validate(run)
    except ValueError:
        return None
    return run


def static_parts() -> dict[str, Any]:
    """How many of the static parts are exact to the byte."""
    wrong, count = [], 0
    for model in MODELS:
        for method in METHODS:
            for precision in ("fp32", "bf16-weights"):
                run = run_of(model, method, precision=precision)
                if run is None:
                    continue
                parts = []
                for kind in (FakeLiveBytes, LiveBytes):
                    with undisturbed():
                        live, *held = _made(run, kind)  # what is let go is no longer counted
                    parts.append({name: live.counts.parts[name] for name in STATIC})
                    assert parts[-1]["weights"]
                    del held
                count += 1
                if parts[0] != parts[1]:
                    wrong.append({"run": f"{model} {method} {precision}", "predicted": parts[0], "counted": parts[1]})
    return {"configurations": count, "exact": count - len(wrong), "wrong": wrong}


def configurations() -> Iterator[tuple[str, Run]]:
    """Every method on every model, with batch, checkpointing, per-layer steps and precision varied over them."""
    for i, model in enumerate(MODELS):
        for j, method in enumerate(METHODS):
            changes: dict[str, Any] = {"batch_size": (4, 12)[(i + j) % 2]}
            changes["checkpoint_activations"] = (i + j // 2) % 2 == 0
            changes |= {"per_layer": (i + j) % 3 == 0, "precision": ("fp32", "bf16-weights")[(j // 2) % 2]}
            run = run_of(model, method, **changes)
            if run is not None:
                yield f"{model} {method} {' '.join(f'{name}={value}' for name, value in changes.items())}", run


def profiled(setup: Setup, held: int) -> int:
    """The peak of the first step, by the events of torch's profiler, on top of what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        Steps(LiveBytes(), setup).step("first")
    results: Any = profiler.profiler
    events = sorted(
        (event.start_ns(), event.nbytes()) for event in results.kineto_results.events() if event.name() == "[memory]"
    )
    now = peak = held
    for _, size in events:
        now += size
        peak = max(peak, now)
    return peak


def peaks() -> dict[str, Any]:
    """Relative errors of the step's peak and of what is saved for the backward pass."""
    rows: list[dict[str, Any]] = []
    for name, run in configurations():
        sheet = estimate(run, on_card=False)
        predicted = max(peak.total for (step, _), peak in sheet.counts.peaks.items() if step == "first")
        with undisturbed():
            live, _, _, setup = _made(run, LiveBytes)
        gc.collect()
        counted = profiled(setup, live.counts.now)
        with live:
            steps = Steps(live, setup)
            with steps.watched:
                steps.step("first")
        saved = live.counts.peaks[AFTER_FORWARD].parts["activations"]
        rows.append(
            {
                "run": name,
                "peak": counted,
                "peak_error": predicted / counted - 1,
                "saved_error": sheet.counts.peaks[AFTER_FORWARD].parts["activations"] / saved - 1,
            }
        )
        print(f"{rows[-1]['peak_error']:+.3%} {rows[-1]['saved_error']:+.3%}  {name}", flush=True)
    worst = max(rows, key=lambda row: abs(row["peak_error"]))
    worst_saved = max(rows, key=lambda row: abs(row["saved_error"]))
    return {"runs": len(rows), "worst_peak": worst, "worst_saved": worst_saved, "rows": rows}


def published() -> dict[str, Any]:
    """Weights and state by the paper's count, 2 bytes a number, beside what is held (states are float32 here) and a
    step's peak."""
    found: dict[str, Any] = {}
    for size, theirs in PUBLISHED.items():
        row: dict[str, Any] = {"published": theirs}
        for method in ("full", "galore", "lora"):
            run = resolve(override(find(f"llama-{size}"), {"device": "cpu", "method": method}))
            with undisturbed():
                live, *held = _made(run, FakeLiveBytes)
            parts = dict(live.counts.parts)
            del held
            state = parts["moments"] + parts.get("basis", 0)
            row["weights"] = round(parts["weights"] / 1e9, 3)
            row[method] = {"by_the_paper_s_count": round(state / 2 / 1e9, 3), "held": round(state / 1e9, 3)}
            row[method]["peak"] = round(estimate(run, on_card=False).total / 1e9, 2)
        found[size] = row
        print(size, row)
    return found


def main() -> None:
    if sys.argv[1:] == ["published"]:
        print(save("ledger", {**newest("ledger"), "published": published()}))
        return
    result = {"static": static_parts()}
    print(result["static"])
    result |= {"published": published(), "peaks": peaks()}
    found = result["peaks"]
    print(f"{found['runs']} runs; the worst peak: {found['worst_peak']}; the worst saved: {found['worst_saved']}")
    print(save("ledger", result))


if __name__ == "__main__":
    main()
