"""docs/evidence.md from the committed results alone: `make evidence`, no run.

    python -m benchmarks.evidence            # writes docs/evidence.md
    python -m benchmarks.evidence --run ../shared/data [EXPERIMENT …]     # makes results first

Each claim is judged by a function of one experiment's results. *Confirmed* and *refuted* need a paired test, Holm's
correction over the claim's comparisons, and at least three seeds; "as good as" needs the interval to lie within
`MARGIN` of the other's figure, and not to be worse for certain. Everything else is *undecided*.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank.cli.app import main as lowrank
from lowrank.recipes.experiments import EXPERIMENTS
from lowrank.report.results import FILE, Results, find_experiments, read_results
from lowrank.report.results_table import findings, results_cells
from lowrank.report.statistics import Difference, compare, plus_minus
from lowrank.report.table import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "results", ROOT / "docs" / "evidence.md"
MARGIN = 0.02  # of the baseline's figure, within which two methods count as equally good

Judged = tuple[str, str]  # the verdict and its figures


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the ancestor (or the field) says, the experiment that asks, and how its results answer."""

    says: str
    experiment: str
    judge: Callable[[Results], Judged]
    note: str = ""


def beside(results: Results, methods: Sequence[str], baseline: str) -> list[Difference]:
    """These methods beside a baseline of their own, corrected over these comparisons."""
    figures = results.figures()
    return compare({m: figures[m] for m in (baseline, *methods) if m in figures}, baseline, lower=results.lower)


def told(differences: Sequence[Difference]) -> str:
    """Each difference with its interval and p-value; above 0 the method is better."""
    parts = []
    for each in differences:
        if each.half_width is None:
            parts.append(f"{each.method} against {each.baseline}: no test, {each.seeds} seeds")
        else:
            gain = plus_minus(each.gain, each.half_width)
            parts.append(f"{each.method} against {each.baseline}: {gain} (p = {each.p:.2g}, {each.seeds} seeds)")
    return "; ".join(parts)


def equal(each: Difference, level: float) -> bool:
    """Whether the whole interval lies within the margin."""
    return each.half_width is not None and abs(each.gain) + each.half_width <= MARGIN * abs(level)


def as_good_as(results: Results, methods: Sequence[str], baseline: str) -> Judged:
    """Whether the best of some methods is at least as good as the baseline; refuted where all are worse."""
    found = beside(results, methods, baseline)
    level = results.mean(baseline) or 0.0
    if any(each.verdict == "better" or (each.verdict == "undecided" and equal(each, level)) for each in found):
        return "confirmed", told(found)
    return ("refuted" if found and all(each.verdict == "worse" for each in found) else "undecided"), told(found)


def better(results: Results, method: str, others: Sequence[str]) -> Judged:
    """Whether a method is better than each of some others; refuted where it is worse than one."""
    found = [one for other in others for one in beside(results, [method], other)]
    if all(each.verdict == "better" for each in found):
        return "confirmed", told(found)
    return ("refuted" if any(each.verdict == "worse" for each in found) else "undecided"), told(found)


def worst_of(judged: Sequence[Judged]) -> Judged:
    """Several verdicts as one: confirmed where all are, refuted where one is."""
    verdicts, figures = zip(*judged, strict=True)
    verdict = "refuted" if "refuted" in verdicts else "undecided" if "undecided" in verdicts else "confirmed"
    return verdict, "; ".join(figures)


def alike(results: Results, methods: Sequence[str], baseline: str) -> Judged:
    """Whether some methods differ from the baseline by no more than the margin; refuted where one does for certain."""
    found = beside(results, methods, baseline)
    level = results.mean(baseline) or 0.0
    if all(equal(each, level) for each in found):
        return "confirmed", told(found)
    far = [e for e in found if e.half_width is not None and abs(e.gain) - e.half_width > MARGIN * abs(level)]
    return ("refuted" if far else "undecided"), told(found)


def named(results: Results, start: str) -> list[str]:
    return [method for method in results.methods if method.startswith(start)]


def memory(results: Results) -> Judged:
    peak = {m: next((r.peak_bytes for r in results.at() if r.method == m), None) for m in results.methods}
    state = {m: next((r.state_bytes for r in results.at() if r.method == m), None) for m in results.methods}
    base, kept, parts = peak["full"] or 1, state["full"] or 1, []
    for method in results.methods[1:]:
        if peak[method] is not None:
            saved = 1 - (peak[method] or 0) / base
            parts.append(f"{method}: peak −{saved:.0%}, state −{1 - (state[method] or 0) / kept:.0%}")
    return "undecided", "; ".join(parts) + ". The peak of so small a model is activations; 1B was not run"


def best_rates(results: Results) -> Judged:
    rates = {m: next((r.settings.get("lr") for r in results.at() if r.method == m), None) for m in results.methods}
    ratios = {m: rate / rates["full"] for m, rate in rates.items() if rate and rates["full"] and m != "full"}
    said = ", ".join(f"{method} {ratio:.2g}×" for method, ratio in ratios.items())
    near = [5 <= ratio <= 20 for ratio in ratios.values()]
    verdict = "confirmed" if near and all(near) else "refuted" if near and not any(near) else "undecided"
    return verdict, f"best rates, full's being {rates['full']}: {said} (one tuning seed, a grid of factors of 2)"


