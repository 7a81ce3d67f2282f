"""What every adapter promises: one list, to which a new one adds itself by a line.

Law 1: a fresh adapter changes nothing; evaluation computes with merged(W); after settle_, merged(W) == W. Law 2: a
model unloads to the function that it computed. Training resumes bitwise, dtypes are kept, each merge is rounded by
noise of its own, and heads packed by several workers make the matrix that one worker with all of them makes.
"""

import pytest
import torch
import torch.nn.functional as F
from examples.new_adapter import VeRA
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import features, gpt2, images, llama, mlp, nudge_, output, tokens, vit
from torch import Tensor, nn

import lowrank
from lowrank.adapters import (
    Adapter,
    Additive,
    Dense,
    DoRA,
    LoRA,
    Site,
    SplitAdapter,
    Unchanged,
    merge_adapters_,
    merge_and_unload,
)
from lowrank.adapters.adapter import shard_sizes
from lowrank.adapters.layers import merge_layer_, write_merged_
from lowrank.distributed.collectives import share
from lowrank.methods import Adapt


class Forgetful(Additive):
    """The least that an adapter must be; it does not count its merges."""

    def __init__(self, site: Site):
        super().__init__(Site.of(site))
        self.D = nn.Parameter(torch.zeros(self.shape, dtype=torch.promote_types(site.weight.dtype, torch.float32)))

    def add_(self, y: Tensor, x: Tensor, start: int = 0) -> Tensor:
        y[..., start : start + self.shape[0]] += F.linear(x.to(y.dtype), self.D.to(y.dtype))
        return y

    def merged(self, W: Tensor) -> Tensor:
        return (W.to(self.D.dtype) + self.D).to(W.dtype)

    @torch.no_grad()
    def settle_(self) -> None:
        self.D.zero_()


ADAPTERS = {
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
    "forgetful": Forgetful,
    "vera": VeRA(rank=4),
}
SPLIT = {name: make for name, make in ADAPTERS.items() if getattr(make, "split", False)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def weight_and_adapter(
    kind: str, keep: bool, dtype: torch.dtype, out: int = 7, wide: int = 5
) -> tuple[Tensor, Adapter]:
    torch.manual_seed(1)
    W = torch.randn(out, wide).to(dtype)
    return W, ADAPTERS[kind](Site("layer", W, 3, keep))


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
@pytest.mark.parametrize("kind", ADAPTERS)
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


@pytest.mark.parametrize("kind", ADAPTERS)
def test_each_merge_is_rounded_by_noise_of_its_own(kind: str) -> None:
    """Were it the same between merges, layers or seeds, what is rounded down once would be for ever."""
    seen: list[Tensor] = []
    for seed, name in ((0, "a"), (0, "b"), (1, "a")):
        adapter = ADAPTERS[kind](Site(name, torch.eye(16, dtype=torch.bfloat16), seed))
        model = nn.Sequential(nn.Linear(16, 16)).to(torch.bfloat16)
        layer = lowrank.adapters.AdaptedLinear(model[0], {"all": adapter}, {"all": slice(0, 16)})
        for _ in range(1 if kind == "unchanged" else 3):
            W = torch.ones(16, 16, dtype=torch.bfloat16)
            write_merged_(W, torch.full((16, 16), 1.004), adapter, "all")
            assert 0 < (W != 1).float().mean() < 1
            seen.append(W)
            merge_layer_(layer, set())
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_training_resumes_bitwise(kind: str, dtype: torch.dtype) -> None:
    """Past merges, from the state dicts alone."""

    def made() -> tuple[nn.Module, lowrank.Optimizer]:
        model = mlp(dtype)
        merge = lowrank.adapters.Merge(2, keep="split" in kind)
        method = lowrank.Method(adapt=(Adapt("fc1,fc2", ADAPTERS[kind]),), merge=merge, rest="train")
        return model, lowrank.apply_(model, method, seed=5).optimizer(lr=1e-2)

    def train(model: nn.Module, opt: lowrank.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)  # dropout draws from the global stream, which a run saves
            F.cross_entropy(model(features(dtype=dtype, seed=step)).float(), torch.arange(6) % 4).backward()
            opt.step()
            opt.zero_grad()

    straight, half, resumed = made(), made(), made()
    train(*straight, range(5))
    train(*half, range(3))
    for new, old in zip(resumed, half, strict=True):
        new.load_state_dict(old.state_dict())
    train(*resumed, range(3, 5))
    expected, found = straight[0].state_dict(), resumed[0].state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].dtype is expected[name].dtype for name in expected)


# --- heads of several workers ----------------------------------------------------------------------------------------


def gathered(workers: list[SplitAdapter]) -> dict[str, Tensor]:
    packs = [worker.pack() for worker in workers]
    return {name: torch.cat([pack[name] for pack in packs]) for name in packs[0]}


