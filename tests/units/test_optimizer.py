"""The optimizer: torch's interface, groups, bfloat16 weights, forgetting."""

import copy
from typing import Any

import pytest
import torch
from tests.models import features, mlp
from torch import Tensor, nn

import lowrank
from lowrank.methods import Method, Use
from lowrank.optim.optimizer import Optimizer
from lowrank.optim.rules import SGD, AdamW


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    loss = model(features(6, seed=seed).to(next(model.parameters()).dtype)).float().square().mean()
    loss.backward()
    return loss.detach()


def optimizer(model: nn.Module, rule: Any = AdamW(), **options: Any) -> Optimizer:  # noqa: B008
    group = {"params": named(model), "rule": rule, "lr": 0.05}
    group |= {key: options.pop(key) for key in ("lr", "decay", "lr_ratio") if key in options}
    return Optimizer([group], **options)


class TestTorchsInterface:
    def test_is_a_torch_optimizer(self) -> None:
        assert isinstance(optimizer(mlp()), torch.optim.Optimizer)

    def test_closure(self) -> None:
        for per_layer in (False, True):
            model = mlp()
            opt = optimizer(model, per_layer=per_layer)
            before = model.fc1.weight.detach().clone()
            assert float(opt.step(lambda: backward(model))) > 0  # noqa: B023
            assert not torch.equal(model.fc1.weight, before)

    def test_learning_rate_schedulers(self) -> None:
        models = [mlp(), mlp()]
        opts = [
            optimizer(models[0], decay=0.1),
            torch.optim.AdamW(models[1].parameters(), lr=0.05, weight_decay=0.1, fused=True),
        ]
        for model, opt in zip(models, opts, strict=True):
            scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=8, cycle_momentum=False)
            for step in range(6):
                backward(model, step)
                opt.step()
                opt.zero_grad()
                scheduler.step()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(p, q)

    def test_step_hooks(self) -> None:
        opt, seen = optimizer(mlp()), []
        opt.register_step_pre_hook(lambda *_: seen.append("before"))
        opt.register_step_post_hook(lambda *_: seen.append("after"))
        opt.step()
        assert seen == ["before", "after"]

    def test_ordinary_grad_scaler(self) -> None:
        model = mlp()
        opt, scaler = optimizer(model), torch.amp.GradScaler("cpu", init_scale=2.0**40)
        before = copy.deepcopy(model.state_dict())
        with torch.autocast("cpu", torch.float16):
            loss = model(features()).float().square().mean()
        scaler.scale(loss * 1e30).backward()
        scaler.step(opt)
        scaler.update()
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert opt.steps == 0
        assert scaler.get_scale() == 2.0**39

    def test_global_clipping_works_on_the_ordinary_step(self) -> None:
        model = mlp()
        opt = optimizer(model, SGD(), lr=1.0)
        backward(model)
        before = [p.detach().clone() for p in model.parameters()]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        opt.step()
        moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])
        assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)

    def test_a_group_added_later(self) -> None:
        for per_layer in (False, True):
            model, more = mlp(), nn.Linear(4, 1)
            opt = optimizer(model, per_layer=per_layer)
            backward(model)
            opt.step()
            opt.zero_grad()
            opt.add_param_group({"params": [("more.weight", more.weight)], "rule": SGD(), "lr": 0.5})
            before = more.weight.detach().clone()
            more(model(features())).sum().backward()
            opt.step()
            assert not torch.equal(more.weight, before)
            assert opt.steps == 2
            fresh = optimizer(mlp(), per_layer=per_layer)
            fresh.add_param_group({"params": [("more.weight", nn.Linear(4, 1).weight)], "rule": SGD(), "lr": 0.5})
            fresh.load_state_dict(opt.state_dict())

    def test_parameters_without_names(self) -> None:
        model = mlp()
        opt = Optimizer([{"params": list(model.parameters()), "rule": AdamW()}])
        backward(model)
        opt.step()
        assert opt.name_of(model.fc2.weight) == "parameter 2"
        twin = Optimizer([{"params": list(mlp().parameters()), "rule": AdamW()}])
        twin.load_state_dict(opt.state_dict())
        assert torch.equal(
            twin.state[twin.param_groups[0]["params"][2]]["exp_avg"], opt.state[model.fc2.weight]["exp_avg"]
        )

    def test_zero_grad(self) -> None:
        model = mlp()
        opt = optimizer(model)
        backward(model)
        opt.zero_grad(set_to_none=False)
        assert not any(p.grad.any() for p in model.parameters())
        opt.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    def test_parameters_without_gradient_are_left_alone(self) -> None:
        model = mlp()
        opt = optimizer(model, decay=0.5)
        before = copy.deepcopy(model.state_dict())
        model.fc1(features()).sum().backward()
        opt.step()
        changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
        assert changed == {"fc1.weight", "fc1.bias"}
        assert opt.state[model.head.weight]["step"] == 0


