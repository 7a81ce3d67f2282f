"""What several workers do between two steps: merges, and averages of what they trained apart.

    merge due      W ← mean of merged(W) over the heads of all workers (``adapters.merge_across_workers``); adapters
                   settle. Overlapped, what was sent at the last merge arrives, and this one's is sent
    average due    the rest that trains locally ← its mean over the workers (local SGD, arXiv 1805.09767)
                   either for one fragment of the matrices, or of the rest, at a time (``Merge.fragments``)
    before both    every worker reports whether its own numbers are finite, and what it has done, where ``Merge.weigh``
                   goes by that. One whose numbers are not is left out, counted and reported; its heads and their state
                   are restarted, and its rest becomes the mean of the others'

A worker is a rank, or several ranks in step (``distributed.workers``). All that changes between steps is in the
``Synchroniser`` of an optimizer: what is in flight, the reference copies, what has been done, who was left out.

``consolidated_model`` gives every rank the model that all of them make together, for evaluation and for checkpoints;
there heads and workers weigh the same, whatever they will weigh in the next merge.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lowrank.adapters import Adapter, SplitAdapter
from lowrank.adapters.compression import add_up_
from lowrank.adapters.fragments import divide, due
from lowrank.adapters.head_gather import consolidated_heads, split_adapters
from lowrank.adapters.layers import adapted_layers
from lowrank.adapters.merge import Merge, merge_adapters_
from lowrank.adapters.merge_across_workers import MergeWeights, merge_across_workers_, start_merge
from lowrank.distributed.collectives import Group, share
from lowrank.distributed.shards import is_sharded, reshard_, to_local
from lowrank.distributed.workers import ProcessLayout
from lowrank.linalg.rounding import wide
from lowrank.linalg.subspace import Subspace
from lowrank.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from lowrank.plan.plan import Plan


class ProgressCounter:
    """What a worker has done since the last merge and since the last average: its weight there (``Merge.weigh``).

    ``tokens``: as many as ``add_tokens`` was told. ``steps``: optimizer steps. ``seconds``: from the end of one
    synchronisation to the start of the next, evaluation included. ``equal`` counts nothing.
    """

    def __init__(self, kind: str = "equal"):
        self.kind = kind
        self.since = {"merge": 0.0, "average": 0.0}
        self._clock = time.perf_counter()

    def add_tokens(self, tokens: int) -> None:
        """So many tokens (predictions) were learnt from."""
        if self.kind == "tokens":
            self._add(tokens)

    def add_step(self) -> None:
        """A step was made."""
        if self.kind == "steps":
            self._add(1)
        if self.kind == "seconds":
            now = time.perf_counter()
            self._add(now - self._clock)
            self._clock = now

    def reset(self, *what: Literal["merge", "average"]) -> None:
        """Count anew after a synchronisation, which is itself no work."""
        self._clock = time.perf_counter()
        self.since.update(dict.fromkeys(what, 0.0))

    def _add(self, amount: float) -> None:
        for what in self.since:
            self.since[what] += amount


@dataclass(frozen=True)
class Participants:
    """Who takes part in a synchronisation: the workers left out, and what each weighs in a merge and in an average
    (None: heads, or workers, weigh the same)."""

    left_out: frozenset[int] = frozenset()
    merge: list[float] | None = None
    average: list[float] | None = None

    def in_average(self, workers: Group) -> tuple[float, float]:
        """What this worker's rest counts for in the mean, and what all count for together."""
        if self.average is None:
            return float(workers.rank not in self.left_out), workers.count - len(self.left_out)
        return self.average[workers.rank], _total(self.average)


