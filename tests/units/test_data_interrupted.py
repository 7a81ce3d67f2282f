"""Interrupted, damaged or prepared twice at once: a folder of tokens is whole or not there."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank.data import Tokens, prepare
from lowrank.data.cache import cache_root, locked, published
from lowrank.data.text.tokenizers import train_bpe

Write = Callable[[str, str | bytes], Path]
TEXT = "".join(f"The {n}th line of a text that is long enough.\n" for n in range(500))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


PREPARE_AND_DIE = """
import os, signal, sys
from lowrank.data import prepare

def die(done, total):
    if done > 3_000_000:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with Ctrl-C ignored
    prepare(sys.argv[1], progress=die)
"""


@pytest.mark.parametrize("by", ["SIGKILL", "SIGINT"])
def test_an_interrupted_preparation_leaves_nothing_that_looks_whole(by: str, write: Write) -> None:
    path, script = write("a.txt", TEXT * 250), write("die.py", PREPARE_AND_DIE)
    environment = {**os.environ, "LOWRANK_CACHE": str(cache_root())}
    command = [sys.executable, str(script), str(path), by]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == -getattr(signal, by), process.stderr
    found = list((cache_root() / "tokens").iterdir())
    assert not [path for path in found if not path.name.startswith(".")]
    leftovers = [path for path in found if path.is_dir()]
    assert len(leftovers) == (1 if by == "SIGKILL" else 0)
    tokens = prepare(path)
    assert sum(tokens.count(split) for split in tokens.splits) == len(TEXT) * 250
    assert not [path for path in (cache_root() / "tokens").glob(".*") if path.is_dir()]


def test_two_processes_prepare_once(write: Write) -> None:
    path = write("a.txt", TEXT * 100)
    script = write("both.py", "import sys\nfrom lowrank.data import prepare\nprint(prepare(sys.argv[1]).count())\n")
    environment = {**os.environ, "LOWRANK_CACHE": str(cache_root())}
    processes = [
        subprocess.Popen([sys.executable, str(script), str(path)], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert outputs[0] == outputs[1] == f"{prepare(path).count()}\n"


def test_without_locks_the_first_to_finish_wins(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with published(final) as mine, published(final) as other:
        assert mine != other
        (other / "a").write_text("other")
        (mine / "a").write_text("mine")
    assert contents(final) == {"a": b"other"}
    assert list(tmp_path.iterdir()) == [final]


def test_a_lock_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waiter = (
        "import pathlib, sys\nfrom lowrank.data.cache import locked\n"
        "with locked(pathlib.Path(sys.argv[1])) as alone:\n    print(alone)\n"
    )
    with locked(tmp_path / "final") as alone:
        if not alone:
            pytest.skip("no locks on this file system")
        command = [sys.executable, "-c", waiter, str(tmp_path / "final")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert "waiting for another process" in process.stderr.readline()
        assert process.poll() is None
    assert process.communicate(timeout=60)[0] == "True\n"


def test_damage_is_found_and_repaired_in_the_cache(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("a.txt", TEXT)
    folder = prepare(path).folder
    before = contents(folder)
    with open(folder / "train.bin", "r+b") as file:
        file.truncate(1001)
    with pytest.raises(ValueError, match=r"train\.bin has 1,001 bytes, meta\.json says .* damaged"):
        Tokens.load(folder)
    assert contents(prepare(path).folder) == before
    assert "preparing again" in capsys.readouterr().err
    (folder / "val.ends.bin").unlink()
    with pytest.raises(ValueError, match=r"val\.ends\.bin is missing"):
        Tokens.load(folder)
    (folder / "meta.json").write_text('{"format": "lowrank-tokens"}')
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        Tokens.load(folder)
    later = json.loads(before["meta.json"]) | {"version": 99}
    (folder / "meta.json").write_text(json.dumps(later))
    with pytest.raises(ValueError, match="later lowrank"):
        Tokens.load(folder)


def test_a_folder_of_the_users_is_never_overwritten(write: Write, tmp_path: Path) -> None:
    path = write("a.txt", TEXT)
    write("mine/notes.txt", "keep")
    with pytest.raises(ValueError, match="something else than prepared tokens"):
        prepare(path, out=tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    tokens = prepare(path, out=tmp_path / "empty")
    assert tokens.folder == tmp_path / "empty"
    assert prepare(path, out=tmp_path / "empty") == tokens
    with pytest.raises(ValueError, match="holds other tokens"):
        prepare(path, out=tmp_path / "empty", tokenizer="chars")
    with open(tmp_path / "empty" / "val.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="damaged"):
        prepare(path, out=tmp_path / "empty")


# The cache


def test_what_lies_prepared_is_read_without_a_lock(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.txt", TEXT)
    tokens = prepare(path)
    monkeypatch.setattr("lowrank.data.text.prepare.locked", None)
    assert prepare(path) == tokens


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_users_umask(mask: int, write: Write) -> None:
    before = os.umask(mask)
    try:
        folder = prepare(write("a.txt", TEXT), tokenizer="bpe:300").folder
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}


def test_a_cache_that_cannot_be_is_named(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.txt", TEXT)
    write("file", "in the way")
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot be written .* set LOWRANK_CACHE to another folder"):
        prepare(path)
    monkeypatch.delenv("LOWRANK_CACHE")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match=r"no home folder .* set LOWRANK_CACHE"):
        prepare(path)


def test_a_full_disk_is_named_and_leaves_nothing(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lowrank.data.text.prepare.SplitWriter.add", full)
    with pytest.raises(OSError, match=r"its disk is full; nothing half-written is left there: set LOWRANK_CACHE"):
        prepare(write("a.txt", TEXT))
    assert not [path for path in (cache_root() / "tokens").iterdir() if path.is_dir()]


def test_a_fingerprint_is_of_the_tokens(write: Write, tmp_path: Path) -> None:
    one, moved = prepare(write("a.txt", TEXT)), prepare(write("b/other.txt", TEXT), out=tmp_path / "out")
    assert one.fingerprint == moved.fingerprint
    others = [prepare(write("a.txt", TEXT.replace("7", "8", 1))), prepare(tmp_path / "b/other.txt", test_fraction=0)]
    assert len({tokens.fingerprint for tokens in (one, *others)}) == 3


@pytest.mark.parametrize("ends", ["os.abort()", "os.kill(os.getpid(), 9)", "raise MemoryError"])
def test_a_bpe_that_ends_for_want_of_memory_says_so(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank.data.text.tokenizers._TRAINER", f"import os, sys\nsys.stdin.buffer.read(99)\n{ends}")
    with pytest.raises(MemoryError, match=r"BPE of 300 ids ended with status .* give it less text \(limit=BYTES\)"):
        train_bpe(300, [TEXT] * 100)
