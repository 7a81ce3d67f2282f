"""Two bits and the largest entries, with error feedback, against loops in float64 over workers, heads and numbers.

Each worker has trained x since all last knew the same, what it had left out before included. It sends C(x), and goes on
with x − C(x): error feedback (MuLoCo, arXiv 2505.23725; SparseLoCo, arXiv 2508.15706) in which the buffer is where
training left it. W moves by the mean of what was sent, by an outer step (DiLoCo, arXiv 2311.08105).
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.ranks.threads import together
from torch import Tensor, nn

import lowrank
from lowrank.adapters import Dense, LoRA, Merge, merge_across_workers
from lowrank.adapters.adapter import Site
from lowrank.adapters.compression import FEEDBACK, Compression, decode, encode, rounded_bytes
from lowrank.methods import Adapt, Method, Use
from lowrank.optim.rules import SGD
from lowrank.plan.synchronisation import consolidated_model
from lowrank.train.checkpointing import _split_tensors as split_tensors
from lowrank.train.checkpointing import consolidated_model_state

WORKERS, HEADS, EVERY, REST_EVERY, STEPS, LR = 2, 4, 3, 2, 9, 0.05
WIDE, OUT, BATCH, OUTER = 6, 5, 8, (0.7, 0.5)
ALONE = [slice(0, 2), slice(2, 4)]  # the heads of each worker


def sent(x: Tensor, exchange: Compression) -> Tensor:
    """C(x), of one matrix or vector: block by block, number by number."""
    most, share = {"2bit": (256, 1.0), "topk3": (4096, 0.03), "topk1": (4096, 0.01)}[exchange]
    numbers = x.flatten().tolist()
    blocks = math.ceil(len(numbers) / most)
    size = math.ceil(len(numbers) / blocks)
    found: list[float] = []
    for start in range(0, len(numbers), size):
        block = numbers[start : start + size]
        block += [0.0] * (size - len(block))
        k = size if share == 1.0 else max(1, round(share * size))
        places = sorted(range(size), key=lambda i: -abs(block[i]))[:k]
        rms = math.sqrt(sum(block[i] ** 2 for i in places) / k)
        out = [0.0] * size
        for side in (False, True):
            on = [i for i in places if (abs(block[i]) >= rms) == side]
            mean = sum(abs(block[i]) for i in on) / max(1, len(on))
            for i in on:
                out[i] = math.copysign(float(torch.tensor(mean).bfloat16()), block[i])
        found += out
    return torch.tensor(found[: len(numbers)], dtype=x.dtype).view(x.shape)


@pytest.mark.parametrize("exchange", FEEDBACK)
@pytest.mark.parametrize("shape", [(2, 7), (300,), (65, 64), (1,), (120, 130)])
def test_what_is_sent_is_the_loops(exchange: Compression, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float().double()
    x = x if len(shape) == 2 else x[0]
    pieces = encode(x, exchange, 0)
    arrived = decode(pieces, exchange, tuple(x.shape), x.dtype)
    assert sum(piece.nbytes for piece in pieces) == rounded_bytes(exchange, tuple(x.shape), 8)
    wanted = torch.stack([sent(each, exchange) for each in x]) if len(shape) == 2 else sent(x, exchange)
    torch.testing.assert_close(arrived, wanted, rtol=2**-7, atol=0)  # a mean in float32 may round to bfloat16's next
    assert torch.equal(arrived == 0, wanted == 0)
    assert (x - arrived).norm() < x.norm()


@pytest.mark.parametrize("exchange", FEEDBACK)
def test_nothing_is_nothing(exchange: Compression) -> None:
    zeros = torch.zeros(3, 5)
    assert torch.equal(decode(encode(zeros, exchange, 0), exchange, (3, 5), zeros.dtype), zeros)


# --- training --------------------------------------------------------------------------------------------------------


def data(step: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, WIDE, generator=noise, dtype=torch.float64)
    return x, torch.randn(BATCH, OUT, generator=noise, dtype=torch.float64)


def start() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, OUT)).double()


def method(kind: str, exchange: Compression) -> Method:
    make: Any = LoRA(rank=2, alpha=4, heads=HEADS, split=True) if kind == "lora" else Dense(heads=HEADS)
    return Method(
        adapt=(Adapt("0", make),),
        rules=(Use("*", SGD()),),
        merge=Merge(EVERY, exchange=exchange, outer_lr=OUTER[0], outer_momentum=OUTER[1]),
        rest="local",
        rest_every=REST_EVERY,
    )


def trained(plan: lowrank.Plan, opt: lowrank.Optimizer, ranks: Any, steps: range) -> list[tuple[Tensor, Tensor]]:
    """W and this worker's bias after each step."""
    found, rows = [], BATCH // ranks.count
    for step in steps:
        x, y = (t[ranks.rank * rows :][:rows] for t in data(step))
        F.mse_loss(plan.model(x), y).backward()
        opt.step()
        opt.zero_grad()
        found.append((plan.model[0].weight.detach().clone(), plan.model[0].bias.detach().clone()))  # type: ignore[union-attr, index, operator]
    return found