CLAIMS = (
    Claim(
        says="Several small heads match full training of a GPT (Table 1)",
        experiment="heads-ranks-merge",
        judge=lambda r: as_good_as(r, named(r, "lte"), "full"),
        note=(
            "The ancestor's runs ended above 6 nats a token after 2 M tokens, one seed, one rate for all. After 500 "
            "steps, tuned for 500, all lay within 0.05 of full training, frozen matrices too: that is too short to ask."
        ),
    ),
    Claim(
        says="Several heads are better than one LoRA that trains as many numbers",
        experiment="heads-ranks-merge",
        judge=lambda r: better(r, "multihead 4x4", ["lora r16"]),
    ),
    Claim(
        says="A shorter merge interval is better (Table 1)",
        experiment="heads-ranks-merge",
        judge=lambda r: better(r, "lte 4x4 T10", ["lte 4x4 T20"]),
    ),
    Claim(
        says="Updates side by side are better than one after the other (Figures 5, 6)",
        experiment="sequential-parallel",
        judge=lambda r: better(r, "parallel", ["sequential"]),
    ),
    Claim(
        says="Attention is the best place for a LoRA (Figure 7)",
        experiment="layers-replaced",
        judge=lambda r: better(r, "lora attention", ["lora mlp", "lora all-linear"]),
        note="The ancestor gave all places the same rank, so that more layers meant more numbers trained.",
    ),
    Claim(
        says="GaLore saves 30 % of the memory at 1B (Figure 8)",
        experiment="adam-galore-memory",
        judge=memory,
        note="`lowrank plan llama-1b --methods full,galore` predicts it for a card without a run.",
    ),
    Claim(
        says="LoRA fine-tunes a ViT better than full fine-tuning (Figures 9, 10)",
        experiment="vit-ranks",
        judge=lambda r: better(r, "lora r16", ["full"]),
        note=(
            "The ancestor's came from two bugs: the scale `alpha // rank` was 0, so that its LoRA was a linear probe; "
            "and full fine-tuning had the rate 0.005, at which a pre-trained ViT forgets."
        ),
    ),
    Claim(
        says="LoRA is better than the linear probe, which is what the ancestor's LoRA was",
        experiment="vit-ranks",
        judge=lambda r: better(r, "lora r16", ["probe"]),
    ),
    Claim(
        says="The rank matters little (ViT)",
        experiment="vit-ranks",
        judge=lambda r: alike(r, ["lora r1", "lora r4"], "lora r16"),
    ),
    Claim(
        says="The rank matters little (GPT)",
        experiment="heads-ranks-merge",
        judge=lambda r: alike(r, ["lte 4x1 T10", "lte 4x8 T10"], "lte 4x4 T10"),
    ),
    Claim(
        says="LTE and GaLore together are better than either (future work)",
        experiment="lte-galore",
        judge=lambda r: better(r, "mixed", ["galore", "lte"]),
        note="The ancestor never ran it: its conversion raised on a ViT; its GaLore group held frozen weights only.",
    ),
    Claim(
        says="LoRA's best learning rate is ten times full fine-tuning's, whatever the rank",
        experiment="lora-rate",
        judge=best_rates,
    ),
    Claim(
        says="LoRA-RITE and LoRA-Muon are better than LoRA (arXiv 2410.20625, 2606.12921), its rate being tuned",
        experiment="lora-variants",
        judge=lambda r: worst_of([better(r, method, ["lora"]) for method in ("lora_rite", "lora_muon")]),
        note="Published at 1B, where another paper finds all variants within 2 % of a tuned LoRA: the next claim.",
    ),
    Claim(
        says="All variants of LoRA are within 2 % of LoRA, each at its own rate",
        experiment="lora-variants",
        judge=lambda r: alike(r, [m for m in r.methods if m not in ("lora", "full")], "lora"),
    ),
    Claim(
        says="Workers that talk every 30 steps alone lose nothing against AdamW in step (DiLoCo, MuLoCo)",
        experiment="local-training",
        judge=lambda r: as_good_as(r, ["diloco", "diloco muon"], "full"),
    ),
    Claim(
        says="Local training is better with Muon inside than with AdamW (MuLoCo), or than by heads of low rank (LTE)",
        experiment="local-training",
        judge=lambda r: better(r, "diloco muon", ["diloco", "lte", "lte outer"]),
    ),
    Claim(
        says="An adaptive refresh of GaLore's subspace is better than a regular one",
        experiment="switching",
        judge=lambda r: better(r, "adaptive", ["power"]),
    ),
    Claim(
        says="The exact SVD is better than power iteration",
        experiment="switching",
        judge=lambda r: better(r, "svd", ["power"]),
    ),
    Claim(
        says="GaLore is better than full training by AdamW (docs/log.md had found so, untuned)",
        experiment="arena-llama",
        judge=lambda r: better(r, "galore", ["full"]),
        note=(
            "Once full training may give its matrices a rate of their own (`embedding_lr`, `head_lr`; GaLore's scale "
            "of 1/4 on matrices is such a rate), its advantage is gone: with eight settings and no ratio for the "
            "output layer, 100 steps and three seeds it had been 0.30 ± 0.12 the other way."
        ),
    ),
    Claim(
        says="Muon, SOAP and Dion on full weights are better than AdamW, tuned by the same budget",
        experiment="arena-llama",
        judge=lambda r: worst_of([better(r, method, ["full"]) for method in ("muon", "soap", "dion")]),
    ),
    Claim(
        says="Muon inside GaLore's subspace is better than Adam there",
        experiment="arena-llama",
        judge=lambda r: better(r, "galore_muon", ["galore"]),
    ),
)


