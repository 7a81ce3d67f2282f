"""Law 1: a fresh adapter changes nothing; evaluation computes with merged(W); after settle_, merged(W) == W."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import gpt2, images, llama, mlp, nudge_, output, tokens, vit
from torch import Tensor, nn

import lowrank
from lowrank.adapters import Adapter, Dense, DoRA, LoRA, Site, Unchanged, merge_adapters_
from lowrank.adapters.adapter import shard_sizes
from lowrank.methods import Adapt

KINDS = {
    "lora": LoRA(rank=2, alpha=3),
    "rslora": LoRA(rank=2, alpha=3, rank_stabilised=True),
    "dropout": LoRA(rank=2, dropout=0.5),
    "heads": LoRA(rank=2, heads=3, init="orthogonal"),
    "split": LoRA(rank=2, heads=3, split=True, init="orthogonal", alpha=64),
    "reference": LoRA(rank=2, heads=2, split=True, init="reference", alpha=4096),
    "pissa": LoRA(rank=2, init="pissa", alpha=7),
    "dora": DoRA(LoRA(rank=2)),
    "dora of heads": DoRA(LoRA(rank=2, heads=3)),
    "dora of pissa": DoRA(LoRA(rank=2, init="pissa")),
    "dora of dense": DoRA(Dense(heads=2, split=False)),
    "dense": Dense(heads=2, split=False),
    "dense split": Dense(heads=3, split=True),
    "unchanged": Unchanged(),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def weight_and_adapter(
    kind: str, keep: bool, dtype: torch.dtype, out: int = 7, wide: int = 5
) -> tuple[Tensor, Adapter]:
    torch.manual_seed(1)
    W = torch.randn(out, wide).to(dtype)
    return W, KINDS[kind](Site("layer", W, 3, keep))


def by_shards(adapter: Adapter, x: Tensor, W: Tensor) -> Tensor:
    """The plain layer, on the shards that the adapter would see: another batch is another order of summation."""
    if isinstance(adapter, lowrank.adapters.DenseAdapter) and adapter.training and adapter.split:
        return torch.cat([F.linear(part, W) for part in x.split(shard_sizes(len(x), adapter.heads))])
    return F.linear(x, W)


def perturb_(adapter: Adapter) -> None:
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.3 * torch.randn_like(p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [False, True], ids=["restart", "keep"])
@pytest.mark.parametrize("kind", KINDS)
class TestAdapter:
    def test_fresh_changes_nothing(self, kind: str, keep: bool, dtype: torch.dtype) -> None:
        W, adapter = weight_and_adapter(kind, keep, dtype)
        x = torch.randn(7, 3, 5).to(dtype)
        for training in (True, False):
            adapter.train(training)
            assert torch.equal(adapter(x, W), by_shards(adapter, x, W))
        assert torch.equal(adapter.merged(W), W)

    def test_evaluation_is_merged(self, kind: str, keep: bool, dtype: torch.dtype) -> None:
        W, adapter = weight_and_adapter(kind, keep, dtype)
        perturb_(adapter)
        x = torch.randn(4, 5).to(dtype)
        wide = adapter.merged(W.double() if dtype is torch.float64 else W.float())
        expected = F.linear(x.to(wide.dtype), wide)
        tolerance = 0.03 * float(expected.abs().max()) if dtype is torch.bfloat16 else 2e-5 * float(wide.abs().max())
        assert adapter.eval()(x, W).dtype is dtype
        torch.testing.assert_close(
            adapter(x, W).to(wide.dtype), expected, atol=tolerance, rtol=0.03 if dtype is torch.bfloat16 else 1e-5
        )
        assert adapter.merged(W).dtype is dtype

    def test_settled_changes_nothing(self, kind: str, keep: bool, dtype: torch.dtype) -> None:
        W, adapter = weight_and_adapter(kind, keep, dtype)
        x = torch.randn(7, 3, 5).to(dtype)
        for _ in range(2):
            perturb_(adapter)
            with torch.no_grad():
                before, W = W, adapter.merged(W).clone()
            assert kind == "unchanged" or not torch.equal(before, W)
            adapter.settle_()
            adapter.train()
            if "dora" in kind:  # the magnitude becomes the norm of a rounded row
                tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
                torch.testing.assert_close(adapter.merged(W), W, rtol=tolerance, atol=tolerance)
            else:
                assert torch.equal(adapter.merged(W), W)
                assert torch.equal(adapter(x, W), by_shards(adapter, x, W))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_heads_see_their_shards(data: st.DataObject) -> None:
    """Training computes W x + s (B A − B⁰A⁰) x of the head that owns the example, with the gradients of that formula.

    Where heads share the batch, it is the mean over them; for every shape, number of heads and batch, divisible or not.
    """
    out, wide = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    rank, heads = data.draw(st.integers(1, min(out, wide))), data.draw(st.integers(1, 4))
    batch, more = data.draw(st.integers(1, 7)), data.draw(st.lists(st.integers(1, 3), max_size=2))
    split, keep = data.draw(st.booleans()), data.draw(st.booleans())
    torch.manual_seed(0)
    W = torch.randn(out, wide, dtype=torch.float64)
    adapter = LoRA(rank=rank, heads=heads, split=split, alpha=3)(Site("x", W, 0, keep))
    perturb_(adapter)
    adapter.settle_()
    perturb_(adapter)
    x = torch.randn(batch, *more, wide, dtype=torch.float64, requires_grad=True)
    y = adapter(x, W)
    own = torch.arange(heads).repeat_interleave(torch.tensor(shard_sizes(batch, heads)))
    changes = adapter.B @ adapter.A - (adapter.kept_B @ adapter.kept_A if keep else 0)
    changes = changes * 3 / rank
    mean = changes.mean(dim=0)
    dense = [W + (changes[own[i]] if split else mean) for i in range(batch)]
    expected = torch.stack([F.linear(x[i], dense[i]) for i in range(batch)])
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, adapter.A, adapter.B], g)
    theirs = torch.autograd.grad(expected, [x, adapter.A, adapter.B], g)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(adapter.merged(W), W + mean)


# --- in a model ------------------------------------------------------------------------------------------------------

PLACES = {
    "nn.Linear": (mlp, lambda: torch.randn(6, 10), "all-linear", "adapt"),
    "Conv1D": (gpt2, tokens, "all-linear", "adapt"),
    "q and v of c_attn": (gpt2, tokens, ("q", "v"), "adapt"),
    "tied, adapted": (gpt2, tokens, ("attention", "lm_head"), "adapt"),
    "tied, left": (gpt2, tokens, ("attention", "lm_head"), "leave"),
    "tied, untied": (gpt2, tokens, ("attention", "lm_head"), "untie"),
    "llama": (llama, tokens, ("all-linear", "lm_head"), "adapt"),
    "q and v of qkv": (vit, images, ("q", "v"), "adapt"),
    "vit": (vit, images, ("all-linear", "classifier"), "adapt"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_model(place: str, kind: str) -> None:
    build, data, where, ties = PLACES[place]
    model, x = build().double().eval(), data()
    x = x.double() if x.is_floating_point() else x
    before = output(model, x)
    exact = isinstance(KINDS[kind](Site("", torch.ones(2, 2))), lowrank.adapters.Additive)
    method = lowrank.Method(
        adapt=(Adapt(where, KINDS[kind]),), merge=lowrank.adapters.Merge(2), ties=ties, rest="train"
    )
    lowrank.apply_(model, method)
    same = torch.equal if exact else torch.allclose  # the others add the bias after the product
    assert same(output(model, x), before)
    model.train()
    assert same(output(model, x), before)
    nudge_(model)
    changed = output(model.eval(), x)
    assert kind == "unchanged" or not torch.allclose(changed, before, atol=1e-3)
    merge_adapters_(model)
    torch.testing.assert_close(output(model, x), changed, atol=1e-5, rtol=1e-5)
    merge_adapters_(model)
    torch.testing.assert_close(output(model, x), changed, atol=1e-5, rtol=1e-5)


def test_parts_leave_the_others_alone() -> None:
    model = vit().eval()
    lowrank.apply_(model, lowrank.methods.lora(("q", "v"), rank=2))
    layer, x = model.blocks[0].attn.qkv, torch.randn(3, 5, 8)
    before = layer(x)
    nudge_(model)
    after = layer(x)
    assert torch.equal(after[..., 8:16], before[..., 8:16])
    assert not torch.allclose(after[..., :8], before[..., :8])
    assert not torch.allclose(after[..., 16:], before[..., 16:])


def test_bias_belongs_to_the_layer() -> None:
    """A layer's bias is added once, whatever the adapter, and in the dtype of the product."""
    for make in KINDS.values():
        model = nn.Sequential(nn.Linear(5, 7))
        lowrank.apply_(model, lowrank.Method(adapt=(Adapt("0", make),), rest="train"))
        x = torch.randn(4, 5)
        torch.testing.assert_close(model(x), F.linear(x, model[0].weight, model[0].bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype is torch.bfloat16
