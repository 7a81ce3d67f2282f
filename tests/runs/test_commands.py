"""The command line end to end, on the built-in text and on real data where the checkout has some."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank.cli.app import main
from lowrank.infra.log import read_log

SMALL = "--steps 6 --eval-every 3 --eval-batches 2 --batch-size 4 --model.n_layer 1 --model.n_embd 32 --data.context 32"


def lowrank(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    code = main(command.split())
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder / "log.jsonl") if "loss" in record]


@pytest.mark.parametrize("source", ["builtin", "cnn_dailymail_sample.csv"])
def test_train_repeat_resume_generate_eval_export(
    source: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    data = source if source == "builtin" else str(request.getfixturevalue("shared_data") / source)
    lte = "--method lte --method.rank 4 --method.heads 4 --method.merge_every 3"
    run, again = tmp_path / "run", tmp_path / "again"
    lowrank(f"train gpt-mini --data {data} {lte} {SMALL} --out {run}", capsys)
    lowrank(f"train {run}/run.json --out {again}", capsys)
    assert losses(run) == losses(again)
    lowrank(f"train --resume {run} --steps 9", capsys)
    assert len(losses(run)) == 9
    assert lowrank(f"generate {run} --prompt The --tokens 5", capsys).startswith("The")
    assert "loss" in lowrank(f"eval {run} --split test --batches 2", capsys)
    lowrank(f"export {run} {tmp_path / 'plain'}", capsys)
    assert (tmp_path / "plain" / "model.safetensors").is_file()


def test_the_plan_of_gpt2_names_what_trains_and_the_tied_head(capsys: pytest.CaptureFixture[str]) -> None:
    said = lowrank("plan gpt2-pretrain --method.freeze *.attn.*.bias", capsys)
    assert "96.619 M" in said
    assert "transformer.wte.weight is also lm_head.weight (tied)" in said


def test_a_comparison_writes_table_page_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = lowrank(f"compare gpt-mini --methods full,lte {SMALL.replace('6', '12', 1)} --out {tmp_path}/c", capsys)
    assert "full" in said
    assert "lte" in said
    assert all((tmp_path / "c" / name).is_file() for name in ("report.html", "report.md", "curves.png"))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train gpt-mini --method ltee", "did you mean 'lte'"),
        ("train gpt-mni", "did you mean 'gpt-mini'"),
        ("train gpt-mini --method lora --method.rnk 4", "did you mean 'rank'"),
        ("train gpt-mini --method lora --method.rank 0", "rank"),
        ("train gpt-mini --method lora --method.rank 4096", "at most 128"),
        ("train gpt-mini --method lte --method.heads 64", "heads"),
        ("train gpt-mini --method lora --method.target_modules *.attnn.*", "did you mean"),
        ("train gpt-mini --method lora --method.target_modules ln_1", "no matrix to adapt"),
        ("train gpt-mini --data missing.csv", "missing.csv"),
        ("train gpt-mini --model.vocab_size 50", "vocabulary"),
        ("train gpt-mini --per-layer", "--clip-per-layer"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    command: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*command.split(), "--out", str(out)]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()