class Synchroniser:
    """Merges and averages of one training run: called after each step with the number of completed steps.

    ``plan.optimizer()`` makes one, ``opt.synchroniser``; every rank has one, and all of them must do the same.

    Args:
        model: with adapters.
        layout: the processes that train it.
        merge: when and how adapters fold into the weights; None for never.
        adapters: all of them.
        own: the heads that this worker alone trains, with their adapter.
        local: the parameters that each worker trains by itself.
        rest_every: steps between two averages of ``local``.
        automatic: whether merges happen when they are due; else by ``synchronise_`` alone.

    ``optimizer`` is the one whose state forgets at a merge, if any; ``left_out`` holds a worker's number for each time
    that it was left out, ``reference_copies`` the ``local`` parameters as they last were on all workers.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ProcessLayout,
        merge: Merge | None,
        *,
        adapters: Sequence[Adapter] = (),
        own: Mapping[nn.Parameter, SplitAdapter] | None = None,
        local: Sequence[nn.Parameter] = (),
        rest_every: int = 1,
        automatic: bool = True,
    ):
        self.model, self.layout, self.merge, self.automatic = model, layout, merge, automatic
        self.adapters, self.own, self.local, self.rest_every = list(adapters), dict(own or {}), list(local), rest_every
        self.optimizer: Optimizer | None = None
        self.progress = ProgressCounter(merge.weigh if merge is not None and layout.workers is not None else "equal")
        self.left_out: list[int] = []
        self.reference_copies: list[Tensor] = []
        self._read: set[str] | None = None  # layers whose weight was read past them; None from the first step on
        self._in_flight: dict[int, tuple[int, Callable[[], None]]] = {}  # of a fragment: which merge was sent; its end
        self.fragments = 1 if merge is None else merge.fragments
        split = split_adapters(model)
        self._matrices = fragments_of(split, self.fragments)

    # --- when ----------------------------------------------------------------------------------------------------

    def __call__(self, steps: int) -> None:
        """Do what is due after ``steps`` completed steps.

        Raises:
            RuntimeError: in the first step the model has read an adapted layer's weight past the layer.
        """
        if self._read is not None:
            self._check_reads_(self._read)
        self.progress.add_step()
        merging = self._merges_at(steps) if self.automatic else None
        averaging = self._averages_at(steps)
        if merging is not None or averaging is not None:
            self._synchronise_([] if merging is None else [merging], [] if averaging is None else [averaging])

    def communicates_at(self, steps: int) -> bool:
        """Whether workers communicate after ``steps`` completed steps: a merge or an average is due."""
        return (bool(self.own) and self._merges_at(steps) is not None) or self._averages_at(steps) is not None

    def _merges_at(self, steps: int) -> int | None:
        """The fragment that merges then."""
        return None if self.merge is None else due(steps, self.merge.merge_every, self.fragments)

    def _averages_at(self, steps: int) -> int | None:
        """The fragment of the rest that is averaged then."""
        return due(steps, self.rest_every, self.fragments) if self.local else None

    def synchronise_(self, *, merging: bool, averaging: bool, largest: bool = False) -> None:
        """Merge, average, or both, now, all fragments or only the ``largest``; every rank must call it."""
        every = range(self.fragments)
        merged = every[:1] if largest else every  # the first has the most, and of the rest the last
        self._synchronise_(merged if merging else [], (every[-1:] if largest else every) if averaging else [])

    def _synchronise_(self, merging: Sequence[int], averaging: Sequence[int]) -> None:
        """The same for these fragments."""
        for fragment in merging:
            self._wait_(fragment)
        participants = self.exclude_non_finite_()
        for fragment in merging:
            self._merge_(participants, fragment)
        if merging:
            self.progress.reset("merge")
        for fragment in range(self.fragments) if participants.left_out else averaging:
            self._average_rest_(participants, fragment, self.optimizer.steps if self.optimizer is not None else 0)
            self.progress.reset("average")

    def watch_weights_(self) -> None:
        """Until the first step find who reads the weight of an adapted layer without calling it (``F.linear``, say)."""
        self._read = set()
        for name, layer in adapted_layers(self.model):
            layer.on_read = partial(self._read.add, name)

    def _check_reads_(self, read: set[str]) -> None:
        self._read = None
        for _, layer in adapted_layers(self.model):
            layer.on_read = None
        if read:
            raise RuntimeError(
                f"the model calls {min(read)}, which is adapted, and also reads its weight without calling it (by "
                "F.linear, say), where the adapter is not seen and a merge would change what is computed: leave it out "
                "with exclude_modules, or call the layer there"
            )

    # --- merges --------------------------------------------------------------------------------------------------

    def _merge_(self, participants: Participants, fragment: int) -> None:
        """Fold the adapters of a fragment into the weights, without the heads of those left out; then the optimizer
        forgets."""
        merge, workers, opt = self.merge, self.layout.workers, self.optimizer
        if participants.merge is not None:
            _total(participants.merge)
        later = self._later(fragment)
        terms = MergeWeights(participants.left_out, participants.merge, self._spans(), self.layout.intra_worker, later)
        reshard_(self.model)
        if merge is not None and merge.overlap:
            for adapter in self._matrices[fragment]:
                adapter.remember_()
            if workers is not None:
                sent = self._merges_sent(fragment), start_merge(self.model, workers, merge, terms)
                self._in_flight[fragment] = sent
        elif workers is not None and self.own and merge is not None:
            merge_across_workers_(self.model, workers, merge, terms)
        else:
            merge_adapters_(self.model, merge, self.layout.intra_worker, later)
        if opt is not None and merge is not None and merge.forget:
            merged = [adapter for adapter in self.adapters if adapter not in later]
            opt.forget([p for adapter in merged for p in adapter.parameters()], merge.forget)

    def _later(self, fragment: int) -> list[SplitAdapter]:
        """The adapters that are merged with other fragments."""
        return [a for other, some in enumerate(self._matrices) if other != fragment for a in some]

    def _wait_(self, fragment: int) -> None:
        """Fold in what was sent at the fragment's last merge, if that is still in flight; of several ranks all must
        call it."""
        pending, sent = self._in_flight.pop(fragment, None), self._matrices[fragment]
        if self.merge is None or not self.merge.overlap or not any(adapter.is_in_flight for adapter in sent):
            return
        reshard_(self.model)
        if pending is not None and pending[0] == self._merges_sent(fragment):
            pending[1]()
        else:  # in one process, after a resume or another's merge: what has been remembered is sent now
            terms = MergeWeights(intra_worker=self.layout.intra_worker, later=self._later(fragment))
            start_merge(self.model, self.layout.workers, self.merge, terms)()

    def _merges_sent(self, fragment: int) -> int:
        return sum(int(adapter.get_buffer("sent")) for adapter in self._matrices[fragment])

    def _spans(self) -> dict[SplitAdapter, Subspace]:
        """The subspace that the changes of dense heads lie in, where the rule that trains them keeps to one."""
        opt = self.optimizer
        found = {} if opt is None else {adapter: opt.span(p) for p, adapter in self.own.items()}
        return {adapter: span for adapter, span in found.items() if span and adapter.merges_in_subspace}

    # --- who takes part ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def exclude_non_finite_(self) -> Participants:
        """Every worker reports whether its own numbers are finite, and what it has done; where they are not, its heads
        and its optimizer state begin anew.

        Raises:
            FloatingPointError: they are not on any worker.
        """
        workers, intra_worker = self.layout.workers, self.layout.intra_worker
        mine = [*self.own, *self.local]
        if workers is None or not mine:
            return Participants()
        report = 1.0 - torch.stack([to_local(p).isfinite().all() for p in mine]).all().float()[None]
        if self.progress.kind != "equal":
            done = self.progress.since.values()
            report = torch.tensor([float(report), *done], dtype=torch.float64, device=report.device)
        if (
            intra_worker is not None
        ):  # not finite may be another rank's shard; and what they have done, they did together
            intra_worker.sum_([report])
        reports = workers.gather([report])[0]
        left_out = frozenset(i for i, faults in enumerate(reports[:, 0].tolist()) if faults)
        member = "rank" if intra_worker is None else "worker"
        if len(left_out) == workers.count:
            raise FloatingPointError(
                f"the trained numbers of every {member} are not finite: resume from the last checkpoint with a lower "
                "--lr"
            )
        if left_out:
            self._restart_(left_out, mine, member)
        if self.progress.kind == "equal":
            return Participants(left_out)
        reports[sorted(left_out)] = 0.0
        return Participants(left_out, reports[:, 1].tolist(), reports[:, 2].tolist())

    def _restart_(self, left_out: frozenset[int], mine: Sequence[nn.Parameter], member: str) -> None:
        """Let the workers ``left_out``, of which this may be one, begin anew, and say so."""
        for fragment in range(self.fragments):  # before heads begin anew that have something in flight
            self._wait_(fragment)
        workers = self.layout.workers
        if workers is not None:
            for adapter in split_adapters(self.model):
                adapter.restart_([h for r in left_out for h in share(adapter.all_heads, r, workers.count)])
            if self.optimizer is not None and workers.rank in left_out:
                self.optimizer.forget(mine, 1.0)
        for number in sorted(left_out):
            self.left_out.append(number)
            warnings.warn(
                f"{member} {number} is left out of this merge: its numbers are not finite; it begins anew",
                stacklevel=2,
            )

    # --- averages ------------------------------------------------------------------------------------------------

    def keep_reference_copies_(self) -> None:
        """Keep the local rest, which is the same on all ranks now, where ``Merge.exchange`` rounds its changes."""
        if self.merge is not None and self.merge.exchange != "float32":
            self.reference_copies = [to_local(p).to(wide(p.dtype), copy=True) for p in self.local]

    @torch.no_grad()
    def _average_rest_(self, participants: Participants, fragment: int, tick: int = 0) -> None:
        """Of the rest that trains locally a fragment ← its mean over the workers that take part; bitwise the same.

        What travels is rounded as ``Merge.exchange`` says: then it is what the rest has changed by since it was last
        the same everywhere (the reference copies), so that rounding is as fine as the change. With error feedback each
        worker goes on with what was left out of its own, which so is in its next change.
        """
        if self.layout.workers is None:
            return
        reshard_(self.model)
        rest = [self._rows(to_local(p), fragment) for p in self.local]
        mine, total = participants.in_average(self.layout.workers)
        if not self.reference_copies or self.merge is None:
            self._average_(rest, mine, total)
            return
        copies = [self._rows(a, fragment) for a in self.reference_copies]
        changes = [p.to(a.dtype) - a for p, a in zip(rest, copies, strict=True)]
        for change in changes:
            change.mul_(mine / total) if mine else change.zero_()  # what is not finite counts for nothing
        left: dict[int, Tensor] = {}
        for group, some in self._by_group(changes):
            out = zip(some, add_up_(some, group, self.merge.exchange, tick), strict=True)
            left |= {id(change): error for change, error in out if error is not None and mine}
        for change, p, a in zip(changes, rest, copies, strict=True):
            a.add_(change)
            p.copy_(a.add(left[id(change)], alpha=total / mine) if id(change) in left else a)

    def _rows(self, tensor: Tensor, fragment: int) -> Tensor:
        """Of a tensor of the rest the rows of a fragment, a view; there may be none."""
        if self.fragments == 1:
            return tensor
        rows = share(len(tensor) if tensor.dim() else 1, fragment, self.fragments)
        return (tensor if tensor.dim() else tensor[None])[rows.start : rows.stop]

    def _average_(self, rest: Sequence[Tensor], mine: float, total: float) -> None:
        for tensor in rest:
            tensor.mul_(mine) if mine else tensor.zero_()
        for group, some in self._by_group(rest):
            group.sum_(some)
        for tensor in rest:
            tensor.div_(total)

    def _by_group(self, rest: Sequence[Tensor]) -> Iterator[tuple[Group, list[Tensor]]]:
        """With whom this rank adds up which tensors of ``local``: shards with its cross-worker group, who hold the same
        shards of other workers' parameters; what the ranks of a worker hold alike with all workers."""
        sharded = [is_sharded(p) for p in self.local]
        for group, shards in ((self.layout.workers, False), (self.layout.cross_worker, True)):
            some = [tensor for tensor, is_shard in zip(rest, sharded, strict=True) if is_shard == shards]
            if some and group is not None:
                yield group, some

    # --- all together --------------------------------------------------------------------------------------------

    @contextmanager
    def consolidated_model(self) -> Iterator[None]:
        """A context in which the model is what all ranks make together: all heads, the mean of the rest."""
        workers = self.layout.workers
        if workers is None or not (self.own or self.local):
            try:
                yield
            finally:
                reshard_(self.model)
            return
        participants = self.exclude_non_finite_()
        if participants.left_out:
            for fragment in range(self.fragments):
                self._average_rest_(participants, fragment)
            self.progress.reset("average")
        reshard_(self.model)
        rest = [to_local(p) for p in self.local]
        copies = [tensor.clone() for tensor in rest]
        with consolidated_heads(self.model, workers):
            try:
                with torch.no_grad():
                    self._average_(rest, 1.0, workers.count)
                yield
            finally:
                reshard_(self.model)
                with torch.no_grad():
                    for tensor, before in zip(rest, copies, strict=True):
                        tensor.copy_(before)


