"""Will it fit: the prediction on fake tensors against what torch counts on real ones, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank
from lowrank.cli import main
from lowrank.plan.live_bytes import Counts, LiveBytes, Peak
from lowrank.plan.memory_sheet import Sheet, gib, parse_size
from lowrank.recipes import find
from lowrank.run import fit
from lowrank.run import memory_estimate as estimating
from lowrank.run.fit import _at_most, fitted
from lowrank.run.memory_estimate import estimate
from lowrank.run.overrides import override, resolve
from lowrank.run.run import Run
from lowrank.train import memory

SMALL: dict[str, dict[str, Any]] = {
    "gpt-mini": {"model.n_layer": 4, "model.n_embd": 32, "model.n_head": 2, "data.context": 32, "batch_size": 4},
    "llama-mini": {
        "model.n_layer": 4,
        "model.hidden": 32,
        "model.feed_forward": 64,
        "model.n_head": 2,
        "data.context": 32,
    },
    "vit-mini": {"model.width": 32, "model.heads": 2, "batch_size": 4},
}


def small(recipe: str, **changes: Any) -> Run:
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return resolve(override(find(recipe), {"device": "cpu", "max_grad_norm": None, **SMALL[recipe], **given}))


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("gpt-mini", {"method": "lte", "method__merge_every": 2}),
        ("gpt-mini", {"method": "galore", "method__rank": 8, "per_layer": True, "grad_accum": 2}),
        ("llama-mini", {"method": "fira", "checkpoint_activations": True, "precision": "bf16-weights"}),
        ("vit-mini", {"method": "apollo", "method__rank": 8, "precision": "bf16"}),
    ],
)
def test_the_prediction_is_what_torch_counts_(recipe: str, changes: dict[str, Any]) -> None:
    run = small(recipe, **changes)
    predicted = estimate(run, on_card=False)
    counted = estimating._estimated(run, LiveBytes, on_card=False)
    assert predicted.static == counted.static
    assert predicted.by_step() == pytest.approx(counted.by_step(), rel=0.01)
    assert predicted.total == counted.total


def test_static_parts_are_those_of_the_plan() -> None:
    session = estimating._made(small("gpt-mini", method="galore"), LiveBytes)[2]
    sheet = estimate(small("gpt-mini", method="galore"))
    assert sum(sheet.static.values()) == session.plan.ledger.total - session.plan.ledger.gradients
    assert sheet.parameters == session.plan.parameters_total


def test_seven_billion_parameters_take_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-7b", "--grad-accum", "1", "--per-layer", "--method", "galore"]) == 0
    out = capsys.readouterr().out
    assert "weights            12.5" in out
    assert "in the backward pass of" in out.splitlines()[1]
    assert out.splitlines()[2].startswith("fits a 40 GB card with ")
    assert max(map(len, out.splitlines())) <= 100
    assert all(len(line) <= 120 for line in out.splitlines())


def test_blocks_that_differ_are_traced_one_by_one() -> None:
    run = small("gpt-mini", method="full", method__freeze=("first:2",))
    predicted, counted = estimate(run, on_card=False), estimating._estimated(run, LiveBytes, on_card=False)
    assert predicted.total == counted.total
    assert ("first", "backward of the layers") in predicted.counts.peaks


def test_of_a_sharded_model_a_few_blocks_tell_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    run = small("gpt-mini", method="full", engine="fsdp", model__n_layer=5)
    predicted = estimate(run, on_card=False, ranks=4)
    monkeypatch.setattr(estimating, "_alike", lambda plan, blocks: False)
    counted = estimate(run, on_card=False, ranks=4)
    assert predicted.total == counted.total
    assert predicted.static == counted.static
    assert predicted.static["weights"] < estimate(run).static["weights"] / 3.9
    assert "this is rank 0 of 4, all in step; it computes 1 of 4 rows" in str(predicted)


def test_checkpointed_activations_change_no_number(tmp_path: Path) -> None:
    words = [
        "gpt-mini",
        "--steps",
        "3",
        "--model.n_embd",
        "16",
        "--model.n_head",
        "2",
        "--model.dropout",
        "0.1",
        "--quiet",
    ]
    losses = []
    for name, more in (("plain", ()), ("again", ("--checkpoint-activations",))):
        assert main(["train", *words, *more, "--out", str(tmp_path / name)]) == 0
        records = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records if "loss" in record])
    assert losses[0] == losses[1]
    one, other = small("gpt-mini"), small("gpt-mini", checkpoint_activations=True)
    assert estimate(other).counts.peaks["first", "forward of the head"].total < (
        estimate(one).counts.peaks["first", "forward of the head"].total
    )


def test_a_dry_run_reads_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["gpt-mini", "--data", "is-not-there.txt", "--data.tokenizer", "bpe:500", "--method", "lora"]
    assert main(["train", *words, "--dry-run", "--out", "x"]) == 0
    out = capsys.readouterr().out
    assert "needs " in out
    assert "nothing was trained" in out
    assert list(tmp_path.iterdir()) == []
    assert main(["train", *words, "--dry-run", "--batch-size", "0"]) == 2
    assert "--batch-size 0: at least 1" in capsys.readouterr().err


def test_models_of_others_from_their_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=100, n_positions=64).save_pretrained(tmp_path / "gpt2")
    words = ["plan", "gpt2-finetune", "--data.context", "32", "--model.path"]
    assert main([*words, str(tmp_path / "gpt2"), "--layers"]) == 0
    out = capsys.readouterr().out
    assert "loaded ones are frozen" in out
    (tmp_path / "empty").mkdir()
    assert main([*words, str(tmp_path / "empty")]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_a_model_that_needs_its_numbers_is_made_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(
        "from lowrank.models.text import gpt2\n\n\n"
        "def model(data, width: int = 8):\n"
        "    made = gpt2(data, n_layer=4, n_embd=width, n_head=1)\n"
        "    made.deviation = made.transformer.wte.weight.detach().numpy().std()\n"
        "    return made\n"
    )
    assert main(["plan", "gpt-mini", "--model", f"{tmp_path / 'own.py'}:model", "--data.context", "8"]) == 0
    out = capsys.readouterr().out
    assert "needs " in out.splitlines()[1]
    assert "cannot be made without its numbers" in out
    assert "it was made, and one step of each" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 100


def test_the_answer_comes_first() -> None:
    sheet = estimate(small("gpt-mini", method="lora"))
    assert isinstance(sheet, Sheet)
    title, answer, card, *_ = str(sheet).splitlines()
    assert title.startswith("gpt-mini, lora: 4 × 32 tokens")
    assert answer.startswith("needs ")
    assert card.startswith("fits an 8 GB card")
    assert replace(sheet, on_card=False).answer().partition(";")[1] == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24GiB", 24 << 30), ("24", 24 << 30), ("1.5 gb", 1_500_000_000), ("500MiB", 500 << 20)],
)
def test_sizes_are_told_apart(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "24TBs"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size: give 24GB"):
        parse_size(text)


def test_bytes_for_people_in_binary_units() -> None:
    assert [gib(n) for n in (0, 2048, 3 << 20, 5 << 30)] == ["0 KiB", "2 KiB", "3.0 MiB", "5.00 GiB"]


# --- anybody's script ------------------------------------------------------------------------------------------------


def script(**config: Any) -> tuple[Any, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=100, n_positions=32, **config))
    ids = torch.randint(0, 100, (2, 32))
    return model, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def took(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["torch", "plan", "lowrank"])
def test_a_script_s_step_is_predicted_and_measured(kind: str) -> None:
    model, batch = script()
    given: Any = torch.optim.AdamW(model.parameters())
    if kind != "torch":
        given = lowrank.apply_(model, lowrank.methods.galore(rank=4))
    optimizer = given.optimizer() if kind == "plan" else given
    if kind == "lowrank":
        given = optimizer = given.optimizer()
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    sheet = lowrank.ledger(model, given, batch)
    assert sheet.measured is None
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not model.training or type(model).__name__ == "GPT2LMHeadModel"
    with lowrank.ledger(model, optimizer, batch) as both:
        took(model, optimizer, batch)
    first = max(p.total for (step, _), p in both.predicted.counts.peaks.items() if step == "first")
    assert both.measured == pytest.approx(first, rel=0.01)
    assert "measured" in str(both)
    assert sheet.total == pytest.approx(both.predicted.total, rel=0.01)


@pytest.mark.parametrize("padded", [False, True])
def test_masks_are_taken_as_they_are(padded: bool) -> None:
    """A model that sees that nothing is padded makes no mask; one that must mask holds it in every layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=100, max_position_embeddings=256))
    ids = torch.randint(0, 100, (2, 256))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if padded:
        batch["attention_mask"][0, 200:] = 0
    optimizer = torch.optim.AdamW(model.parameters())
    with lowrank.ledger(model, optimizer, batch) as both:
        took(model, optimizer, batch)
    first = max(p.total for (step, _), p in both.predicted.counts.peaks.items() if step == "first")
    assert both.measured == pytest.approx(first, rel=0.01)