def page(found: dict[Path, Results]) -> str:
    """The document."""
    newest = {each.experiment: (file, each) for file, each in sorted(found.items())}
    parts = [
        "# Evidence",
        "Generated by `make evidence` from `results/` alone; not to be edited. "
        "The rules: [protocol.md](protocol.md). A gain above 0 means that the method named first is better; ± is half "
        "the interval of a paired t-test, Holm-corrected over the claim's comparisons. *Undecided* is not equality.",
        "## The claims",
    ]
    lines = []
    for claim in CLAIMS:
        if claim.experiment not in newest:
            verdict, figures = "undecided", "not run yet"
        else:
            verdict, figures = _judged(claim, newest[claim.experiment][1])
        lines.append([claim.says, f"**{verdict}**", " ".join(filter(None, (figures + ".", claim.note)))])
    parts.append(_table(["claim", "here", "figures, and what was behind it"], lines))
    parts += [
        "All of this is at the small size: what it can and cannot say stands under each experiment. Nothing here "
        "confirms or refutes a claim about GPT-2 124M, LLaMA 1B or ViT-B.",
        "## The experiments",
    ]
    for name in EXPERIMENTS:
        if name not in newest:
            parts += [f"### {name}", f"No results are committed. `lowrank compare {name}` makes them."]
            continue
        file, results = newest[name]
        where = results.environment
        about = f"{where.get('hardware')}, {where.get('date')}, {results.seconds / 60:.0f} minutes; {_link(file)}"
        parts += [
            f"### {name}",
            f"{results.question} ({results.size}, {results.preset}; seeds {', '.join(map(str, results.seeds))}, tuned "
            f"on {', '.join(map(str, results.tuning_seeds))}; equal {results.equal})",
            *findings(results),
            markdown_table(*results_cells(results)),
            f"*{results.caveat}* `{results.command}` ({about})",
        ]
    parts += ["## What to use", *_recommendation(newest)]
    return "\n\n".join(parts) + "\n"


def _judged(claim: Claim, results: Results) -> Judged:
    try:
        return claim.judge(results)
    except (KeyError, StopIteration) as missing:
        return "undecided", f"its results lack {missing}"


def _recommendation(newest: dict[str, tuple[Path, Results]]) -> list[str]:
    """What a reader can follow: by committed results where there are some, else by memory alone, said so."""
    told = []
    if "arena-llama" in newest:
        results = newest["arena-llama"][1]
        figures = {m: results.mean(m) for m in results.methods}
        ranked = sorted((m for m in figures if figures[m] is not None), key=lambda m: figures[m] or 0.0)
        clear = [d.method for d in results.differences() if d.verdict == "better"]
        told.append(
            f"From scratch, by mean loss at this size: {', '.join(ranked)}. Better than tuned AdamW for certain: "
            f"{', '.join(clear) or 'none'}."
        )
    told.append(
        "What fits decides first: `lowrank plan llama-1b --fit 24GB` names the least that must be given up on a card. "
        "Of what fits, take the first of the ranking above, tune its rate as here, and run `--size paper` before a "
        "long run."
    )
    return told


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(
        "| " + " | ".join(re.sub(r"\s*\n\s*", " ", cell).replace("|", r"\|") for cell in r) + " |" for r in rows
    )


def _link(file: Path) -> str:
    path = file.relative_to(ROOT)
    return f"[{path.parent.name}](../{path.as_posix()})"


def keep(results: Path) -> Path:
    """Put an experiment's file where committed results lie."""
    found = read_results(results)
    hardware = re.sub(r"[^a-z0-9]+", "-", str(found.environment["hardware"]).lower()).strip("-")
    folder = RESULTS / found.experiment / f"{hardware}_{found.environment['date']}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(results, folder / FILE)
    return folder / FILE


def run(data: Path, names: Sequence[str]) -> None:
    """Every experiment in turn; the same again goes on."""
    for name in names or list(EXPERIMENTS):
        source = {"vit-ranks": str(data / "pneumoniamnist.npz"), "tissue": "mni152"}
        out = ROOT / "runs" / name
        lowrank(
            ["compare", name, "--data", source.get(name, str(data / "cnn_dailymail_sample.csv")), "--out", str(out)]
        )
        if (out / FILE).is_file():
            print(keep(out / FILE))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(Path(sys.argv[2]), sys.argv[3:])
    PAGE.write_text(page(find_experiments([RESULTS])), encoding="utf-8")
    print(PAGE)
