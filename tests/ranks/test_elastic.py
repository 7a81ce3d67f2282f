"""Runs that go on by themselves: killed in a step, a merge and a save, and with a disk lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.ranks.claims import assert_same_checkpoint
from tests.ranks.courses import of_gpt, train
from tests.ranks.start import ROOT, free_port, started

from lowrank.cli import app as cli
from lowrank.infra import checkpoint
from lowrank.infra.checkpoint import CheckpointError
from lowrank.infra.log import read_log
from lowrank.train.elastic import newest

SIZE = ["--model.n_layer=1", "--model.n_head=1", "--model.n_embd=8", "--model.context=16", "--data.context=16"]
OFTEN = ["--grad-accum=2", "--eval-every=6", "--eval-batches=3", "--checkpoint-every=2", "--device=cpu"]
LTE = ["--method=lte", "--method.merge_every=3", "--method.rank=2"]
RUN = ["train", "gpt-mini", "--elastic", *SIZE, *OFTEN, *LTE]
TOGETHER = [*RUN, "--steps=9", "--method.rest=train"]  # ``courses.of_gpt``, saved more often
ALONE = ["--batch-size=4"]
MESH = ["--engine=fsdp", "--workers=2", "--method.heads=2", "--batch-size=8"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.1"]


def killed(ranks: int, words: list[str], out: Path, straight: Path, *deaths: tuple[str, int, int]) -> None:
    """Started again after each of ``deaths`` (how and at which step, the rank that dies, the checkpoint that it goes on
    from), its log and last checkpoint are bitwise those of a run left alone, and nothing is left unfinished."""
    born, how = out.with_suffix(".born"), ",".join(death for death, _, _ in deaths)
    settings = {"LOWRANK_KILLED": how, "LOWRANK_BORN": str(born), "LOWRANK_TIMEOUT": "60"}
    lines = started("elastic", str(ranks), *TOGETHER, *words, "--out", str(out), **settings).splitlines()
    lived = sorted(line.split()[0] for line in born.read_text().splitlines())
    assert lived == [str(life) for life in range(len(deaths) + 1) for _ in range(ranks)]
    gone = [f"lowrank: rank {rank} (127.0.0.1) is gone; rank {1 - rank}" for _, rank, _ in deaths]
    told = [line.partition(" was waiting")[0] for line in lines if line.startswith("lowrank: rank")]
    told = [line for line in told if line in gone or ranks == 2]  # of more, one sees another survivor end
    expected = iter(gone)  # in this order; a launcher may stop a survivor before it tells
    assert told
    assert all(line in expected for line in told), told
    went_on = [int(line.rpartition("step-")[2]) for line in lines if line.startswith("going on from")]
    assert went_on == [step for _, _, step in deaths]
    assert not list((out / "checkpoints").glob(".writing-*"))
    logs = [read_log(at / "log.jsonl") for at in (out, straight)]
    one, other = ([(r["step"], r["loss"], r["grad_norm"]) for r in log if "loss" in r] for log in logs)
    assert one == other
    assert_same_checkpoint(out, straight)


@pytest.mark.slow
def test_killed_in_a_step_a_merge_and_a_save_it_goes_on(two: Path, tmp_path: Path) -> None:
    killed(2, ALONE, tmp_path / "run", two / "run", ("step@4", 1, 4), ("merge@5", 1, 4), ("save@7", 0, 6))


@pytest.mark.slow
def test_a_mesh_killed_in_a_step_and_in_its_part_of_a_save_goes_on(mesh: Path, tmp_path: Path) -> None:
    killed(4, MESH, tmp_path / "run", mesh / "unkilled", ("step@4", 1, 4), ("part@7", 1, 6))


@pytest.mark.slow
def test_when_the_host_of_the_rendezvous_dies_any_node_can_start_again(tmp_path: Path) -> None:
    """Two nodes, each with a launcher and a disk of its own. The first, which hosts, vanishes; the other's launcher
    fails, and the same command goes on from the disk that is left."""
    endpoint = f"localhost:{free_port()}"
    words = [*RUN, *ALONE, "--steps=1000"]
    nodes = [tmp_path / "first", tmp_path / "second"]
    started = [a_node(node, endpoint, words, host=node == nodes[0]) for node in nodes]
    saved = nodes[1] / "run" / "checkpoints"
    try:
        until(lambda: len(checkpoint.saved(saved)) > 1, started)
        worker = (nodes[0] / "born").read_text().splitlines()[-1].split()[3]
        for pid in (started[0].pid, int(worker)):
            os.kill(pid, signal.SIGKILL)
        _, error = started[1].communicate(timeout=90)
    finally:
        for each in started:
            each.kill()
            each.communicate()
    assert started[1].returncode == 1, error
    assert "RendezvousConnectionError" in error
    step = checkpoint.step_of(checkpoint.latest(saved))
    assert cli.main([*words, "--quiet", f"--stop-at={step + 2}", "--out", str(nodes[1] / "run")]) == 0
    steps = [record["step"] for record in read_log(nodes[1] / "run" / "log.jsonl") if "loss" in record]
    assert steps == list(range(1, step + 3))


def a_node(node: Path, endpoint: str, words: list[str], *, host: bool) -> subprocess.Popen[str]:
    """A launcher with one slow rank; two make a group, and one is enough."""
    node.mkdir()
    how = [*TORCHRUN, "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=run"]
    meeting = [f"--rdzv-endpoint={endpoint}", f"--rdzv-conf=last_call_timeout=5,is_host={int(host)}"]
    settings = {"LOWRANK_KILLED": "wait@0.1", "LOWRANK_BORN": str(node / "born"), "LOWRANK_TIMEOUT": "60"}
    return subprocess.Popen(
        [*how, *meeting, "-m", "tests.ranks.killed", *words, "--out", str(node / "run")],
        cwd=ROOT,
        env={**os.environ, **settings, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def until(true: Callable[[], bool], alive: list[subprocess.Popen[str]], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "this takes too long"
        for each in alive:
            assert each.poll() is None, each.communicate()[1]
        time.sleep(0.1)


def test_elastic_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Starts, goes on after each stop, passes over a damaged checkpoint by name, and has nothing to do at the end."""
    out, words = tmp_path / "run", [*TOGETHER, *ALONE, "--quiet", "--out", str(tmp_path / "run")]
    assert cli.main([*words, "--stop-at=4"]) == 0
    (checkpoint.latest(out / "checkpoints") / "model.safetensors").write_bytes(b"spoilt")
    found, told = newest(out, None, writer=True)
    assert found == out / "checkpoints" / "step-00000002"
    assert told[0].startswith(
        f"checkpoint {out / 'checkpoints' / 'step-00000004'} is damaged: model.safetensors has 6 b"
    )
    assert cli.main(words) == 0
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("step 9:") == 2
    assert [r["step"] for r in read_log(out / "log.jsonl") if "loss" in r] == list(range(1, 10))
    straight = train(of_gpt(**{"checkpoint-every": 2}), tmp_path / "b")
    assert straight["val_loss"] == checkpoint.load(checkpoint.latest(out / "checkpoints")).meta["metrics"]["val_loss"]


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    run = of_gpt(steps=3)
    train(run, tmp_path / "run")
    for folder in checkpoint.saved(tmp_path / "run" / "checkpoints"):
        shutil.rmtree(folder)
    train(run, tmp_path / "run", elastic=True)
    assert [r["step"] for r in read_log(tmp_path / "run" / "log.jsonl") if "loss" in r] == [1, 2, 3]


def test_what_elastic_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main([*RUN, *ALONE]) == 2
    assert "give --out DIR" in capsys.readouterr().err
    train(of_gpt(steps=3), out)
    assert cli.main([*TOGETHER, *ALONE, "--lr=1", "--out", str(out)]) == 2
    assert "this would change" in capsys.readouterr().err
    for folder in checkpoint.saved(out / "checkpoints"):
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state.json is missing.*: no good one is left; remove the run's folder"):
        newest(out, None, writer=True)
