"""The README's two pictures: python -m benchmarks.pictures writes docs/pictures/loss.png and memory.png, and both again
as loss-dark.png and memory-dark.png for readers whose pages are dark.

loss      validation loss against steps of the newest arena-llama in results/, mean and range of its seeds, with the
          sentence of its paired tests
memory    what one step of LLaMA 1B takes under six methods, as `lowrank plan --methods … --out` draws it
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

from lowrank.infra.extras import import_extra
from lowrank.plan.memory_sheet import Sheet
from lowrank.recipes import find
from lowrank.report.memory import draw
from lowrank.report.results import FILE, Results, read_results
from lowrank.report.results_table import findings
from lowrank.run.memory_estimate import estimate
from lowrank.run.overrides import override, resolve

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
SHOWN = ("full", "muon", "galore", "apollo", "lora", "lte")
METHODS = ("full", "full_8bit", "lora", "galore", "galore_8bit", "apollo_mini")
GROUND = "#0d1117"  # of a dark page, as GitHub has it


def newest(experiment: str) -> Results:
    return read_results(max((ROOT / "results" / experiment).glob(f"*/{FILE}"), key=lambda f: f.parent.name[-10:]))


def loss(results: Results, path: Path) -> None:
    plt = import_extra("matplotlib.pyplot", "report")
    figure, axes = plt.subplots(figsize=(8, 4.2), dpi=100, layout="constrained")
    longest = max(row.steps for row in results.rows)
    for method in SHOWN:
        rows = [row for row in results.rows if row.method == method and row.steps == longest and row.error is None]
        curves = np.array([[value for _, value in row.curve["val"]] for row in rows])
        steps = [step for step, _ in rows[0].curve["val"]]
        (line,) = axes.plot(steps, curves.mean(0), label=method)
        axes.fill_between(steps, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="steps", ylabel=f"validation loss, {results.unit}", ylim=(None, curves[:, 1].max() * 1.05))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    sentence = next(text for text in findings(results) if "better" in text or "told apart" in text)
    axes.set_title(textwrap.fill(sentence, 105), fontsize=8, loc="left")
    figure.savefig(path)
    plt.close(figure)


def memory() -> dict[str, Sheet]:
    runs = {name: {"method": name, "batch_size": 4, "grad_accum": 1, "per_layer": True} for name in METHODS}
    base = override(find("llama-1b"), {"max_grad_norm": None, "precision": "bf16-weights"})
    return {name: estimate(resolve(override(base, changes))) for name, changes in runs.items()}


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    results, sheets = newest("arena-llama"), memory()
    dark = {"figure.facecolor": GROUND, "axes.facecolor": GROUND, "savefig.facecolor": GROUND}
    style = import_extra("matplotlib.style", "report")
    for suffix, look in (("", "default"), ("-dark", ["dark_background", dark])):
        with style.context(look):
            loss(results, PICTURES / f"loss{suffix}.png")
            draw(sheets, PICTURES / f"memory{suffix}.png")
    print(*PICTURES.iterdir(), sep="\n")


if __name__ == "__main__":
    main()
