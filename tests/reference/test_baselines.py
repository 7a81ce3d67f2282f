"""The baselines' rules against the papers' equations in float64, and Muon against ``torch.optim.Muon``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import gpt2, llama, text_loss, tokens
from tests.reference import baselines
from torch import Tensor

import lowrank
from lowrank.linalg.basis import random_basis
from lowrank.optim import (
    Adafactor,
    AdamW,
    ColumnNormalised,
    Dion,
    LoraMuon,
    LoraRite,
    Muon,
    PairRule,
    Projected,
    Rule,
    Soap,
)
from lowrank.optim.state import leaves

SHAPES = [(6, 9), (9, 6), (7, 7)]
RULES: dict[str, tuple[Rule, Callable[..., baselines.Array]]] = {
    "muon": (Muon(), baselines.muon),
    "muon-keller": (
        Muon(scale="keller", momentum=0.8),
        lambda *given: baselines.muon(*given, momentum=0.8, scale=lambda out, inn: max(1, out / inn) ** 0.5),
    ),
    "scale": (ColumnNormalised(), baselines.scale),
    "soap-short": (  # of the long side's first preconditioner half is zero, and the basis there arbitrary
        Soap(refresh_every=3, largest=7),
        lambda w, *given: baselines.soap(w, *given, sides="".join("lr"[i] for i in (0, 1) if w.shape[i] <= 7)),
    ),
    "dion": (
        Dion(rank=3),
        lambda w, *given: baselines.dion(
            w, *given, Q=random_basis(w.shape[1], 3, torch.zeros((), dtype=torch.float64), 0).numpy()
        ),
    ),
    "adafactor": (Adafactor(), baselines.adafactor),
    "scale-head": (ColumnNormalised(momentum=0.9), lambda *given: baselines.scale(*given, momentum=0.9)),
}


def gradients(shape: tuple[int, ...], count: int = 12) -> list[Tensor]:
    noise = torch.Generator().manual_seed(1)
    mean = torch.randn(shape, generator=noise, dtype=torch.float64)
    return [mean + 0.5 * torch.randn(shape, generator=noise, dtype=torch.float64) for _ in range(count)]


def weight(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def stepped(rule: Rule, p: Tensor, gs: list[Tensor], lr: float = 0.02, decay: float = 0.1) -> Tensor:
    p, state = p.clone(), rule.init(p)
    rule.place_(state, 0)
    for g in gs:
        rule.apply_([p], [g.to(p.dtype)], [state], lr=lr, decay=decay)
    return p


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_papers_formulas(name: str, shape: tuple[int, int]) -> None:
    rule, reference = RULES[name]
    expected = reference(weight(shape).numpy(), [g.numpy() for g in gradients(shape)], 0.02, 0.1)
    near = {"rtol": 1e-6, "atol": 1e-7} if "soap" in name else {"rtol": 1e-9, "atol": 1e-11}  # QR of LP + 1e-7·P
    torch.testing.assert_close(stepped(rule, weight(shape), gradients(shape)), torch.from_numpy(expected), **near)


PAIRS: dict[str, tuple[PairRule, Callable[..., tuple[baselines.Array, baselines.Array]]]] = {
    "lora_rite": (LoraRite(), baselines.lora_rite),
    "lora_muon": (LoraMuon(), baselines.lora_muon),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_papers_formulas_on_a_product(name: str, shape: tuple[int, int]) -> None:
    rule, reference = PAIRS[name]
    A, B, gs = weight((2, shape[1])), weight((shape[0], 2)), gradients(shape)
    expected = reference(A.numpy(), B.numpy(), [g.numpy() for g in gs], 0.02)
    state = rule.init((A, B))
    for g in gs:
        rule.apply_((A, B), (B.mT @ g, g @ A.mT), state, lr=0.02, decay=0.0)
    torch.testing.assert_close((A, B), tuple(map(torch.from_numpy, expected)), rtol=1e-9, atol=1e-11)
    assert {t.dtype for _, t in leaves(rule.init((A.float(), B.bfloat16())))} == {torch.float32, torch.int64}


def test_ldadam_is_the_papers() -> None:
    """Moments that turn, the basis that follows them and the error of both, from the library's first basis."""
    p, gs = weight((6, 9)), gradients((6, 9))
    (use, *_) = lowrank.methods.ldadam(rank=2).rules
    rule, start = use.rule, weight((6, 9)).numpy()
    assert isinstance(rule, Projected)
    state = rule.init(p)
    rule.place_(state, 0)
    for g in gs:
        rule.apply_([p], [g], [state], lr=0.02, decay=0.1)
        if int(state["step"]) == 1:  # type: ignore[arg-type]
            P = state["basis"]["left"].numpy().copy()  # type: ignore[index, union-attr]
    expected, error = baselines.ldadam(start, [g.numpy() for g in gs], 0.02, 0.1, P=P)
    torch.testing.assert_close(p, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)  # QR of bbᵀP + 1e-7·P
    torch.testing.assert_close(state["error"], torch.from_numpy(error), rtol=1e-4, atol=1e-5)


def test_frugal_is_the_papers() -> None:
    (use, *_) = lowrank.methods.frugal(rank=2, refresh_every=4, basis="svd").rules
    assert isinstance(use.rule, Projected)
    rule = replace(use.rule, stagger=False)
    expected = baselines.frugal(
        weight((6, 9)).numpy(), [g.numpy() for g in gradients((6, 9))], 0.02, 0.1, every=4, rank=2
    )
    torch.testing.assert_close(stepped(rule, weight((6, 9)), gradients((6, 9))), torch.from_numpy(expected))


