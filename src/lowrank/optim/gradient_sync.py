"""What becomes of gradients before a rule sees them: summed over ranks, clipped, read as this rank's shard.

A rule that ``accumulates_projected`` needs R = QᵀG alone for its coming step; R then takes the gradient's place,
between micro-batches and on the way to other ranks.

The sums are made after the backward pass, or overlapped with it as in torch's DDP (:class:`OverlappedSums`): parameters
are put into buckets in the reverse of their order, which is about that in which their gradients are ready. As soon as
all of a bucket are, and all buckets before it have been started, its sum is: so every rank starts the same sums in the
same order, whichever parameters it has used. What was not started by then is when the sums are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.distributed.collectives import Group, buckets
from lowrank.distributed.shards import Shard, to_local
from lowrank.optim.basis_fit import together
from lowrank.optim.rules import Refresh, Rule, wide

Project = Callable[[nn.Parameter, Tensor], Tensor | None]
Wait = Callable[[dict[nn.Parameter, Tensor]], None]

BUCKET = 4 * 2**20  # bytes: the smaller a bucket, the sooner the first sum starts


def dense(g: Tensor | None) -> Tensor:
    """The gradient, or the shard of it here.

    Raises:
        RuntimeError: it is sparse.
    """
    assert g is not None
    if g.is_sparse:
        raise RuntimeError("sparse gradients are not supported: make the embedding with sparse=False")
    return to_local(g) if type(g) is not Tensor or g.requires_grad else g


def clipped(g: Tensor, limit: float, shard: Shard | None) -> Tensor:
    """The gradient, float32 or wider, scaled so that its norm is at most ``limit``; of a ``shard`` the whole's norm."""
    g = g.to(wide(g.dtype))
    norm = torch.linalg.vector_norm(g)
    if shard is not None:
        norm = shard.total(norm.square()).sqrt()
    return g * (limit / (norm + 1e-6)).clamp(max=1.0)


def start_sum(group: Group, params: Sequence[nn.Parameter], project: Project) -> Wait:
    """Start to sum the gradients of parameters over a group, whose members all must call it, and go on; the function
    returned waits, and takes the dict for what was projected.

    A gradient that ``project`` makes small is summed so: ``grad`` is then None, and the sum goes into the dict. A
    parameter without a gradient on some ranks counts as zero there, and without one on all stays without.
    """
    present = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    summed: list[Tensor] = []
    small: dict[nn.Parameter, Tensor] = {}
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        g = dense(p.grad)
        if (r := project(p, g)) is not None:
            small[p], p.grad = r, None
        summed.append(small.get(p, g))
    wait_for_sums = group.start_sum([present, *summed])

    def wait(held: dict[nn.Parameter, Tensor]) -> None:
        wait_for_sums()
        for p, holders in zip(params, present.tolist(), strict=True):
            if not holders:
                p.grad = None
            elif p in small:
                held[p] = small[p]

    return wait


def sum_gradients_(summed: Mapping[nn.Parameter, Group], project: Project, held: dict[nn.Parameter, Tensor]) -> None:
    """``start_sum``, waited for, of each parameter over the group that ``summed`` gives for it."""
    for group in dict.fromkeys(summed.values()):
        start_sum(group, [p for p, over in summed.items() if over is group], project)(held)


class OverlappedSums:
    """The sums of one optimizer's gradients, started as each arrives and finished once a step. Final.

    Args:
        summed: over whom each parameter's gradient is summed.
        project: the gradient in the smaller form that may stand for it, or None.
        micro_batches: backward passes in a step.
    """

    def __init__(self, summed: Mapping[nn.Parameter, Group], project: Project, micro_batches: int):
        self.project, self.micro_batches = project, micro_batches
        self._buckets: list[tuple[Group, list[nn.Parameter]]] = []
        for group in dict.fromkeys(summed.values()):
            params = [p for p, over in reversed(list(summed.items())) if over is group]
            self._buckets += [(group, bucket) for bucket in buckets(params, BUCKET)]
        self._bucket_of = {p: i for i, (_, bucket) in enumerate(self._buckets) for p in bucket}
        self._reset()

    @property
    def params(self) -> list[nn.Parameter]:
        """Those whose gradients are summed."""
        return list(self._bucket_of)

    def _reset(self) -> None:
        self._seen = dict.fromkeys(self._bucket_of, 0)
        self._missing = [len(bucket) for _, bucket in self._buckets]
        self._started: list[Wait] = []

    @torch.no_grad()
    def arrived(self, p: nn.Parameter) -> None:
        """To be called from the hook of each: the gradient of ``p`` for one micro-batch is complete."""
        self._seen[p] += 1
        if self._seen[p] > self.micro_batches:
            raise RuntimeError(
                f"a gradient came {self._seen[p]} times, and its sum over the ranks may be in flight since the "
                f"{self.micro_batches}. time: call step() after {self.micro_batches} backward passes, or tell "
                "sum_during_backward() how many your loop makes"
            )
        if self._seen[p] == self.micro_batches:
            self._missing[self._bucket_of[p]] -= 1
            while len(self._started) < len(self._buckets) and not self._missing[len(self._started)]:
                self._start()

    def _start(self) -> None:
        group, params = self._buckets[len(self._started)]
        self._started.append(start_sum(group, params, self.project))

    def finish(self, held: dict[nn.Parameter, Tensor]) -> None:
        """Start what has not been, and wait for all: gradients are then the sums, and those that travelled as R are
        in ``held``. Every rank must call it."""
        while len(self._started) < len(self._buckets):
            self._start()
        for wait in self._started:
            wait(held)
        self._reset()

    def drop(self) -> None:
        """Wait for what is in flight, and forget it."""
        for wait in self._started:
            wait({})
        self._reset()


def agree_bases_(
    params: Iterable[nn.Parameter],
    rules: Mapping[nn.Parameter, Rule],
    states: Mapping[Any, Any],
    agreed: Mapping[nn.Parameter, Group],
) -> None:
    """Refresh the bases that heads share and that are due; with those whom ``agreed`` names, where others have heads of
    the same parameter."""
    due: dict[Group | None, list[Refresh]] = {}
    for p in params:
        if not rules[p].agrees:
            continue
        others = agreed.get(p)
        if others is None and p.grad is None:
            continue
        g = torch.zeros_like(p) if p.grad is None else dense(p.grad)
        if (refresh := rules[p].agreement(g, states[p])) is not None:
            due.setdefault(others, []).append(refresh)
    for others, refreshes in due.items():
        together(refreshes, (lambda yielded: None) if others is None else others.sum_)
