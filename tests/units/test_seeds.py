"""Random streams by purpose."""

import subprocess
import sys

import torch

from lowrank.infra.seeds import draw_normal, generator, stable_seed


def test_the_same_in_every_process() -> None:
    code = "from lowrank.infra.seeds import stable_seed; print(stable_seed(0, 'h.0.attn', 3, 1.5, None))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": str(i)}
        ).stdout
        for i in (1, 2)
    }
    assert seen == {f"{stable_seed(0, 'h.0.attn', 3, 1.5, None)}\n"}


def test_a_known_value() -> None:
    """Runs are repeated years later: the streams must never change."""
    assert stable_seed(0, "h.0.attn", 0, 0) == 2202861445987849386


def test_fits_a_generator() -> None:
    seeds = [stable_seed(i) for i in range(2000)]
    assert len(set(seeds)) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.Generator().manual_seed(max(seeds)).initial_seed() == max(seeds)


def test_keys_do_not_run_together() -> None:
    assert (
        len({stable_seed(1, 23), stable_seed(12, 3), stable_seed("1 23"), stable_seed(123), stable_seed("12", "3", "")})
        == 5
    )


def test_draws() -> None:
    a = draw_normal((200, 50), 0, "x")
    assert a.dtype is torch.float32
    assert torch.equal(a, draw_normal((200, 50), 0, "x"))
    assert not torch.equal(a, draw_normal((200, 50), 1, "x"))
    assert abs(float(a.mean())) < 0.05
    assert abs(float(a.std()) - 1) < 0.05
    assert generator("cpu", 3).initial_seed() == stable_seed(3)