class TestRefused:
    @pytest.mark.parametrize(
        ("group", "words"),
        [
            ({"params": [nn.Parameter(torch.ones(2))]}, "needs a rule"),
            ({"params": [nn.Parameter(torch.ones(2), requires_grad=False)], "rule": SGD()}, "a frozen parameter"),
        ],
    )
    def test_groups(self, group: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            Optimizer([group])

    def test_a_parameter_twice(self) -> None:
        p = nn.Parameter(torch.ones(2))
        with pytest.raises(ValueError, match=r"more than one parameter group"):
            Optimizer([{"params": [p], "rule": SGD()}, {"params": [p], "rule": AdamW()}])

    def test_no_parameters(self) -> None:
        with pytest.raises(ValueError, match=r"empty parameter list"):
            Optimizer([])

    def test_a_refused_group_is_not_added(self) -> None:
        opt = optimizer(mlp())
        with pytest.raises(ValueError, match=r"a frozen parameter"):
            opt.add_param_group({"params": [("x", nn.Parameter(torch.ones(2), requires_grad=False))], "rule": SGD()})
        assert len(opt.param_groups) == 1

    def test_sparse_gradients(self) -> None:
        table = nn.Embedding(4, 3, sparse=True)
        opt = optimizer(table)
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match=r"sparse=False"):
            opt.step()


class TestNarrowWeights:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_steps_below_half_a_gap(self, dtype: torch.dtype) -> None:
        """bfloat16 weights move by small steps in the mean; float16 ones round to the nearest."""
        weight = nn.Parameter(torch.ones(4000, dtype=dtype))
        opt = Optimizer([{"params": [weight], "rule": SGD(), "lr": 1e-4}])
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            opt.step()
        moved = 1 - float(weight.detach().float().mean())
        assert moved == pytest.approx(0.01, rel=0.1) if dtype is torch.bfloat16 else moved == 0.0

    def test_equals_float32_in_the_mean(self) -> None:
        narrow, wide = mlp(torch.bfloat16), mlp()
        wide.load_state_dict(narrow.state_dict())
        for model in (narrow, wide):
            opt = optimizer(model, lr=2e-3)
            for step in range(30):
                backward(model, step % 2)
                opt.step()
                opt.zero_grad()
        for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
            assert float((p.float() - q).abs().max()) < 0.03

    def test_noise_depends_on_seed_parameter_and_step(self) -> None:
        def run(seed: int) -> list[Tensor]:
            a, b = (nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(2))
            opt = Optimizer([{"params": [a, b], "rule": SGD(), "lr": 1e-3}], seed=seed)
            seen = []
            for _ in range(2):
                for p in (a, b):
                    p.data.fill_(1.0)
                    p.grad = torch.ones_like(p)
                opt.step()
                seen += [p.detach().clone() for p in (a, b)]
            return seen

        assert all(torch.equal(x, y) for x, y in zip(run(0), run(0), strict=True))
        every = run(0) + run(1)
        assert not any(torch.equal(x, y) for i, x in enumerate(every) for y in every[:i])

    def test_clipping_is_computed_wide(self) -> None:
        p = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
        opt = Optimizer([{"params": [p], "rule": SGD(), "lr": 1.0}], clip_per_layer=1.0)
        p.grad = torch.full_like(p, 7.0)
        opt.step()
        assert float(p.detach().float().norm()) == pytest.approx(1.0, rel=1e-2)


