"""Text from a model: greedy as by hand, the same for the same seed, beyond the context, and where it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models import gpt2, llama
from tests.runs.tiny import TEXT

from lowrank.evaluate.generate import continuation
from lowrank.evaluate.score import score

MODELS = {"gpt2": gpt2, "llama": llama}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_likeliest_token_each_time_to_any_length(name: str) -> None:
    """Within the context of 12; then from the last six ids."""
    model = MODELS[name]().eval()
    chosen = continuation(model, [3, 1, 4], 20, temperature=0)
    window, by_hand = [3, 1, 4], []
    with torch.no_grad():
        for _ in range(20):
            window = window if len(window) < 12 else window[-6:]
            by_hand.append(int(model(input_ids=torch.tensor([window])).logits[0, -1].argmax()))
            window = [*window, by_hand[-1]]
    assert chosen == by_hand


def test_the_seed_decides_and_no_other_stream_moves() -> None:
    model = gpt2()
    before = torch.get_rng_state()
    first, again, other = (continuation(model, [1, 2], 30, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(first)) > 5
    greedy = continuation(model, [1, 2], 30, temperature=0)
    assert continuation(model, [1, 2], 30, temperature=9.0, top_k=1) == greedy
    model.generation_config.repetition_penalty = 9.0
    assert continuation(model, [1, 2], 30, temperature=0) == greedy, "what the model's authors chose does not enter"


def test_the_end_of_a_text_ends_it_and_is_not_shown() -> None:
    model = gpt2()
    text = continuation(model, [1, 2], 30, temperature=1.5, seed=1)
    end = text[4]
    assert continuation(model, [1, 2], 30, temperature=1.5, seed=1, ends=[end]) == text[: text.index(end)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_that_is_not_finite_is_refused(temperature: float) -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        continuation(model, [1, 2], 3, temperature=temperature)


def test_a_model_whose_loss_is_not_finite_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    how = {"data": str(TEXT), "tokenizer": "bytes", "context": 16, "batches": 1}
    model.save_pretrained(tmp_path / "sound")
    assert score(str(tmp_path / "sound"), **how)["loss"] == pytest.approx(5.5, abs=0.2)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan
    model.save_pretrained(tmp_path / "damaged")
    with pytest.raises(FloatingPointError, match="damaged on val is nan: its weights have diverged"):
        score(str(tmp_path / "damaged"), **how)
