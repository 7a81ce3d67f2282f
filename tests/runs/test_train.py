"""The loop: every method trains, stops, resumes bitwise, says what is wrong and keeps what was good."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.runs.tiny import tiny

import lowrank
from lowrank.adapters.layers import matrix_of
from lowrank.adapters.merge import merge_and_unload
from lowrank.adapters.targets import linear_layers
from lowrank.evaluate.evaluator import _share, evaluate
from lowrank.infra import checkpoint
from lowrank.infra.checkpoint import CheckpointError
from lowrank.infra.files import FolderInUseError, locked
from lowrank.infra.log import LogError, read_log
from lowrank.run.run import Run
from lowrank.run.session import open_session, restore
from lowrank.train.checkpointing import Saver
from lowrank.train.loop import NotFinite, train

METHODS = [name for name in lowrank.METHODS if name != "linear_probe"]  # its output layer is tied here: see below


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder / "log.jsonl") if "loss" in record]


@pytest.mark.parametrize("method", [*METHODS, "linear_probe"])
def test_stopping_and_resuming_is_bitwise_the_run_that_never_stopped(method: str, tmp_path: Path) -> None:
    train(tiny(method), tmp_path / "whole", quiet=True)
    train(tiny(method, stop_at=4), tmp_path / "parts", quiet=True)
    train(tiny(method), tmp_path / "parts", resume=True, quiet=True)
    whole = checkpoint.load(checkpoint.latest(tmp_path / "whole" / "checkpoints"))
    parts = checkpoint.load(checkpoint.latest(tmp_path / "parts" / "checkpoints"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(whole.tensors[name], parts.tensors[name]) for name in whole.tensors)


@pytest.mark.parametrize("changes", [{"model__dropout": 0.1}, {"grad_accum": 2}, {"precision": "bf16-weights"}])
def test_resuming_is_bitwise_with_dropout_accumulation_and_bfloat16_weights(
    changes: dict[str, object], tmp_path: Path
) -> None:
    train(tiny("lte", **changes), tmp_path / "whole", quiet=True)
    train(tiny("lte", **changes, stop_at=4), tmp_path / "parts", quiet=True)
    train(tiny("lte", **changes), tmp_path / "parts", resume=True, quiet=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_run_writes_its_folder_and_repeats_from_run_json(tmp_path: Path) -> None:
    summary = train(tiny("lora"), tmp_path / "a", quiet=True)

    train(Run.read(tmp_path / "a" / "run.json"), tmp_path / "b", quiet=True)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert {"run.json", "env.json", "log.jsonl", "summary.json", "checkpoints"} <= set(os.listdir(tmp_path / "a"))
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["val_loss"] == summary["val_loss"]
    records = read_log(tmp_path / "a" / "log.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert all({"lr", "grad_norm", "tokens_per_second", "step_seconds", "peak_bytes"} <= r.keys() for r in steps)
    assert all("loss" not in r for r in records if "val_loss" in r)


def test_micro_batches_accumulate_to_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    train(tiny("full", batch_size=8), tmp_path / "whole", quiet=True)
    train(tiny("full", batch_size=4, grad_accum=2), tmp_path / "parts", quiet=True)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize("method", ["full", "lte", "galore", "fira"])
def test_per_layer_updates_give_the_same_losses(method: str, tmp_path: Path) -> None:
    train(tiny(method, max_grad_norm="none"), tmp_path / "ordinary", quiet=True)
    train(tiny(method, max_grad_norm="none", per_layer=True), tmp_path / "inside", quiet=True)
    assert losses(tmp_path / "inside") == losses(tmp_path / "ordinary")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-weights"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_narrow_precisions_lower_the_loss(precision: str, per_layer: bool, tmp_path: Path) -> None:
    clip = {"max_grad_norm": "none", "clip_per_layer": 1.0} if per_layer else {}
    run = tiny("lora", steps=12, precision=precision, per_layer=per_layer, lr=1e-2, **clip)
    train(run, tmp_path / "run", quiet=True)
    found = losses(tmp_path / "run")
    assert all(map(math.isfinite, found))
    assert min(found[-3:]) < found[0] - 0.3


def test_compiling_changes_nothing_but_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile(model: torch.nn.Module) -> torch.nn.Module:
        compiled.append(model)
        return torch._dynamo.optimize("eager")(model)

    monkeypatch.setattr(torch, "compile", compile)
    train(tiny("lte", steps=4), tmp_path / "plain", quiet=True)
    train(tiny("lte", steps=4, compile=True), tmp_path / "compiled", quiet=True)
    assert len(compiled) == 1
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_the_body_is_compiled_too_where_the_loss_is_computed_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def compile(module: torch.nn.Module) -> torch.nn.Module:
        def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
            seen.append(type(module).__name__)
            return graph.forward

        return torch._dynamo.optimize(backend)(module)

    train(tiny("lte", steps=4), tmp_path / "plain", quiet=True)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("lowrank.models.text.CHUNK_ABOVE", 64)
    train(tiny("lte", steps=4, compile=True), tmp_path / "compiled", quiet=True)
    assert "GPT2Model" in seen
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_evaluation_is_on_the_merged_weights_between_two_merges(tmp_path: Path) -> None:
    run = tiny("lte", steps=6, eval_every=6)
    summary = train(run, tmp_path / "run", quiet=True)
    session, step = restore(tmp_path / "run", "latest")
    assert step == 6  # two steps after the merge at 4
    plain = lowrank.merge_and_unload(session.model)
    batches = open_session(run).data.evaluation("val", run.batch_size, run.eval_batches)
    assert evaluate(plain, batches, session.task)["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    session = open_session(tiny("full"))
    one = evaluate(session.model, session.data.evaluation("val", 1), session.task)
    seven = evaluate(session.model, session.data.evaluation("val", 7), session.task)
    assert one["loss"] == pytest.approx(seven["loss"], rel=1e-6)
    assert one["tokens"] == seven["tokens"]
    assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))


def test_each_rank_decodes_its_share_of_an_evaluation_alone() -> None:
    made: list[int] = []

    class Batches:
        def __len__(self) -> int:
            return 5

        def batch(self, n: int) -> dict[str, torch.Tensor]:
            made.append(n)
            return {"labels": torch.full((1,), n)}

    mine = [(int(batch["labels"]), counts) for batch, counts in _share(Batches(), rank=1, ranks=2)]  # type: ignore[arg-type]
    assert mine == [(1, True), (3, True), (4, False)]
    assert made == [1, 3, 4]


def test_the_published_convention_is_the_references_flaw_and_nothing_else() -> None:
    session = open_session(tiny("full"))
    batches = list(session.data.evaluation("val", 4, 5))
    found = evaluate(session.model, batches, session.task)
    session.model.eval()
    with torch.no_grad():
        means = [float(session.task.loss(session.model, b)) / session.task.count(b) for b in batches]
    assert found["published_convention"] == pytest.approx(math.exp(sum(means) / (len(means) + 1)), rel=1e-6)
    assert found["published_convention"] < found["perplexity"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny("full")
    session = open_session(run)
    healthy, calls = type(session.task).loss, []

    def loss(self: object, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(model.training)
        value = healthy(self, model, batch)  # type: ignore[arg-type]
        return value * math.nan if sum(calls) > 6 else value

    monkeypatch.setattr(type(session.task), "loss", loss)
    with pytest.raises(NotFinite, match=r"step 7.*step-00000004.*--lr"):
        train(run, tmp_path / "run", quiet=True)
    assert checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints")).step == 4


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """Seen at the loss, which is looked at only every log_every steps, they would have taken the good checkpoints'
    place."""
    run = tiny("full", lr=1e30, warmup=4, log_every=8, checkpoint_every=1)
    with pytest.raises(NotFinite, match=r"became .*checkpoint"):
        train(run, tmp_path / "run", quiet=True)
    for path in checkpoint.saved(tmp_path / "run" / "checkpoints"):
        assert all(t.isfinite().all() for t in checkpoint.load(path).tensors.values())


def test_a_longer_horizon_extends_a_finished_run(tmp_path: Path) -> None:
    train(tiny("lte"), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"already reached step 8 of 8.*larger --steps"):
        train(tiny("lte"), tmp_path / "run", resume=True, quiet=True)
    summary = train(tiny("lte", steps=12), tmp_path / "run", resume=True, quiet=True)
    assert summary["steps"] == 12
    assert len(losses(tmp_path / "run")) == 12


@pytest.mark.parametrize("summary", [None, '{"steps": 8', '{"steps": 8, "interrupted": true}'])
def test_a_run_killed_between_its_last_checkpoint_and_its_summary_is_finished(
    summary: str | None, tmp_path: Path
) -> None:
    whole, path = train(tiny("lte"), tmp_path / "run", quiet=True), tmp_path / "run" / "summary.json"
    before = (tmp_path / "run" / "log.jsonl").read_text()
    path.unlink() if summary is None else path.write_text(summary)
    assert train(tiny("lte"), tmp_path / "run", resume=True, quiet=True) == whole
    assert json.loads(path.read_text()) == whole
    assert (tmp_path / "run" / "log.jsonl").read_text() == before
    with pytest.raises(ValueError, match="already reached step 8 of 8"):
        train(tiny("lte"), tmp_path / "run", resume=True, quiet=True)


def test_what_is_not_finite_is_never_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([math.nan, 2.0, -math.inf, 1.0, math.nan, 3.0, math.nan, math.nan])
    monkeypatch.setattr("lowrank.train.loop.evaluate", lambda *_, **__: {"loss": next(values), "perplexity": 1.0})
    summary = train(tiny("full", eval_every=1), tmp_path / "run", quiet=True)
    assert summary["best_val_loss"] == 1.0
    assert checkpoint.best(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step-00000004"
    text = (tmp_path / "run" / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["val_loss"] is None


def test_two_do_not_write_one_run(tmp_path: Path) -> None:
    train(tiny("full", stop_at=4), tmp_path / "run", quiet=True)
    (tmp_path / "run" / "checkpoints" / "step-00000004.bak").mkdir()
    with locked(tmp_path / "run"), pytest.raises(FolderInUseError, match=f"being written by process {os.getpid()} on"):
        train(tiny("full"), tmp_path / "run", resume=True, quiet=True)
    assert train(tiny("full"), tmp_path / "run", resume=True, quiet=True)["steps"] == 8
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_folder_deleted_under_a_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = Saver.save

    def save(self: Saver, step: int, *args: object, **options: object) -> None:
        healthy(self, step, *args, **options)  # type: ignore[arg-type]
        shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(Saver, "save", save)
    with pytest.raises(LogError, match=r"run was deleted while .*nothing of it is left: start the run again"):
        train(tiny("full"), tmp_path / "run", quiet=True)


def test_weights_of_another_dtype_are_refused(tmp_path: Path) -> None:
    train(tiny("full", stop_at=4), tmp_path / "run", quiet=True)
    with pytest.raises(CheckpointError, match=r"is torch.bfloat16 in the model, torch.float32 in checkpoint.*--prec"):
        train(tiny("full", precision="bf16-weights"), tmp_path / "run", resume=True, quiet=True)


def test_resuming_with_another_method_is_refused_by_name(tmp_path: Path) -> None:
    train(tiny("lora", stop_at=4), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"trained with .*lora.*--init-from"):
        train(tiny("lte"), tmp_path / "run", resume=True, quiet=True)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(tiny("full", stop_at=4), tmp_path / "run", quiet=True)
    before = losses(tmp_path / "run")
    with pytest.raises(FileExistsError, match="--resume"):
        train(tiny("lora"), tmp_path / "run", quiet=True)
    assert losses(tmp_path / "run") == before


def test_a_merge_interval_beyond_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"merge_every=9 is longer than the run of 8 steps"):
        train(tiny("lte", method__merge_every=9), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_starting_from_another_runs_merged_weights(tmp_path: Path) -> None:
    warm = train(tiny("full"), tmp_path / "warm", quiet=True)
    run = replace(tiny("relora"), lr=1e-12)
    cold = train(run, tmp_path / "next", init_from=tmp_path / "warm", quiet=True)
    assert cold["val_loss"] == pytest.approx(warm["best_val_loss"], rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(number: int, tmp_path: Path) -> None:
    path = tmp_path / "start.json"
    tiny("lte", steps=100_000, eval_every=100_000, checkpoint_every=100_000).write(path)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lowrank", "train", str(path), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()  # the first step has been taken
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode in (0, 128 + number, 130)
    assert "--resume" in said
    saved = checkpoint.load(checkpoint.latest(out / "checkpoints"))
    assert saved.step == read_log(out / "log.jsonl")[-1]["step"]


@pytest.mark.parametrize("method", ["lte", "galore", "full"])
def test_what_a_run_changed_is_recorded_at_its_end(method: str, tmp_path: Path) -> None:
    """Beside the plain models at its start and at its end; a run that was resumed has no start."""
    run = tiny(method)
    train(run, tmp_path / "whole", quiet=True)
    found = json.loads((tmp_path / "whole" / "spectra.json").read_text())["layers"]
    ends = [
        merge_and_unload(session.model) for session in (open_session(run), restore(tmp_path / "whole", "latest")[0])
    ]
    before, after = ({each.name: each for each in linear_layers(model)} for model in ends)
    expected: dict[str, list[float]] = {"change": [], "effective_rank": []}
    for layer in (each for each in before.values() if "attention" in each.groups):
        start, end = (matrix_of(module).detach().double() for module in (layer.module, after[layer.name].module))
        shares = torch.linalg.svdvals(end - start)
        shares = shares[shares > 0] / shares.sum()
        expected["change"].append(float((end - start).norm() / start.norm()))
        expected["effective_rank"].append(math.exp(-float((shares * shares.log()).sum())))
    for name, values in expected.items():
        assert found["attention"][name] == pytest.approx(sum(values) / len(values), rel=1e-3)
    energies = [r["basis_energy"] for r in read_log(tmp_path / "whole" / "log.jsonl") if "basis_energy" in r]
    assert bool(energies) is (method == "galore")
    assert all(0 < energy < 1.001 for energy in energies)
    train(replace(run, stop_at=2), tmp_path / "parts", quiet=True)
    assert json.loads((tmp_path / "parts" / "spectra.json").read_text())["layers"]
    train(run, tmp_path / "parts", resume=True, quiet=True)
    assert json.loads((tmp_path / "parts" / "spectra.json").read_text()) == {"layers": {}}