def test_peft_models_and_a_trainer_s_arguments(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import TrainingArguments

    model, batch = script()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], r=4, fan_in_fan_out=True))
    how = TrainingArguments(output_dir=str(tmp_path), gradient_accumulation_steps=4, use_cpu=True, report_to=[])
    sheet = lowrank.ledger(wrapped, how, batch)
    numbers = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert sheet.predicted.static["factors"] == 4 * numbers
    assert sheet.predicted.static["moments"] >= 8 * numbers


def test_what_a_ledger_refuses() -> None:
    model, batch = script()
    with pytest.raises(TypeError, match="int is none of a torch optimizer"):
        lowrank.ledger(model, 3, batch)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match=r"the default loss is model\(\*\*batch\).loss, and the batch is a Tensor"):
        lowrank.ledger(model, optimizer, batch["input_ids"])
    with pytest.raises(TypeError, match="has no loss: put labels into the batch"):
        lowrank.ledger(model, optimizer, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="loss must give one number"):
        lowrank.ledger(model, optimizer, batch, loss=lambda model, batch: model(**batch).logits)
    assert all(type(p) is torch.nn.Parameter and not p.is_meta for p in model.parameters())


# --- side by side, and backwards -------------------------------------------------------------------------------------

SHAPE = ["--model.n_layer", "2", "--model.n_embd", "32", "--model.n_head", "2", "--data.context", "32"]


