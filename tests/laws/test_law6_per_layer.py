"""Law 6: per-layer updates equal ordinary ones bitwise, under any schedule; with accumulation to rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.models import features, gpt2, mlp, small_method, text_loss, tokens
from torch import nn

import lowrank
from lowrank.methods import Method, Use
from lowrank.methods.schedule import Envelope
from lowrank.optim.optimizer import Optimizer
from lowrank.optim.rules import SGD, AdamW, Rule

RULES: list[Rule] = [
    AdamW(),
    AdamW(betas=(0.5, 0.9), eps=1e-5),
    SGD(),
    SGD(momentum=0.9),
    SGD(momentum=0.9, nesterov=True),
]
SCHEDULES = {
    "constant": lowrank.methods.schedule.constant,
    "cosine": Envelope(steps=6, warmup=2),
    "rewarm": lowrank.methods.schedule.Rewarm(every=2, warmup=1),
}


def loss_of(model: nn.Module, seed: int, scale: float = 1.0) -> torch.Tensor:
    x = features(6, seed=seed).to(next(model.parameters()).dtype)
    return scale * F.cross_entropy(model(x).float(), torch.arange(6) % 4)


def run(model: nn.Module, opt: Optimizer, steps: int, accumulate: int = 1) -> None:
    for step in range(steps):
        for micro in range(accumulate):
            loss_of(model, 10 * step + micro, 1 / accumulate).backward()
        opt.step()
        opt.zero_grad()


def assert_same(a: nn.Module, b: nn.Module, **close: float) -> None:
    for (key, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.allclose(x, y, **close) if close else torch.equal(x, y), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_bitwise(rule: Rule, schedule: str, dtype: torch.dtype, clip: float | None) -> None:
    models = [mlp(dtype), mlp(dtype)]
    for model, per_layer in zip(models, (False, True), strict=True):
        plan = lowrank.apply_(model, Method(rules=(Use("*", rule),), lr=SCHEDULES[schedule], rest="train"))
        run(model, plan.optimizer(lr=0.02, weight_decay=0.1, per_layer=per_layer, clip_per_layer=clip), 6)
    assert_same(*models)


@pytest.mark.parametrize("name", lowrank.METHODS)
def test_every_method_bitwise(name: str) -> None:
    """Merges, restarts and forgetting included; and torch's own schedulers."""
    models = [gpt2(), gpt2()]
    for model, per_layer in zip(models, (False, True), strict=True):
        opt = lowrank.apply_(model, small_method(name)).optimizer(lr=0.01, weight_decay=0.1, per_layer=per_layer)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 7)
        for step in range(7):
            text_loss(model, tokens(seed=step)).backward()
            opt.step()
            opt.zero_grad()
            scheduler.step()
    assert_same(*models)


@pytest.mark.parametrize("name", lowrank.METHODS)
def test_accumulation(name: str) -> None:
    models = [gpt2().double(), gpt2().double()]
    for model, per_layer in zip(models, (False, True), strict=True):
        plan = lowrank.apply_(model, small_method(name))
        opt = plan.optimizer(lr=1e-3, per_layer=per_layer, accumulate=3 if per_layer else 1)
        for step in range(5):
            for micro in range(3):
                (text_loss(model, tokens(seed=3 * step + micro)) / 3).backward()
            opt.step()
            opt.zero_grad()
    assert_same(*models, rtol=1e-5, atol=1e-6)


def test_gradients_are_freed() -> None:
    model = mlp()
    opt = lowrank.apply_(model, lowrank.methods.full()).optimizer(lr=0.1, per_layer=True)
    loss_of(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())
    before = copy.deepcopy(model.state_dict())
    opt.step()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert opt.steps == 1


def test_a_parameter_that_some_micro_batches_miss_is_stepped() -> None:
    models = [mlp(), mlp()]
    for model, per_layer in zip(models, (False, True), strict=True):
        opt = lowrank.apply_(model, lowrank.methods.full()).optimizer(
            lr=0.1, per_layer=per_layer, accumulate=2 if per_layer else 1
        )
        for _ in range(2):
            loss_of(model, 1).backward()
            model.head(torch.ones(1, 14)).sum().backward()
            opt.step()
            opt.zero_grad()
    assert_same(*models)


