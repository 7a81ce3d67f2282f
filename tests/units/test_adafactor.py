"""Adafactor as a rule: the drop-in's trajectory, torch's, the parameter scale, stacks of matrices."""

import pytest
import torch

from lowrank.optim import Adafactor, GaLoreAdafactor


def gradients(shape, count=12):
    noise = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=noise) + 0.5 for _ in range(count)]


def run(rule, shape, lr=1.0, decay=0.0):
    p = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    state = rule.init(p)
    for g in gradients(shape):
        rule.apply_([p], [g], [state], lr=lr, decay=decay)
    return p, state


@pytest.mark.parametrize("shape", [(6, 9), (7,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"beta1": 0.9}, {"warmup_init": True}], ids=str)
def test_the_papers_switches_give_the_drop_ins_trajectory(shape, options):
    ours, _ = run(Adafactor(scale_parameter=True, relative_step=True, **options), shape)
    theirs = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    optimizer = GaLoreAdafactor([theirs], **options)
    for g in gradients(shape):
        theirs.grad = g
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-6)


def test_torchs_adafactor_where_the_two_agree():
    """torch's has the relative step, the parameter scale and clipping, with lr as the cap of the step."""
    ours, _ = run(Adafactor(eps=(1e-30, 1e-3), scale_parameter=True, relative_step=True), (6, 9), decay=0.1 * 0.01)
    theirs = torch.nn.Parameter(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adafactor([theirs], lr=0.01, eps=(1e-30, 1e-3), weight_decay=0.1)
    for g in gradients((6, 9)):
        theirs.grad = g
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=1e-5)


def test_state_is_sublinear():
    state = Adafactor().init(torch.empty(100, 200, device="meta"))
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "step": (),
        "exp_avg_sq_row": (100,),
        "exp_avg_sq_col": (200,),
    }
