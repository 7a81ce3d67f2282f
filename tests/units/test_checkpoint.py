"""Checkpoints come back bit by bit, survive kills and full disks, and never pass damage on."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from lowrank.infra import checkpoint
from lowrank.infra.checkpoint import CheckpointError, best, discard_after, latest, load, save, saved
from lowrank.infra.checkpoint_tensors import pack, random_state, set_random_state_, unpack

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
]


def some_tensors():
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


def some_optimizer():
    return {
        "state": {0: {"mean": torch.ones(2, 3), "inner": {"step": torch.tensor(3)}}, 1: {}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1], "param_names": ["weight", "bias"]}],
    }


def save_some(root, step, **options):
    return save(root, step, some_tensors(), some_optimizer(), {"best": 1.5}, **options)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_everything_comes_back_with_its_kind(tmp_path):
    meta = {
        "step": 3,
        "best": float("inf"),
        "none": None,
        "flag": True,
        "tuple": (1, (2.5, "x")),
        "odd": {"*tensor": 1, 3: [{"b": None}]},
    }
    folder = save(tmp_path, 3, some_tensors(), some_optimizer(), meta)
    found = load(folder)
    assert found.step == 3
    assert same(some_tensors(), dict(sorted(found.tensors.items(), reverse=True)))
    assert same(some_optimizer(), found.optimizer)
    assert same(meta, found.meta)
    assert sorted(found.names("model")) == sorted(some_tensors())
    assert sorted(found.names("optimizer")) == ["optimizer.state.0.inner.step", "optimizer.state.0.mean"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_are_kept(tmp_path, dtype):
    tensor = torch.tensor([0, 1, 2, 3]).to(dtype)
    found = load(save(tmp_path, 1, {"x": tensor}, {"state": {0: tensor.clone()}}, {}))
    for each in (found.tensors["x"], found.optimizer["state"][0]):
        assert each.dtype == dtype
        assert torch.equal(each.view(torch.uint8), tensor.view(torch.uint8))


def test_no_pickle_anywhere(tmp_path):
    folder = save_some(tmp_path, 1)
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    weight = torch.randn(1000, 8)
    found = load(save(tmp_path, 1, {"wte": weight, "lm_head": weight}, {}, {}))
    assert found.tensors["lm_head"] is found.tensors["wte"]
    assert (sorted(found.names("model")), found.names("optimizer")) == (["lm_head", "wte"], [])
    assert torch.equal(found.tensors["wte"], weight)
    assert (latest(tmp_path) / "model.safetensors").stat().st_size < 1.5 * weight.nbytes


def test_views_slices_and_layouts_come_back(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "base": base,
        "slice": base[:, :3],
        "by_columns": torch.randn(5, 3).t(),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "empty": torch.empty(0, 3),
        "also_empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }
    whole = load(save(tmp_path, 1, tensors, {"apart": dict(reversed(tensors.items()))}, {}))
    found = whole.tensors
    for name, tensor in whole.optimizer["apart"].items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.stride() == found[name].stride()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    for name in ("by_columns", "channels_last"):
        assert found[name].stride() == tensors[name].stride(), "rounding depends on the layout"


def test_packing_is_undone_for_every_order_of_dimensions():
    x = torch.randn(2, 3, 4)
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        permuted = x.permute(order)
        found = unpack(*pack({"x": permuted}))["x"]
        assert torch.equal(found, permuted)
        assert found.stride() == permuted.stride()


def test_objects_are_refused_by_path(tmp_path):
    with pytest.raises(TypeError, match=r"optimizer\.param_groups\.0\.rule is a object"):
        save(tmp_path, 1, {}, {"param_groups": [{"rule": object()}]}, {})
    assert saved(tmp_path) == []


def test_random_generators_go_on_where_they_were(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    torch.randn(3), np.random.randn(3), random.gauss(0, 1)
    folder = save(tmp_path, 1, {}, {}, {"random": random_state()})
    expected = random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    set_random_state_(load(folder).meta["random"])
    assert (random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn()) == expected


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        save_some(tmp_path, step, keep=2, best=step == 2)
    assert [folder.name for folder in saved(tmp_path)] == ["step-00000002", "step-00000005", "step-00000006"]
    assert latest(tmp_path).name == "step-00000006"
    assert best(tmp_path).name == "step-00000002"


def test_a_better_one_frees_the_old_best(tmp_path):
    save_some(tmp_path, 1, keep=1, best=True)
    save_some(tmp_path, 2, keep=1, best=True)
    assert [folder.name for folder in saved(tmp_path)] == ["step-00000002"]


def test_the_best_of_every_kept_one_is_kept(tmp_path):
    """Whoever goes back to step 3, because step 4 is damaged, has the best that step 3 knew of."""
    for step in (1, 2, 3, 4):
        save_some(tmp_path, step, keep=2, best=step in (1, 4))
    assert [folder.name for folder in saved(tmp_path)] == [f"step-0000000{n}" for n in (1, 3, 4)]
    discard_after(tmp_path, 3)
    assert best(tmp_path).name == "step-00000001"


def test_a_checkpoint_that_may_have_been_the_best_is_neither_passed_over_nor_pruned(tmp_path):
    for step in (1, 2, 3):
        save_some(tmp_path, step, keep=3, best=step < 3)
    damaged = tmp_path / "step-00000002"
    (damaged / "manifest.json").write_text("")
    save_some(tmp_path, 4, keep=1)
    assert [folder.name for folder in saved(tmp_path)] == [f"step-0000000{n}" for n in (1, 2, 4)]
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged: .*whether it was the best.*step-00000004"):
        best(tmp_path)
    assert checkpoint.passed_over(tmp_path) == []
    shutil.rmtree(damaged)
    assert best(tmp_path).name == "step-00000001"
    assert checkpoint.passed_over(tmp_path) == [f"{damaged}, which was the best, is gone: another takes its place"]
    discard_after(tmp_path, 1)
    assert checkpoint.passed_over(tmp_path) == []


def test_the_best_of_a_run_begun_with_an_earlier_version(tmp_path):
    """Which wrote it into best.json alone, and neither format's version nor a mark into manifests."""
    for step in (1, 2, 3):
        folder = save_some(tmp_path, step, keep=5)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({"files": manifest["files"]}))
    (tmp_path / "best.json").write_text('{"folder": "step-00000001", "step": 1}')
    save_some(tmp_path, 4, keep=1)
    assert [folder.name for folder in saved(tmp_path)] == ["step-00000001", "step-00000004"]
    assert load(best(tmp_path)).step == 1