class TestMisuse:
    def opt(self, model: nn.Module, **options: object) -> Optimizer:
        return lowrank.apply_(model, lowrank.methods.full()).optimizer(lr=0.1, per_layer=True, **options)  # type: ignore[arg-type]

    def test_too_few_backward_passes(self) -> None:
        model = mlp()
        opt = self.opt(model, accumulate=3)
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match=r"1 of accumulate=3"):
            opt.step()

    def test_too_many_backward_passes(self) -> None:
        model = mlp()
        self.opt(model)
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match=r"head.bias was stepped by an earlier backward pass"):
            loss_of(model, 1).backward()

    def test_no_backward_pass(self) -> None:
        with pytest.warns(UserWarning, match=r"without a backward pass"):
            self.opt(mlp()).step()

    @pytest.mark.parametrize("per_layer", [False, True])
    def test_the_last_optimizer_made_is_the_one_that_steps(self, per_layer: bool) -> None:
        models = [mlp(), mlp()]
        plans = [lowrank.apply_(model, lowrank.methods.full()) for model in models]
        old = plans[0].optimizer(lr=0.1, per_layer=True)
        for model, plan in zip(models, plans, strict=True):
            run(model, plan.optimizer(lr=0.1, per_layer=per_layer), 2)
        assert_same(*models)
        with pytest.warns(UserWarning, match=r"without a backward pass"):
            old.step()

    def test_a_hook_that_frees_gradients_first(self) -> None:
        model = mlp()
        model.fc1.bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        opt = self.opt(model)
        with pytest.raises(RuntimeError, match=r"gradient of fc1.bias was taken by another hook"):
            loss_of(model, 0).backward()
        assert opt.steps == 0

    def test_zero_grad_drops_an_unfinished_step(self) -> None:
        model = mlp()
        opt = self.opt(model, accumulate=2)
        before = copy.deepcopy(model.state_dict())
        loss_of(model, 0).backward()
        opt.zero_grad()
        with pytest.warns(UserWarning, match=r"without a backward pass"):
            opt.step()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"accumulate": 0}, "accumulate=0 must be at least 1"),
            ({"clip_per_layer": 0.0}, "clip_per_layer=0.0 must be above 0"),
            ({"lr": -1.0}, "lr=-1.0"),
            ({"lr": float("nan")}, "lr=nan"),
            ({"weight_decay": -0.1}, "weight_decay=-0.1"),
            ({"merge": "sometimes"}, "merge='sometimes' is unknown"),
            ({"scaler": torch.amp.GradScaler("cpu")}, "scaler= is for per_layer=True"),
        ],
    )
    def test_options(self, options: dict[str, object], words: str) -> None:
        plan = lowrank.apply_(mlp(), lowrank.methods.full())
        with pytest.raises(ValueError, match=words):
            plan.optimizer(**options)  # type: ignore[arg-type]


class TestGradScaler:
    """float16 autocast, the scaler inside the hooks."""

    def train(
        self, model: nn.Module, per_layer: bool, steps: int = 6, **options: float
    ) -> tuple[Optimizer, torch.amp.GradScaler]:
        scaler = torch.amp.GradScaler("cpu", **options)  # type: ignore[arg-type]
        plan = lowrank.apply_(model, lowrank.methods.full())
        opt = plan.optimizer(lr=0.01, per_layer=per_layer, scaler=scaler if per_layer else None)
        for step in range(steps):
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(features(6, seed=step % 2)), torch.arange(6) % 4)
            scaler.scale(loss).backward()
            if per_layer:
                opt.step()
            else:
                scaler.step(opt)
                scaler.update()
            opt.zero_grad()
        return opt, scaler

    def test_equals_the_ordinary_scaler(self) -> None:
        models = [mlp(), mlp()]
        scales = [
            self.train(m, per_layer, init_scale=64.0, growth_interval=2)[1].get_scale()
            for m, per_layer in zip(models, (False, True), strict=True)
        ]
        assert_same(*models)
        assert scales == [512.0, 512.0]

    def test_overflow_skips_and_backs_off(self) -> None:
        model = mlp()
        before = copy.deepcopy(model.state_dict())
        opt, scaler = self.train(model, True, steps=1, init_scale=2.0**40)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert scaler.get_scale() == 2.0**39
        for p in model.parameters():
            assert not opt.state[p]["exp_avg"].any()
            assert opt.state[p]["step"] == 0
        assert opt.steps == 1

    def test_training_goes_on_after_overflows(self) -> None:
        model = mlp()
        before = loss_of(model, 0).item()
        opt, scaler = self.train(model, True, steps=40, init_scale=2.0**24)
        assert scaler.get_scale() < 2.0**24
        assert loss_of(model, 0).item() < before
        assert all(p.isfinite().all() for p in model.parameters())
        assert opt.state_dict()["scale_age"] > 0

    def test_a_disabled_scaler_is_none(self) -> None:
        model = mlp()
        opt = lowrank.apply_(model, lowrank.methods.full()).optimizer(
            per_layer=True, scaler=torch.amp.GradScaler("cpu", enabled=False)
        )
        run(model, opt, 2)
        assert "scale_age" not in opt.state_dict()


def test_clip_per_layer_limits_each_gradient() -> None:
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    plan = lowrank.apply_(model, Method(rules=(Use("*", SGD()),), rest="train"))
    opt = plan.optimizer(lr=1.0, clip_per_layer=0.01)
    (100 * loss_of(model, 0)).backward()
    norms = [p.grad.norm() for p in model.parameters()]
    opt.step()
    for p, old, norm in zip(model.parameters(), before, norms, strict=True):
        assert float((p - old).norm()) == pytest.approx(min(float(norm), 0.01), rel=1e-3)
