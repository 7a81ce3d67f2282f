"""Law 8: every trainable parameter has exactly one rule, no frozen one has any; tied weights count once."""

import pytest
import torch
from tests.models import PROBES, gpt2, images, llama, nudge_, output, small_method, text_loss, tokens, vit
from torch import nn

import lowrank

MODELS = {"gpt2": gpt2, "gpt2 untied": lambda: gpt2(tied=False), "llama": llama, "vit": vit}


@pytest.mark.parametrize("rest", ["train", "freeze", "auto"])
@pytest.mark.parametrize("place", MODELS)
@pytest.mark.parametrize("name", [n for n in lowrank.METHODS if n not in PROBES])
def test_exactly_one(name: str, place: str, rest: str) -> None:
    model = MODELS[place]()
    method = small_method(name)
    if rest == "freeze" and len(method.rules) == 1 and (not method.adapt or name == "frozen"):
        with pytest.raises(ValueError, match=r"nothing would be trained"):
            lowrank.apply_(model, small_method(name, rest=rest))
        return
    plan = lowrank.apply_(model, small_method(name, rest=rest))
    opt = plan.optimizer(lr=0.1)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    grouped = [id(p) for group in opt.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trained
    rows = {row.name: row for row in plan.rows}
    assert len(rows) == len(plan.rows) == len(list(model.parameters()))
    for key, p in model.named_parameters():
        assert (rows[key].rule is not None) == (rows[key].use is not None) == p.requires_grad
    assert plan.parameters_total == sum(p.numel() for p in model.parameters())
    assert plan.parameters_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("place", MODELS)
@pytest.mark.parametrize("name", lowrank.METHODS)
def test_all_trainable_get_gradients(name: str, place: str) -> None:
    """Nothing is trained in name only."""
    model = MODELS[place]()
    options = {"target_modules": "classifier" if place == "vit" else "lm_head"} if name == "linear_probe" else {}
    lowrank.apply_(model, small_method(name, **options))
    loss = output(model, images()).square().mean() if place == "vit" else text_loss(model, tokens())
    loss.backward()
    for key, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, key


def test_tied_weights_count_once() -> None:
    tied, untied = gpt2(), gpt2(tied=False)
    plans = [lowrank.apply_(model, lowrank.methods.full()) for model in (tied, untied)]
    assert plans[1].parameters_total - plans[0].parameters_total == tied.lm_head.weight.numel()
    assert "lm_head.weight (tied): one parameter, counted once" in str(plans[0])


class TestTies:
    def plan(
        self, ties: str, targets: object = ("attention", "lm_head"), model: nn.Module | None = None
    ) -> lowrank.Plan:
        return lowrank.apply_(model or gpt2(), lowrank.methods.lora(targets, rank=2, ties=ties, rest="freeze"))

    def test_adapt_shares_one_adapter(self) -> None:
        plan = self.plan("adapt")
        model = plan.model
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.lm_head.adapters["all"] is model.transformer.wte.adapters["all"]
        assert list(plan.adapters).count("lm_head") == 1
        assert "lm_head is tied to transformer.wte.weight: adapted as one matrix" in str(plan)
        assert "counted once" not in str(plan)
        before = text_loss(model, tokens())
        opt = plan.optimizer(lr=1e-2)
        for _ in range(3):
            text_loss(model, tokens()).backward()
            opt.step()
            opt.zero_grad()
        assert text_loss(model, tokens()) < before

    def test_leave(self) -> None:
        plan = self.plan("leave")
        assert "lm_head" not in plan.adapters
        assert "left alone (ties='leave')" in str(plan)
        with pytest.raises(ValueError, match=r"every layer that the method targets was left alone.*ties='adapt'"):
            self.plan("leave", "lm_head")

    def test_untie(self) -> None:
        model = gpt2()
        total = sum(p.numel() for p in model.parameters())
        plan = self.plan("untie", model=model)
        assert model.lm_head.weight is not model.transformer.wte.weight
        assert model.config.tie_word_embeddings is False
        assert plan.parameters_total > total + model.lm_head.weight.numel()
        assert "more parameters (ties='untie')" in str(plan)

    @pytest.mark.parametrize("make", ["lora", "pissa", "lte"])
    def test_gradient_through_both_ends(self, make: str) -> None:
        """The factors of a tied matrix get what they do as an embedding and what they do as an output layer."""
        model = gpt2().double()
        lowrank.apply_(model, small_method(make, target_modules="lm_head"))
        nudge_(model)
        A = model.lm_head.adapters["all"].A
        ids = tokens(1)  # one example: with split heads it is all the first head's
        output(model, ids).square().mean().backward()
        losses = []
        for change in (1e-4, -2e-4):
            with torch.no_grad():
                A[0, 1, 3] += change
            losses.append(output(model, ids).square().mean().item())
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(A.grad[0, 1, 3].item(), rel=1e-4)

    def test_two_linear_layers(self) -> None:
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        plan = lowrank.apply_(model, lowrank.methods.lora("all-linear", rank=2, rest="train"))
        assert list(plan.adapters) == ["0"]
        assert model[0].adapters["all"] is model[2].adapters["all"]
        opt = plan.optimizer(lr=0.1)
        model(torch.ones(2, 6)).sum().backward()
        opt.step()
        expected = model.eval()(torch.ones(2, 6))
        lowrank.merge_and_unload(model)
        torch.testing.assert_close(model(torch.ones(2, 6)), expected)
        assert model[0].weight is model[2].weight

    def test_one_module_in_two_places(self) -> None:
        shared = nn.Linear(6, 6)
        model = nn.Sequential(shared, nn.ReLU(), shared)
        plan = lowrank.apply_(model, lowrank.methods.lora("all-linear", rank=2, rest="train", ties="leave"))
        assert list(plan.adapters) == ["0"]
        model(torch.ones(2, 6)).sum().backward()
        plan.optimizer().step()
        lowrank.merge_and_unload(model)
        assert type(model[0]) is type(model[2]) is nn.Linear
        assert model[0].weight is model[2].weight

    def test_a_scaled_embedding_is_refused(self) -> None:
        class Scaled(nn.Embedding):
            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return super().forward(ids) * 8

        model = nn.Sequential(Scaled(9, 4), nn.Linear(4, 9, bias=False))
        model[1].weight = model[0].weight
        with pytest.raises(ValueError, match=r"1 is tied to 0.weight of a Scaled, which cannot share an adapter"):
            lowrank.apply_(model, lowrank.methods.lora("1", rank=2))
        assert type(model[1]) is nn.Linear

    def test_embedding_options_are_refused(self) -> None:
        model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 9, bias=False))
        model[1].weight = model[0].weight
        with pytest.raises(ValueError, match=r"uses max_norm"):
            lowrank.apply_(model, lowrank.methods.lora("1", rank=2))