def test_methods_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "memory.png"
    words = ["plan", "gpt-mini", *SHAPE, "--methods", "full,lora:rank=2", "--per-layer", "--out", str(picture)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "8 GB" in out.splitlines()[0]
    assert "bytes/param" in out.splitlines()[0]
    assert "lora:rank=2: needs " in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_fits_is_found_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small("gpt-mini", batch_size=64, model__n_layer=2)
    size = estimate(run).total - (1 << 20)
    found = fitted(run, size)
    assert found.sheet.total <= size
    assert found.run.batch_size < 64
    assert found.run.batch_size * found.run.grad_accum == 64
    assert found.gave_up == [f"time, a little: micro-batches of {found.run.batch_size} instead of 64, as large a step"]
    found.run.write(tmp_path / "fits.json")
    assert main(["train", str(tmp_path / "fits.json"), "--dry-run"]) == 0
    assert f"gpt-mini, full: {found.run.batch_size} × 32 tokens" in capsys.readouterr().out


def test_what_cannot_be_made_to_fit(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["plan", "gpt-mini", *SHAPE, "--batch-size", "1"]
    assert main([*tiny, "--fit", "1MB"]) == 2
    said = capsys.readouterr().err
    assert "nothing found fits 977 KiB: the least needs" in said
    assert "of which" in said
    for words, message in (
        (["--fit", "much"], "--fit 'much' is no size: give 24GB"),
        (["--out", "x.png"], "--out names the picture of --methods, or the run that --fit writes"),
        (["--methods", "full", "--fit", "1GB"], "--methods shows methods side by side: leave --fit"),
        (["--methods", "ful"], "there is no method 'ful' (did you mean 'full'?)"),
    ):
        assert main([*tiny, *words]) == 2
        assert message in capsys.readouterr().err


def test_what_was_not_needed_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where 8-bit GaLore alone makes a run fit, checkpointing and narrow numbers, tried before it, are not given up."""
    real = estimate(small("gpt-mini"))

    def pretended(run: Run) -> Sheet:
        total = 1 << 20 if run.method.name == "galore_8bit" else 1 << 40
        return replace(real, on_card=False, counts=Counts(peaks={("first", "backward"): Peak(total, {})}))

    monkeypatch.setattr(fit, "estimate", pretended)
    found = fitted(small("gpt-mini"), 1 << 30)
    assert found.gave_up == ["full AdamW: 8-bit GaLore (--method galore_8bit)"]
    assert (found.run.precision, found.run.checkpoint_activations) == ("fp32", False)
    assert found.run.batch_size == small("gpt-mini").batch_size


def test_between_traces_batches_are_on_lines() -> None:
    points = [(1, 100), (8, 800), (64, 8000)]
    assert [_at_most(points, size) for size in (99, 100, 450, 800, 4400, 16000)] == [0, 1, 4, 8, 36, 126]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_records_its_peaks_and_says_beforehand_that_it_will_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: 1 << 20)
    both = ["--method", "lte_galore", "--method.rank", "2", "--method.merge_every", "3", "--method.refresh_every", "2"]
    both += ["--method.galore_rank", "4"]
    words = ["train", "gpt-mini", *SHAPE, *both, "--steps", "4", "--eval-batches", "1", "--max-grad-norm", "none"]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "this run is predicted not to fit: it needs " in said.err + said.out
    found = json.loads((tmp_path / "run" / memory.MEMORY).read_text())
    assert set(found["measured_peak_bytes"]) == {"first", "ordinary", "refresh", "merge", "evaluation"}
    predicted = found["predicted"]["by_step"]
    for step in ("first", "ordinary"):
        assert found["measured_peak_bytes"][step] == pytest.approx(predicted[step], rel=0.03)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.md").read_text()
    assert f"{gib(predicted['first'])} / {gib(found['measured_peak_bytes']['first'])}" in page
    assert (tmp_path / "page" / "memory.png").read_bytes().startswith(b"\x89PNG")