def looped(
    model: nn.Sequential, kind: str, exchange: Compression, first: list[Tensor]
) -> list[tuple[Tensor, list[Tensor]]]:
    """The same for all workers; ``first`` are the heads' A."""
    W, M = model[0].weight.detach().clone(), torch.zeros(OUT, WIDE, dtype=torch.float64)  # type: ignore[operator, union-attr]
    common = model[0].bias.detach().clone()  # type: ignore[operator, union-attr]
    biases, s = [common.clone() for _ in range(WORKERS)], 4 / 2
    A, B = [a.clone() for a in first], [torch.zeros(OUT, 2, dtype=torch.float64) for _ in first]
    known_A, known_B = [a.clone() for a in A], [b.clone() for b in B]
    D = [torch.zeros(OUT, WIDE, dtype=torch.float64) for _ in first]
    found, rows = [], BATCH // WORKERS
    for step in range(STEPS):
        for r, heads in enumerate(ALONE):
            x, y = (t[r * rows :][:rows] for t in data(step))
            grad_b = torch.zeros_like(common)
            for n, h in enumerate(range(HEADS)[heads]):
                shard = slice(n * rows // 2, (n + 1) * rows // 2)
                own = D[h] if kind == "dense" else s * (B[h] @ A[h] - known_B[h] @ known_A[h])
                grad_y = 2 * (x[shard] @ (W + own).T + biases[r] - y[shard]) / (rows * OUT)
                grad, grad_b = grad_y.T @ x[shard], grad_b + grad_y.sum(dim=0)
                A[h], B[h] = A[h] - LR * s * B[h].T @ grad, B[h] - LR * s * grad @ A[h].T
                D[h] = D[h] - LR * grad
            biases[r] = biases[r] - LR * grad_b
        if (step + 1) % EVERY == 0:
            change = torch.zeros_like(W)
            if kind == "lora":
                for h in range(HEADS):
                    before = known_B[h] @ known_A[h]
                    known_A[h] = known_A[h] + sent(A[h] - known_A[h], exchange)
                    known_B[h] = known_B[h] + sent(B[h] - known_B[h], exchange)
                    change += s * (known_B[h] @ known_A[h] - before) / HEADS
            else:
                for heads in ALONE:
                    mine = D[heads][0] + D[heads][1]
                    change += sent(mine, exchange) / HEADS
                    D[heads] = [(mine - sent(mine, exchange)) / 2] * 2
            M = OUTER[1] * M + change
            W = W + OUTER[0] * (change + OUTER[1] * M)
        if (step + 1) % REST_EVERY == 0:
            sends = [sent((b - common) / WORKERS, exchange) for b in biases]
            left = [b - common - WORKERS * c for b, c in zip(biases, sends, strict=True)]
            common = common + sum(sends)
            biases = [common + error for error in left]
        found.append((W, list(biases)))
    return found


@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize("exchange", ["2bit", "topk3"])
def test_training_is_the_loops(exchange: Compression, kind: str) -> None:
    model = start()
    copies = [copy.deepcopy(model) for _ in range(WORKERS)]
    plain = copy.deepcopy(model)
    lowrank.apply_(plain, method(kind, exchange), seed=3)
    first = [*getattr(plain[0].adapters["all"], "A", torch.zeros(HEADS, 2, WIDE)).detach().double()]  # type: ignore[union-attr, index]

    def one(ranks: Any) -> list[tuple[Tensor, Tensor]]:
        plan = lowrank.apply_(copies[ranks.rank], method(kind, exchange), seed=3, ranks=ranks)
        return trained(plan, plan.optimizer(lr=LR), ranks, range(STEPS))

    ours = together(WORKERS, one)
    theirs = looped(model, kind, exchange, first)
    for step, (W, biases) in enumerate(theirs):
        assert torch.equal(ours[0][step][0], ours[1][step][0])
        for r in range(WORKERS):
            torch.testing.assert_close(ours[r][step][0], W, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(ours[r][step][1], biases[r], rtol=1e-7, atol=1e-9)
    assert not torch.equal(theirs[-1][1][0], theirs[-1][1][1])  # at the last average something was left out


@pytest.mark.parametrize("poisoned", ["A", "B"])
def test_a_head_that_begins_anew_at_an_evaluation_is_known_to_all(poisoned: str) -> None:
    """Between merges, too, what all keep of it begins anew: the next merges are the same everywhere."""
    model = start()
    copies = [copy.deepcopy(model) for _ in range(WORKERS)]

    def one(ranks: Any) -> list[tuple[Tensor, Tensor]]:
        plan = lowrank.apply_(copies[ranks.rank], method("lora", "2bit"), seed=3, ranks=ranks)
        opt = plan.optimizer(lr=LR)
        trained(plan, opt, ranks, range(4))
        adapter: Any = plan.model[0].adapters["all"]  # type: ignore[union-attr, index]
        if ranks.rank == 1:
            getattr(adapter, poisoned).data[0] = float("nan")
        with consolidated_model(plan, opt):
            whole = plan.model.eval()(data(0)[0])
        plan.model.train()
        assert whole.isfinite().all()
        return [(whole, adapter.kept_B.clone()), *trained(plan, opt, ranks, range(4, 7))]

    ours = together(WORKERS, one)
    for mine, other in zip(*ours, strict=True):
        assert torch.equal(mine[0], other[0])
    assert torch.equal(ours[0][0][1], ours[1][0][1])


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_goes_on_with_what_was_left_out(workers: int) -> None:
    """Saved by two between two merges, and taken up: the whole model is the same, before and after the next merge, as
    what was left out is in the heads."""
    model = start()
    copies = [copy.deepcopy(model) for _ in range(WORKERS)]
    x = data(99)[0]

    def saved(ranks: Any) -> tuple[dict[str, Tensor], Tensor]:
        plan = lowrank.apply_(copies[ranks.rank], frozen(), seed=3, ranks=ranks)
        opt = plan.optimizer(lr=LR)
        trained(plan, opt, ranks, range(7))
        with consolidated_model(plan, opt), torch.no_grad():
            return {n: t.clone() for n, t in consolidated_model_state(plan).items()}, plan.model.eval()(x)

    state, before = together(WORKERS, saved)[0]
    fresh = [copy.deepcopy(model) for _ in range(workers)]

    def resumed(ranks: Any) -> list[Tensor]:
        several = ranks if ranks.count > 1 else None
        plan = lowrank.apply_(fresh[ranks.rank], frozen(), seed=3, ranks=several)
        opt, heads = plan.optimizer(lr=LR), split_tensors(plan.model)
        own = {n: heads[n][0].own_heads(t, heads[n][1]) if n in heads else t for n, t in state.items()}
        plan.model.load_state_dict(own)
        found = []
        for _ in range(2):
            with consolidated_model(plan, opt), torch.no_grad():
                found.append(plan.model.eval()(x))
            lowrank.merge_(plan, opt)
        return found

    for outputs in together(workers, resumed):
        for output in outputs:
            torch.testing.assert_close(output, before, rtol=1e-10, atol=1e-12)


def frozen() -> Method:
    return lowrank.methods.lte("all-linear", rank=2, heads=HEADS, merge_every=EVERY, exchange="topk3", rest="freeze")


@pytest.mark.parametrize("exchange", ["int8", "bfloat16"])
def test_no_two_workers_and_no_two_merges_round_alike(exchange: Compression, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that they shared would not average out."""
    ticks: list[object] = []
    monkeypatch.setattr(merge_across_workers, "encode", lambda x, compression, tick: (ticks.append(tick), [x])[1])
    monkeypatch.setattr(merge_across_workers, "start_gather_heads", lambda *_: None)
    for rank in range(3):
        site = Site("layer", torch.randn(OUT, WIDE), 3, True, rank, 3, exchange)
        adapter = LoRA(rank=2, heads=3, split=True)(site)
        for merges in range(5):
            adapter.merges.fill_(merges)
            workers: Any = SimpleNamespace(rank=rank, count=3)
            merge_across_workers._start_heads([adapter], workers, exchange, None)  # type: ignore[arg-type]
    assert all(type(tick) is int for tick in ticks)
    assert len(set(ticks)) == len(ticks) / 2 == 15  # A and B are rounded apart