# --- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
@pytest.mark.parametrize(("ours", "torchs"), [("keller", "original"), ("rms", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(shape: tuple[int, int], ours: Any, torchs: str, nesterov: bool) -> None:
    """To the bit where the iteration is torch's own arithmetic; in float32 as near as bfloat16 allows."""
    gs = [g.float() for g in gradients(shape)]
    p = torch.nn.Parameter(weight(shape).float())
    rule = Muon(scale=ours, nesterov=nesterov, precision="bfloat16")
    opt = torch.optim.Muon([p], lr=0.02, weight_decay=0.1, adjust_lr_fn=torchs, nesterov=nesterov)
    for g in gs:
        p.grad = g.clone()
        opt.step()
    moved = (p.detach() - weight(shape).float()).norm()
    torch.testing.assert_close(stepped(rule, weight(shape).float(), gs), p.detach(), rtol=1e-5, atol=1e-6)
    assert (stepped(replace(rule, precision="float32"), weight(shape).float(), gs) - p.detach()).norm() < 0.02 * moved


def test_singular_values_come_near_one() -> None:
    values = torch.linalg.svdvals(Muon().direction(torch.randn(3, 40, 64)))
    assert values.min() > 0.3
    assert values.max() < 1.3


@pytest.mark.parametrize("rule", [Muon(scale="keller"), Dion(rank=2)], ids=repr)
def test_a_transposed_fused_weight_is_its_parts(rule: Muon | Dion) -> None:
    """GPT-2 stores q, k and v beside each other as (in, 3·out)."""
    fused = weight((6, 3 * 5))
    whole = stepped(rule.on_layer(transposed=True, parts=3), fused, gradients((6, 15)))
    for i in range(3):
        part = stepped(rule, fused[:, 5 * i : 5 * i + 5].T, [g[:, 5 * i : 5 * i + 5].T for g in gradients((6, 15))])
        torch.testing.assert_close(whole[:, 5 * i : 5 * i + 5].T, part)


def test_the_plan_tells_how_a_layer_is_stored() -> None:
    plan = lowrank.apply_(gpt2(), lowrank.methods.muon())
    rule = {row.name.removeprefix("transformer."): row.rule for row in plan.rows}
    assert rule["h.0.attn.c_attn.weight"] == Muon(transposed=True, parts=3)
    assert rule["h.0.mlp.c_fc.weight"] == Muon(transposed=True)
    assert rule["h.0.mlp.c_fc.bias"] == rule["wte.weight"] == rule["ln_f.weight"] == AdamW()
    plan = lowrank.apply_(llama(), lowrank.methods.scale())
    rule = {row.name.removeprefix("model."): row.rule for row in plan.rows}
    assert rule["embed_tokens.weight"] == ColumnNormalised(transposed=True)
    assert rule["lm_head.weight"] == ColumnNormalised(momentum=0.9)
    assert rule["norm.weight"] == AdamW()
    assert plan.state_bytes == 4 * 24 * 8 + 5 * (2 * 4 * 8 + 4)  # the head's momentum, and AdamW for five norms


def test_muon_trains_a_vision_transformer_whose_positions_have_three_dimensions() -> None:
    from tests.models import vit

    for method in (lowrank.methods.muon(), lowrank.methods.scale(), lowrank.methods.soap(), lowrank.methods.dion()):
        model = vit()
        opt = lowrank.apply_(model, method).optimizer(lr=1e-3)
        before = model.pos_embed.detach().clone()
        model(torch.randn(2, 3, 16, 16)).square().sum().backward()
        opt.step()
        assert (model.pos_embed - before).abs().max() > 0


def test_steps_have_the_length_that_the_scale_says() -> None:
    model = llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = lowrank.apply_(model, lowrank.methods.muon()).optimizer(lr=1e-2)
    text_loss(model, tokens()).backward()
    opt.step()
    moved = {n: (p.detach() - before[n]) / 1e-2 for n, p in model.named_parameters()}
    down = moved["model.layers.0.mlp.down_proj.weight"]
    assert 0.1 < down.square().mean().sqrt() < 0.3  # AdamW's root mean square
    assert np.isclose(moved["lm_head.weight"].abs().max().item(), 1.0, atol=1e-2)  # AdamW's first step


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Muon(momentum=1.0), "momentum=1.0 must lie in"),
        (lambda: Muon(momentum=0.0), "nesterov=True needs a momentum"),
        (lambda: Muon(iterations=0), "iterations=0 must be a whole number of at least 1"),
        (lambda: lowrank.methods.muon(scale="rm"), "scale='rm' is unknown; it is one of rms, keller"),
        (lambda: lowrank.methods.muon(precision="half"), "precision='half' is unknown"),
        (lambda: Soap(refresh_every=0), "refresh_every=0 must be at least 1"),
        (lambda: Soap(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\) must be two numbers"),
        (lambda: Projected(follow=0.5), "use inner=AdamW.., transport='rotate' or 'statistics'"),
        (lambda: lowrank.methods.ldadam(follow=1.0), r"follow=1.0 must lie in \[0, 1\)"),
        (lambda: lowrank.methods.frugal(outside=0.0), "outside=0.0 must be above 0"),
        (lambda: Dion(rank=0), "rank=0 must be at least 1"),
        (lambda: lowrank.methods.dion(scale="rm"), "scale='rm' is unknown; it is one of rms, keller"),
        (lambda: lowrank.methods.full_8bit(storage="int4"), "storage='int4' is unknown"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