@pytest.mark.parametrize("name", ["step-00000010.bak", "step-00000010 (copy)", "step-00000010", "step-latest"])
def test_what_is_called_like_a_checkpoint_and_is_none_is_ignored_and_named(tmp_path, name):
    folder = save_some(tmp_path / "root", 1)
    stranger = tmp_path / "root" / name
    stranger.symlink_to(folder) if name == "step-00000010" else stranger.mkdir()
    assert checkpoint.foreign(tmp_path / "root") == [stranger]
    assert latest(tmp_path / "root") == folder
    save_some(tmp_path / "root", 2, keep=1)
    discard_after(tmp_path / "root", 2)
    assert stranger.is_symlink() or stranger.is_dir()


def test_a_newer_format_is_refused_by_the_version_that_wrote_it(tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr("lowrank.infra.checkpoint_files.FORMAT", 2)
        later.setattr("lowrank.__version__", "9.1")
        folder = save_some(tmp_path, 1)
    for call in (lambda: load(folder), lambda: checkpoint.newest_good(tmp_path)):
        with pytest.raises(CheckpointError, match=r"is of format 2, written by lowrank 9\.1; .* reads up to format 1"):
            call()


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save_some(tmp_path, step)
    assert latest(tmp_path).name == "step-100000000"


def test_a_step_saved_again_replaces_the_first(tmp_path):
    save(tmp_path, 5, {"x": torch.zeros(1)}, {}, {})
    save(tmp_path, 5, {"x": torch.ones(1)}, {}, {})
    assert len(saved(tmp_path)) == 1
    assert load(latest(tmp_path)).tensors["x"].item() == 1.0


def test_discard_after_leaves_earlier_ones(tmp_path):
    for step in (1, 2, 3):
        save_some(tmp_path, step, keep=5, best=step == 3)
    discard_after(tmp_path, 3)
    assert best(tmp_path).name == "step-00000003"
    assert (tmp_path / "best.json").is_file()
    discard_after(tmp_path, 2)
    assert not (tmp_path / "best.json").exists()
    assert [folder.name for folder in saved(tmp_path)] == ["step-00000001", "step-00000002"]
    assert best(tmp_path) is None


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        latest(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*step-00000007; there is no good one"):
        load(tmp_path / "step-00000007")
    assert best(tmp_path) is None
    with pytest.raises(ValueError, match="keep=0"):
        save_some(tmp_path, 1, keep=0)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [truncate, flip, os.remove])
def test_damage_is_found_and_the_previous_good_one_named(tmp_path, name, harm):
    save_some(tmp_path, 1)
    save_some(tmp_path, 2)
    harm(tmp_path / "step-00000002" / name)
    with pytest.raises(CheckpointError, match="step-00000002 is damaged") as caught:
        load(latest(tmp_path))
    assert f"the previous good one is {tmp_path / 'step-00000001'}: delete the damaged folder" in str(caught.value)
    assert load(tmp_path / "step-00000001").step == 1


def test_damage_to_an_older_one_names_the_newest_good_one(tmp_path):
    for step in (1, 2, 3, 4):
        save_some(tmp_path, step, keep=4)
    truncate(tmp_path / "step-00000004" / "state.json")
    truncate(tmp_path / "step-00000001" / "state.json")
    with pytest.raises(CheckpointError, match=r"step-00000001 is damaged: .*; a good one is .*step-00000003$"):
        load(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=r"the previous good one is .*step-00000003: delete the damaged folder"):
        load(tmp_path / "step-00000004")


def test_damage_to_all_is_said(tmp_path):
    for step in (1, 2):
        truncate(save_some(tmp_path, step) / "state.json")
    with pytest.raises(CheckpointError, match="there is no good one"):
        load(latest(tmp_path))


@pytest.mark.parametrize("call", ["save_file", "write_json"])
@pytest.mark.parametrize(
    ("error", "cause", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full", "make room and resume"),
        (OSError(errno.EIO, "bad disk"), r"\[Errno 5\] bad disk", "resume once that is mended"),
        (PermissionError(errno.EACCES, "not yours"), r"\[Errno 13\] not yours", "resume once that is mended"),
    ],
)
def test_what_cannot_be_saved_leaves_the_old_ones(tmp_path, monkeypatch, call, error, cause, remedy):
    save_some(tmp_path, 1)
    save_some(tmp_path, 2)

    def fails(*arguments, **options):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, call, fails)
        said = (
            f"could not save .* step 3 in .*: {cause}; the earlier checkpoint .*step-00000002 is untouched; {remedy}$"
        )
        with pytest.raises(CheckpointError, match=said):
            save_some(tmp_path, 3)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert load(latest(tmp_path)).step == 2
    assert load(save_some(tmp_path, 3)).step == 3