class TestForget:
    def test_drops_the_smallest(self) -> None:
        model = mlp()
        opt = optimizer(model)
        for step in range(3):
            backward(model, step)
            opt.step()
        p, other = model.fc2.weight, model.fc1.weight
        before, others = copy.deepcopy(opt.state[p]), copy.deepcopy(opt.state[other])
        opt.forget([p], 0.75)
        kept = opt.state[p]["exp_avg"] != 0
        assert int(kept.sum()) == 14 * 14 - int(14 * 14 * 0.75)
        assert before["exp_avg"][kept].abs().min() >= before["exp_avg"][~kept].abs().max()
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(opt.state[p][key][kept], before[key][kept])
            assert not opt.state[p][key][~kept].any()
        assert opt.state[p]["step"] == 3
        assert all(torch.equal(others[key], opt.state[other][key]) for key in others)

    def test_no_first_moment_outlives_its_second(self) -> None:
        """Pruned each by itself, m = 1 kept beside v = 0 would step 1/ε: a restart then throws the model away."""
        p = nn.Parameter(torch.zeros(10, 10))
        opt = Optimizer([{"params": [p], "rule": AdamW(), "lr": 1.0}])
        noisy = torch.rand(10, 10) < 0.5  # a large gradient of changing sign: a small first moment, a large second
        for step in range(100):
            p.grad = torch.where(noisy, 100.0 * (-1) ** step, 1.0)
            opt.step()
        opt.forget([p], 0.5)
        before = p.detach().clone()
        p.grad = torch.zeros(10, 10)
        opt.step()
        assert (p - before).abs().max() < 10

    def test_each_head_apart(self) -> None:
        """Heads of another size keep their share all the same, so that heads on other ranks forget alike."""
        p = nn.Parameter(torch.zeros(2, 3, 4))
        opt = Optimizer([{"params": [p], "rule": SGD(momentum=0.9)}])
        p.grad = torch.stack([torch.rand(3, 4) + 1, 1000 * (torch.rand(3, 4) + 1)])
        opt.step()
        opt.forget([p], 0.5)
        assert [int(head.count_nonzero()) for head in opt.state[p]["momentum_buffer"]] == [6, 6]

    def test_all_and_nothing(self) -> None:
        model = mlp()
        opt = optimizer(model)
        backward(model)
        opt.step()
        before = copy.deepcopy(opt.state_dict()["state"])
        opt.forget(model.parameters(), 0.0)
        assert all(torch.equal(before[i][k], t) for i, s in opt.state_dict()["state"].items() for k, t in s.items())
        opt.forget(model.parameters(), 1.0)
        assert not any(t.any() for s in opt.state_dict()["state"].values() for t in s.values())

    def test_any_layout(self) -> None:
        p = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
        opt = Optimizer([{"params": [p], "rule": AdamW()}])
        p.grad = torch.randn_like(p)
        opt.step()
        opt.forget([p], 0.5)
        assert int(opt.state[p]["exp_avg"].count_nonzero()) == 24

    def test_what_holds_more_than_moments_is_refused_before_any_work(self) -> None:
        """Zeroing the small numbers of a basis, or of the scales of codes, would spoil them."""
        model = mlp()
        adapt = (lowrank.Adapt("all-linear", lowrank.adapters.LoRA(rank=2)),)
        merge = lowrank.adapters.Merge(2, keep=False, forget=0.5)
        rules = (Use("*", AdamW(storage="int8")),)
        plan = lowrank.apply_(model, Method(adapt=adapt, rules=rules, merge=merge, rest="train"))
        with pytest.raises(ValueError, match=r"state of fc1.adapters.all.A cannot be forgotten.*forget=0 or forget=1"):
            plan.optimizer(lr=0.1)
        opt = optimizer(mlp(), AdamW(storage="int8"))
        with pytest.raises(ValueError, match=r"cannot be forgotten"):
            opt.forget(opt.param_groups[0]["params"], 0.5)
        opt.forget(opt.param_groups[0]["params"], 1.0)

    @pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
    def test_a_share(self, share: float) -> None:
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            optimizer(mlp()).forget([], share)


def test_the_synchroniser_is_told_the_completed_steps() -> None:
    seen: list[int] = []
    model = mlp()
    opt = optimizer(model, synchroniser=seen.append)
    for _ in range(3):
        backward(model)
        opt.step()
    assert seen == [1, 2, 3]


def test_channels_last_parameters_step_as_torchs() -> None:
    ours = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    theirs = nn.Parameter(ours.detach().clone(memory_format=torch.contiguous_format))
    opts = [
        Optimizer([{"params": [ours], "rule": AdamW(), "lr": 0.1}]),
        torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0),
    ]
    for step in range(3):
        g = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = g.to(memory_format=torch.channels_last), g
        for opt in opts:
            opt.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("which", ["gradient", "parameter"])
def test_other_layouts(which: str, per_layer: bool) -> None:
    """The fused kernel takes all its tensors to be laid out alike, and would be wrong in silence where they are not."""
    start = torch.randn(3, 10)[:, ::2] if which == "parameter" else torch.zeros(3, 5)
    ours, theirs = nn.Parameter(start), nn.Parameter(start.clone(memory_format=torch.contiguous_format))
    opts = [
        Optimizer([{"params": [ours], "rule": AdamW(), "lr": 0.1}], per_layer=per_layer),
        torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0, foreach=False),
    ]
    for step in range(3):
        g = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).T
        if per_layer:
            (ours * g).sum().backward()
        else:
            ours.grad = g.contiguous() if which == "parameter" else g
        theirs.grad = g.contiguous()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(ours, theirs)


def test_method_schedule_multiplies() -> None:
    model = mlp()
    method = Method(rules=(Use("*", SGD(), lr=3.0),), lr=lambda step: 10.0**-step, rest="train")
    opt = lowrank.apply_(model, method).optimizer(lr=0.5)
    moved = []
    for _ in range(2):
        before = model.head.bias.detach().clone()
        backward(model)
        g = model.head.bias.grad.clone()
        opt.step()
        opt.zero_grad()
        moved.append(float(((before - model.head.bias) / g).mean()))
    assert moved == pytest.approx([1.5, 0.15], rel=1e-3)
