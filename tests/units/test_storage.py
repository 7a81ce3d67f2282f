"""AdamW with narrow moments: close to float32, the documented bytes, and no number of a second moment lost."""

import pytest
import torch
from benchmarks.projected import Live
from torch import nn

from lowrank.linalg import chunks
from lowrank.optim import AdamW, Optimizer
from lowrank.optim.state import leaves


def train(storage, shape=(30, 40), steps=200):
    noise = torch.Generator().manual_seed(0)
    p, target = torch.randn(2, *shape, generator=noise)
    scale = torch.logspace(-3, 0, shape[-1])  # columns whose gradients are a thousand times smaller share their blocks
    rule = AdamW(storage=storage)
    state = rule.init(p)
    for _ in range(steps):
        g = (p - target + 0.3 * torch.randn(shape, generator=noise)) * scale
        rule.apply_([p], [g], [state], lr=0.01, decay=0.01)
    return p, target, state


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_narrow_moments_stay_close_to_float32(storage):
    exact, target, _ = train("float32")
    narrow, _, _ = train(storage)
    start = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(0))[0]
    assert (narrow - exact).norm() < 0.05 * (exact - start).norm()
    columns = (narrow - target).norm(dim=0) / (exact - target).norm(dim=0)
    assert columns.max() < 1.2  # the small ones learn as well as the large ones


@pytest.mark.parametrize("shape", [(), (7,), (300,), (30, 40), (2, 5, 7)], ids=str)
def test_bytes(shape):
    def held(storage):
        state = AdamW(storage=storage).init(torch.empty(shape, device="meta"))
        moments = (state["exp_avg"], state["exp_avg_sq"])
        return sum(t.nbytes for m in moments for t in (m.values() if isinstance(m, dict) else [m]))

    numbers = torch.Size(shape).numel()
    matrices = torch.Size(shape[:-2]).numel()
    blocks = -(-(numbers // matrices) // 256)
    padded = -(-(numbers // matrices) // blocks) * blocks
    assert held("float32") == 8 * numbers
    assert held("bfloat16") == 4 * numbers
    assert held("int8") == 2 * matrices * (padded + 4 * blocks)


def test_a_small_second_moment_beside_a_large_one_does_not_become_zero():
    rule, g = AdamW(storage="int8"), torch.full((256,), 1e-4)
    g[0] = 1.0
    state = rule.init(g)
    directions = [rule.update(g, state) for _ in range(20)]
    assert all((gain * direction).abs().max() < 3 for direction, gain in directions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_large_parameter_in_parts_steps_as_the_whole_in_bounded_space(
    dtype: torch.dtype, per_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, its rounding included; a step needs a part's tensors and not the parameter's."""
    found = []
    for at_once in (1 << 16, 1 << 11):
        monkeypatch.setattr(chunks, "CPU", at_once)
        p = nn.Parameter(torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to(dtype))
        optimizer = Optimizer([{"params": [p], "rule": AdamW(storage="int8"), "lr": 0.1}], per_layer=per_layer)
        for n in range(3):
            x = torch.randn(p.shape, generator=torch.Generator().manual_seed(n)).to(dtype)
            with Live() as seen:
                (p * x).sum().backward()
                optimizer.step()
            p.grad = None
        found.append((p.detach().clone(), dict(leaves(optimizer.state[p])), seen.peak / p.numel()))
    (whole, state, much), (divided, again, little) = found
    assert torch.equal(whole, divided)
    assert all(torch.equal(t, again[path]) for path, t in state.items())
    assert little < much / 2