def test_a_full_disk_under_safetensors_itself(tmp_path, monkeypatch):
    """Its writer raises an error of its own that only its text tells from others."""
    from safetensors import SafetensorError

    def full(*arguments, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="the disk is full; no earlier one exists"):
        save_some(tmp_path, 1)


@pytest.mark.parametrize("moment", ["first file", "manifest", "rename", "best.json", "prune"])
def test_kill_in_the_middle_of_a_save_leaves_a_good_one(tmp_path, moment):
    """SIGKILL at each stage of the second save; the first, or both, must load, and the next save must go through."""
    code = f"""
import os, signal, torch
from pathlib import Path
from lowrank.infra import checkpoint

def kill(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

root = Path({str(tmp_path)!r})
checkpoint.save(root, 1, {{"x": torch.ones(3)}}, {{}}, {{}}, keep=1, best=True)
moment = {moment!r}
if moment == "first file":
    whole = checkpoint.save_file
    checkpoint.save_file = lambda *a, **o: (whole(*a, **o), kill())
elif moment == "manifest":
    checkpoint.measure = kill
elif moment == "rename":
    Path.rename = kill
elif moment == "best.json":
    written = checkpoint.write_json
    checkpoint.write_json = lambda path, *a, **o: kill() if path.name == "best.json" else written(path, *a, **o)
else:
    checkpoint.prune_ = kill
checkpoint.save(root, 2, {{"x": torch.full((3,), 2.0)}}, {{}}, {{}}, keep=1, best=True)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    expected = 2 if moment in ("best.json", "prune") else 1
    found = load(latest(tmp_path))
    assert found.step == expected
    assert torch.equal(found.tensors["x"], torch.full((3,), float(expected)))
    save(tmp_path, 3, {"x": torch.zeros(3)}, {}, {}, keep=1)
    assert best(tmp_path).name == f"step-{expected:08d}", "what the last complete checkpoint said to be the best"
    left = {best(tmp_path).name, "step-00000003", "best.json"}
    assert {file.name for file in tmp_path.iterdir()} == left, "what the killed process left is removed"


def test_state_json_is_json_for_everybody(tmp_path):
    folder = save(tmp_path, 1, {}, {}, {"best": float("nan")})
    json.loads((folder / "state.json").read_text(), parse_constant=pytest.fail)
