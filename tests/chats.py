"""Small causal language models of four families as transformers saves them, each with a tokenizer of its own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

TEXTS = (
    "Write a definition of a photograph.",
    "A photograph is a picture that is made by light on film or on a sensor.",
    "What is the capital of France? Paris is the capital of France.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
) * 3
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
# As Qwen3's: the last answer is written otherwise than it will be when the conversation goes on.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ '<think>\n\n</think>\n\n' if m['role'] == 'assistant' and loop.last else '' }}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
# As Gemma's: begun by BOS, its own name for the assistant, no system turn.
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>model\n' if add_generation_prompt else '' }}"
)
FAMILIES = {"gpt2": CHATML, "llama": MARKED, "qwen3": THINKING, "gemma3": TURNS}
POSITIONS = 256


def tokenizer(template: str | None = CHATML, *, bos: bool = True, size: int = 400) -> Any:
    """A byte-level BPE of transformers; ``bos``: texts begin with it."""
    from transformers import PreTrainedTokenizerFast

    backend = _trained(size)
    if bos:
        from tokenizers import Tokenizer, processors

        backend = Tokenizer.from_str(backend.to_str())
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


@functools.cache
def _trained(size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def model(family: str, size: int) -> Any:
    """The smallest model of a family, with random weights."""
    import transformers as t

    torch.manual_seed(0)
    shape = {
        "vocab_size": size,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if family == "gpt2":
        own = {"n_positions": POSITIONS, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=size, **own))
    if family == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**shape))
    if family == "qwen3":
        return t.Qwen3ForCausalLM(t.Qwen3Config(**shape, head_dim=8))
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**shape, head_dim=8, sliding_window=16, pad_token_id=1))


def saved(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A model with its tokenizer in ``folder``; ``options`` go to ``tokenizer``."""
    own = tokenizer(**{"template": FAMILIES[family], "bos": family in ("llama", "gemma3")} | options)
    model(family, len(own)).to(dtype).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder
