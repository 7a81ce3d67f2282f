"""LoRA: starts, scales, dropout, the embedding's side of a tied matrix, and the errors of its options."""

import pytest
import torch
import torch.nn.functional as F
from tests.models import nudge_
from torch import nn

import lowrank
from lowrank.adapters import LoRA, Site


def site(out: int = 8, wide: int = 6, keep: bool = False, dtype: torch.dtype = torch.float32) -> Site:
    torch.manual_seed(0)
    return Site("layer", torch.randn(out, wide).to(dtype), 1, keep)


class TestScale:
    @pytest.mark.parametrize(
        ("options", "scale"),
        [
            ({"rank": 4}, 1.0),
            ({"rank": 4, "alpha": 8}, 2.0),
            ({"rank": 8, "alpha": 4}, 0.5),  # true division: alpha below the rank is not 0
            ({"rank": 4, "alpha": 8, "rank_stabilised": True}, 4.0),
            ({"rank": 4, "rank_stabilised": True}, 2.0),
        ],
    )
    def test_value(self, options: dict[str, object], scale: float) -> None:
        assert LoRA(**options).scale == scale  # type: ignore[arg-type]

    def test_heads_are_averaged(self) -> None:
        adapter = LoRA(rank=2, alpha=3, heads=4)(site())
        with torch.no_grad():
            adapter.B.normal_()
        expected = sum(1.5 * adapter.B[h] @ adapter.A[h] for h in range(4)) / 4
        torch.testing.assert_close(adapter.delta(), expected)