def fragments_of(adapters: Sequence[SplitAdapter], fragments: int) -> list[list[SplitAdapter]]:
    """The adapters of each fragment; all in the first where there is one. By what a head has, whoever holds it.

    Raises:
        ValueError: there are fewer adapters than fragments.
    """
    if fragments > max(1, len(adapters)):
        raise ValueError(
            f"fragments={fragments} divide the adapted matrices, and there are {len(adapters)}: use at most "
            f"{max(1, len(adapters))}"
        )
    places = divide([sum(p[0].numel() for p in adapter.parameters()) for adapter in adapters], fragments)
    return [[a for a, place in zip(adapters, places, strict=True) if place == f] for f in range(fragments)]


def consolidated_model(plan: Plan, opt: Optimizer | None = None) -> AbstractContextManager[None]:
    """A context in which the plan's model is what all ranks make together; in one process nothing is done."""
    return plan.synchroniser(opt).consolidated_model()


whole = consolidated_model  # its name before 0.2


def _total(weights: Sequence[float]) -> float:
    if not sum(weights):
        raise ValueError(
            "the ranks weigh by what they have done since the last synchronisation, and none has done anything: a loop "
            "of your own says how many tokens a step has learnt from, opt.synchroniser.progress.add_tokens(n), before "
            "opt.step(); and merges by lowrank.merge_(plan, opt)"
        )
    return sum(weights)
