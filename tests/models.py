"""Tiny models that every test may use, and every method of the catalogue with options small enough for them."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank

SMALL = {
    "target_modules": "attention,mlp",
    "rank": 2,
    "galore_rank": 2,
    "heads": 2,
    "alpha": 4,
    "merge_every": 3,
    "refresh_every": 2,
    "rest": "train",
}
OVERRIDES = {"linear_probe": {"target_modules": "head"}, "apla": {"target_modules": "o"}}
PROBES = ("linear_probe", "apla")  # which train a few matrices whole, and take no rest
VOCABULARY = 24


def small_method(name: str, **options: object) -> lowrank.Method:
    """The method ``name`` for a tiny model: of ``SMALL``, the options that it has."""
    known = inspect.signature(lowrank.METHODS[name]).parameters
    chosen = {k: v for k, v in SMALL.items() if k in known} | OVERRIDES.get(name, {}) | options
    return lowrank.METHODS[name](**chosen)


class MLP(nn.Module):
    """fc1 → GELU → fc2 → head, with and without bias: enough for what concerns layers and not architectures."""

    def __init__(self, width: int = 10, hidden: int = 14, classes: int = 4):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.fc2(F.gelu(self.fc1(x)))))


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> MLP:
    torch.manual_seed(seed)
    return MLP(**sizes).to(dtype)


def gpt2(seed: int = 0, layers: int = 2, width: int = 8, tied: bool = True) -> nn.Module:
    """A GPT-2 of the smallest sort, without dropout: Conv1D layers, fused c_attn, a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=12,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=tied,
    )
    return GPT2LMHeadModel(config)


def llama(seed: int = 0) -> nn.Module:
    """A LLaMA of the smallest sort: nn.Linear without bias, separate q, k, v, o, gated MLP, untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def vit(seed: int = 0) -> nn.Module:
    """timm's ViT of the smallest sort: fused qkv in nn.Linear, a classifier."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3)


def tokens(batch: int = 4, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def images(batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def features(batch: int = 6, width: int = 10, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def output(model: nn.Module, x: Tensor) -> Tensor:
    """What the model computes, whatever it is wrapped in."""
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def text_loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = output(model, ids)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train_text(model: nn.Module, opt: torch.optim.Optimizer, steps: int, first: int = 0, seed: int = 0) -> list[float]:
    """Train on random tokens that repeat every second batch; the losses."""
    losses = []
    for step in range(first, first + steps):
        loss = text_loss(model, tokens(seed=100 * seed + step % 2))
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def nudge_(model: nn.Module, size: float = 0.3, seed: int = 0) -> None:
    """Change every adapter's factors at random, as training would."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if ".adapters." in name:
                p.add_(size * torch.randn(p.shape, generator=noise).to(p.dtype))