class TestStart:
    def test_shapes_and_dtypes(self) -> None:
        for dtype, wide in (
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float64, torch.float64),
        ):
            adapter = LoRA(rank=2, heads=3)(site(dtype=dtype))
            assert adapter.A.shape == (3, 2, 6)
            assert adapter.B.shape == (3, 8, 2)
            assert adapter.A.dtype is adapter.B.dtype is wide
            assert not adapter.B.any()

    def test_one_head_has_a_head_dimension_too(self) -> None:
        assert LoRA(rank=2)(site()).A.shape == (1, 2, 6)

    def test_kaiming(self) -> None:
        A = LoRA(rank=8, heads=50)(site(9, 9)).A
        assert float(A.abs().max()) <= 9**-0.5
        assert float(A.std()) == pytest.approx(9**-0.5 / 3**0.5, rel=0.05)

    @pytest.mark.parametrize(("init", "square"), [("orthogonal", 8 / 6), ("reference", 6 / 2)])
    def test_semi_orthogonal(self, init: str, square: float) -> None:
        """A Aᵀ = (out/in)·I, the paper's, or (in/rank)·I, its code's."""
        A = LoRA(rank=2, heads=3, init=init)(site()).A  # type: ignore[arg-type]
        torch.testing.assert_close(A @ A.mT, square * torch.eye(2).expand(3, 2, 2))

    def test_pissa_starts_from_the_leading_singular_vectors(self) -> None:
        place = site()
        adapter = LoRA(rank=3, alpha=2, init="pissa")(place)
        U, S, Vh = torch.linalg.svd(place.weight, full_matrices=False)
        torch.testing.assert_close(
            adapter.config.scale * adapter.B[0] @ adapter.A[0], U[:, :3] @ S[:3].diag() @ Vh[:3], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(adapter.A[0] @ adapter.A[0].T, adapter.B[0].T @ adapter.B[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(adapter.merged(place.weight), place.weight)

    def test_on_the_meta_device(self) -> None:
        for init in ("kaiming", "orthogonal", "pissa"):
            adapter = LoRA(rank=2, init=init)(Site("x", torch.empty(8, 6, device="meta")))  # type: ignore[arg-type]
            assert adapter.A.is_meta
            assert adapter.B.is_meta


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"rank": 0}, "rank=0 must be a whole number of at least 1"),
            ({"rank": 2.5}, "rank=2.5 must be a whole number"),
            ({"heads": 0}, "heads=0 must be a whole number"),
            ({"init": "gauss"}, "init='gauss' is unknown; it is one of kaiming, orthogonal, reference, pissa"),
            ({"dropout": 1.0}, "dropout=1.0 must lie in"),
            ({"dropout": -0.1}, "dropout=-0.1 must lie in"),
            ({"alpha": 0}, "alpha=0 must be above 0"),
            ({"alpha": float("nan")}, "alpha=nan must be above 0"),
            ({"init": "pissa", "heads": 2}, "gives every head the same start"),
        ],
    )
    def test_options(self, options: dict[str, object], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            LoRA(**options)  # type: ignore[arg-type]

    def test_rank_above_the_matrix(self) -> None:
        LoRA(rank=6)(site())
        with pytest.raises(
            ValueError, match=r"rank=7 is above the smaller side of layer \(8 × 6\); use a rank of at most 6"
        ):
            LoRA(rank=7)(site())


class TestDropout:
    def test_falls_on_the_change_alone_and_in_training_alone(self) -> None:
        place, x = site(), torch.randn(4, 6)
        adapter = LoRA(rank=2, dropout=0.5)(place)
        nothing = adapter(x, place.weight)
        with torch.no_grad():
            adapter.B.normal_()
        samples = torch.stack([adapter(x, place.weight) for _ in range(4000)])
        assert samples.std(dim=0).max() > 0.1
        adapter.eval()
        mean = samples.mean(dim=0) - nothing
        torch.testing.assert_close(mean, adapter(x, place.weight) - nothing, atol=0.15, rtol=0.1)
        assert torch.equal(adapter(x, place.weight), adapter(x, place.weight))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_rows_are_rows_of_the_dense_matrix(split: bool, keep: bool) -> None:
    """The embedding's side: values and gradients as from a dense table, of the head that owns the example."""
    place = site(out=9, wide=5, keep=keep, dtype=torch.float64)
    adapter = LoRA(rank=2, heads=3, split=split, alpha=3)(place)
    for _ in range(2):
        with torch.no_grad():
            adapter.A.normal_()
            adapter.B.normal_()
        if keep and not adapter.subtracts:
            adapter.settle_()
    ids = torch.randint(0, 9, (5, 4))
    changes = 1.5 * (adapter.B @ adapter.A - (adapter.kept_B @ adapter.kept_A if keep else 0))
    own = [0, 0, 1, 1, 2]
    tables = [place.weight + (changes[own[i]] if split else changes.mean(dim=0)) for i in range(5)]
    expected = torch.stack([F.embedding(ids[i], tables[i]) for i in range(5)])
    y, g = adapter.rows(ids, place.weight), torch.randn(5, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y, [adapter.A, adapter.B], g)
    theirs = torch.autograd.grad(expected, [adapter.A, adapter.B], g)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    mean = place.weight + changes.mean(dim=0)
    torch.testing.assert_close(adapter.eval().rows(ids, place.weight), F.embedding(ids, mean))


@pytest.mark.parametrize("kind", [LoRA(rank=2, heads=2), LoRA(rank=2, init="pissa"), LoRA(rank=2)])
def test_row_norms_come_from_the_factors(kind: LoRA) -> None:
    place = site()
    adapter = kind(place)
    with torch.no_grad():
        adapter.A.normal_()
        adapter.B.normal_()
    torch.testing.assert_close(adapter.row_norms(place.weight), adapter.merged(place.weight).norm(dim=1))


def test_kept_factors_lose_nothing_in_bfloat16() -> None:
    """Two large products that all but cancel: subtracting factors first keeps what training added since the merge."""
    torch.manual_seed(0)
    W = torch.zeros(8, 6)
    adapter = LoRA(rank=2, alpha=4096)(Site("x", W, 0, keep=True))
    with torch.no_grad():
        adapter.B.normal_()
        adapter.settle_()
        adapter.B += 1e-4 * torch.randn_like(adapter.B)
        x = torch.randn(100, 6)
        exact = x @ adapter.delta().T
        narrow = adapter(x.bfloat16(), W.bfloat16()).float()
    assert float((narrow - exact).norm() / exact.norm()) < 0.02


def test_backward_keeps_the_input_and_thin_tensors() -> None:
    """What a layer holds for its backward pass: x once, z and the factors; nothing of the output's size."""
    layer = nn.Sequential(nn.Linear(64, 96, bias=False))
    lowrank.apply_(layer, lowrank.methods.lte("0", rank=2, heads=4, merge_every=5))
    nudge_(layer)
    lowrank.adapters.merge_adapters_(layer)
    x, saved = torch.randn(50, 64, requires_grad=True), {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x).sum().backward()
    own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), *layer.buffers())}
    new = sorted(size for pointer, size in saved.items() if pointer not in own)
    assert new[-1] == x.numel() * 4
    assert sum(new[:-1]) <= 4 * (4 * 4 * (64 + 96) + 50 * 4)