@pytest.mark.parametrize("size", [(64, 48), (3, 3)], ids=["heads are gathered", "changes are summed"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("keep", [False, True], ids=["restart", "keep"])
@pytest.mark.parametrize("kind", SPLIT)
def test_packed_heads_make_the_whole(kind: str, keep: bool, count: int, size: tuple[int, int]) -> None:
    """Of any number of workers, before and after a merge; bitwise where heads travel, to rounding where sums do."""
    torch.manual_seed(0)
    W, heads = torch.randn(size), SPLIT[kind].heads
    count = min(count, heads)
    one = SPLIT[kind](Site("layer", W, 3, keep))
    workers = [SPLIT[kind](Site("layer", W, 3, keep, rank, count)) for rank in range(count)]
    assert [worker.heads for worker in workers] == [len(share(heads, rank, count)) for rank in range(count)]
    for _ in range(2):
        perturb_(one)
        with torch.no_grad():
            for worker in workers:
                for name, tensor in one.head_tensors().items():
                    if not worker.held_by_all(name):
                        worker.head_tensors()[name].copy_(worker.own_heads(tensor))
        first, packed = workers[0], gathered(workers)
        if first.gathers_heads or not keep:
            assert torch.equal(first.merged_from(packed, dict.fromkeys(range(heads), 1.0), W), one.merged(W))
            alone = first.merged_from(packed, {heads - 1: 1.0}, W)
            doubled = first.merged_from(packed, {heads - 1: 2.0}, W)
            torch.testing.assert_close(doubled - W, 2 * (alone - W), atol=1e-3, rtol=1e-4)
        mean = sum(worker.heads * worker.packed_delta() for worker in workers) / heads
        torch.testing.assert_close(mean, one.delta(), atol=1e-3, rtol=1e-4)
        sent = max(sum(t.numel() * t.element_size() for t in worker.pack().values()) for worker in workers)
        assert first.packed_bytes(count, "float32") in (sent, None)
        W = one.merged(W)
        one.settle_()
        for worker in workers:
            worker.settle_merged_(packed if first.gathers_heads else None, None)
            assert torch.equal(worker.merged(W), W)
            assert int(worker.merges) == int(one.merges)


@pytest.mark.parametrize(("rank", "most"), [(0, 2), (1, 2), (1, 3)])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", SPLIT)
def test_a_worker_that_restarts_has_contributed_nothing(kind: str, keep: bool, rank: int, most: int) -> None:
    """The heads that are named and no others; those of other workers are none of it."""
    W = torch.randn(6, 5)
    adapter = SPLIT[kind](Site("layer", W, 3, keep, rank, min(most, SPLIT[kind].heads)))
    perturb_(adapter)
    before = {name: own.clone() for name, own in adapter.named_parameters()}
    last, elsewhere = adapter.first_head + adapter.heads - 1, (adapter.first_head - 1) % adapter.all_heads
    adapter.restart_([elsewhere])
    assert all(torch.equal(own, before[name]) for name, own in adapter.named_parameters())
    adapter.restart_([last])
    assert all(torch.equal(own[:-1], before[name][:-1]) for name, own in adapter.named_parameters())
    assert not any(torch.equal(own[-1], before[name][-1]) for name, own in adapter.named_parameters())
    adapter.restart_(range(adapter.all_heads))
    assert torch.equal(adapter.merged(W), W)


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


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("place", PLACES)
def test_model(place: str, kind: str) -> None:
    build, data, where, ties = PLACES[place]
    model, x = build().double().eval(), data()
    x = x.double() if x.is_floating_point() else x
    before, plain = output(model, x), model.state_dict().keys()
    exact = isinstance(ADAPTERS[kind](Site("", torch.ones(2, 2))), lowrank.adapters.Additive)
    method = lowrank.Method(
        adapt=(Adapt(where, ADAPTERS[kind]),), merge=lowrank.adapters.Merge(2), ties=ties, rest="train"
    )
    lowrank.apply_(model, method)
    same = torch.equal if exact else torch.allclose  # the others add the bias after the product
    assert same(output(model, x), before)
    model.train()
    assert same(output(model, x), before)
    nudge_(model)
    changed = output(model.eval(), x)
    assert kind == "unchanged" or not torch.allclose(changed, before, atol=1e-3)
    for _ in range(2):
        merge_adapters_(model)
        torch.testing.assert_close(output(model, x), changed, atol=1e-5, rtol=1e-5)
    nudge_(model, 0.1)
    changed = output(model, x)
    assert type(merge_and_unload(model)) is type(build())
    assert model.state_dict().keys() == plain
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
    for make in ADAPTERS.values():
        model = nn.Sequential(nn.Linear(5, 7))
        lowrank.apply_(model, lowrank.Method(adapt=(Adapt("0", make),), rest="train"))
        x = torch.randn(4, 5)
        torch.testing.assert_close(model(x), F.linear(x, model[0].weight, model[0].bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype is torch.bfloat16
