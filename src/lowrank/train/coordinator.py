"""What the loop asks about the ranks; in one process every answer is the plain one and costs nothing.

Three ways to divide the loss, by what the workers do with its gradients (a worker is a rank, or several in step):

    summed every step (some parameters are shared)   by the predictions of all ranks, which they tell each other
    heads alone, the rest frozen                     the same, estimated from this worker's rows: nothing is sent
    the rest trains locally                          by this worker's own: each is a run of its own between averages

So the logged loss and gradient norm are those of the whole batch in the first case, and this worker's own in the
others. Clipping uses that norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank.distributed.collectives import Traffic, largest_share
from lowrank.distributed.process_group import ProcessGroup, RanksDisagree
from lowrank.distributed.shards import is_sharded
from lowrank.infra.convert import as_option
from lowrank.infra.fingerprints import code_version, digest
from lowrank.infra.progress import short_bytes
from lowrank.infra.seeds import stable_seed
from lowrank.optim.optimizer import Optimizer
from lowrank.plan.communication import Forecast, forecast
from lowrank.plan.plan import Plan
from lowrank.run.overrides import identified
from lowrank.run.run import Run, flat
from lowrank.run.task import Batch, Task
from lowrank.train.checkpointing import check_state

T = TypeVar("T")


class Coordinator:
    """This process and those it trains with, if any."""

    def __init__(self, plan: Plan, optimizer: Optimizer, run: Run):
        self.plan, self.run = plan, run
        self.synchroniser = plan.synchroniser(optimizer)
        self.ranks: ProcessGroup | None = plan.ranks
        self.stepping = plan.ranks if plan.shared else plan.intra_worker  # who make every step together, if several do
        self.first = self.ranks is None or self.ranks.rank == 0
        self.place = () if self.ranks is None else (self.ranks.rank, self.ranks.count)
        self._reported = Traffic()
        self._times = 1.0  # the batch of this step has so many times the rows of this worker

    def check(self, optimizer: Optimizer, data: Any, *, needs_scaler: bool) -> None:
        """Refuse, before any work, what several ranks cannot do.

        Raises:
            ValueError: float16, batch statistics, heads whose optimizer state has no heads, ``data`` that ranks cannot
                each have their own of.
        """
        if self.ranks is None:
            return
        if needs_scaler:
            raise ValueError("float16 scales the loss of each rank by itself: use --precision bf16 with several ranks")
        _refuse_batch_statistics(self.plan.model)
        if self.run.own_data:
            _check_own_data(self.run, data)
        check_state(self.plan, optimizer)
        workers = self.plan.layout.workers_count
        heads = max((largest_share(a.all_heads, workers) for a in self.plan.adapters.values() if a.split), default=1)
        rows = self.run.batch_size // self.ranks.count
        if heads > rows and self.plan.intra_worker is not None:
            raise ValueError(
                f"each rank splits its {rows} rows of --batch-size {self.run.batch_size} between {heads} heads, and "
                f"some would never see anything: use --batch-size {heads * self.ranks.count} or more, fewer heads, "
                "or more --workers, which divide the heads (with --engine auto every rank is one)"
            )
        merge = self.plan.method.merge
        if merge is not None and merge.weigh == "steps":
            raise ValueError(
                "--method.weigh steps: in this loop all ranks make the same number of steps between merges; use tokens "
                "or seconds, or a loop of your own with merge='manual'"
            )
        every = self.plan.method.rest_every
        if self.plan.local and every is not None and self.run.steps is not None and every > self.run.steps:
            raise ValueError(
                f"--method.rest_every {every} is longer than the run, --steps {self.run.steps}: the rest would be "
                f"averaged only at its end; use at most {self.run.steps}"
            )

    def notes(self) -> list[str]:
        """What a reader should know before the first step; nothing in one process."""
        if self.ranks is None:
            asked = self.run.engine != "auto"
            alone = [f"one process: --engine {self.run.engine} has nothing to divide"] if asked else []
            return alone + (["in one process all data is its own: --own-data changes nothing"] * self.run.own_data)
        found = self.forecast(self.ranks)
        whole = self.run.engine == "fsdp" and self.plan.intra_worker is None
        why_not = ["every rank is a worker: --engine fsdp has nothing to shard, and each holds the whole model"] * whole
        ahead = f"a step sends {short_bytes(found.per_step)} on average"
        if self.plan.layout.is_mesh:
            ahead += f", of it {short_bytes(found.between_workers)} to other workers"
        ahead += f"; DDP would send {short_bytes(found.ddp)}"
        folds = any(
            row.rule is not None and row.rule.projects and row.name not in self.plan.shards for row in self.plan.rows
        )
        clipped = self.run.max_grad_norm is not None and folds
        why = "--max-grad-norm needs whole gradients: they travel as they are, not projected; with none they would be"
        return [*self.plan.notes, *why_not, ahead, *([why] if clipped else [])]

    def forecast(self, ranks: ProcessGroup) -> Forecast:
        """What a rank of this run will send."""
        whole = self.run.max_grad_norm is not None and not self.run.per_layer
        return forecast(self.plan, ranks.count, whole=whole, micro_batches=self.run.grad_accum)

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        if self.ranks is not None:
            self.ranks.total(0.0)

    def gathered(self, value: T) -> list[T]:
        """The value of every rank, in the order of the ranks."""
        return [value] if self.ranks is None else self.ranks.gather_objects(value)

    @property
    def weighs(self) -> bool:
        """Whether ranks weigh by what they have done, which a checkpoint then holds."""
        return self.synchroniser.progress.kind != "equal"

    @property
    def sharing(self) -> ProcessGroup | None:
        """The ranks that read the same data as this one, itself included: all, or under ``--own-data`` those of its
        worker, where there are several workers of several ranks; None where it reads alone."""
        if not self.run.own_data:
            return self.ranks
        return self.plan.intra_worker if self.plan.layout.is_mesh else None

    @property
    def together(self) -> bool:
        """Whether every step is one step of all ranks."""
        return self.ranks is not None and self.stepping is self.ranks

    def agree(self, version: str, step: int, data: Any) -> None:
        """Refuse ranks that differ in weights, settings, code or step; then give each its own stream of dropout. Under
        ``--own-data`` the sources may differ, but not what numbers stand for text."""
        if self.ranks is None:
            return
        own = {id(p) for p in self.plan.own}
        model = self.plan.model
        named = [*model.named_parameters(), *model.named_buffers()]
        same = {n: t for n, t in named if id(t) not in own and ".adapters." not in n and not is_sharded(t)}
        facts = {"code": code_version(version), "step": step, "weights": digest(same), **_settings(self.run)}
        if self.run.own_data:
            source = facts.pop("--data.source", None)
            facts["tokenizer"] = data.tokenizer.fingerprint
            if self.sharing is not None:
                self._agree_within_workers(self.ranks, source)
        self.ranks.agree(facts)
        torch.manual_seed(stable_seed(self.run.seed, "rank", self.ranks.rank, step))

    def begin(self) -> None:
        """From here on bytes and work are counted: what has been prepared, and waited for, until now is neither."""
        if self.ranks is not None:
            self._reported = Traffic(**vars(self.ranks.traffic))
            self.synchroniser.progress.reset()

    def _agree_within_workers(self, ranks: ProcessGroup, source: object) -> None:
        first: dict[int, object] = {}
        for rank, (worker, theirs) in enumerate(ranks.gather_objects((self.plan.layout.worker, source))):
            if first.setdefault(worker, theirs) != theirs:
                raise RanksDisagree(
                    f"rank {rank} has --data {theirs}, its worker's first rank {first[worker]}: under --own-data the "
                    "ranks of one worker, which compute every batch together, read the same"
                )

    def whole_rows(self, batches: Sequence[Batch]) -> float:
        """How many times the rows of this rank the whole batch has."""
        own = sum(len(batch["labels"]) for batch in batches)
        return self.run.batch_size * len(batches) / own if self.ranks is not None else 1.0

    def divisor(self, batches: Sequence[Batch], task: Task) -> float:
        """What this rank divides the sum of its losses by."""
        own, rows = sum(task.count(batch) for batch in batches), sum(len(batch["labels"]) for batch in batches)
        self.synchroniser.progress.add_tokens(own)
        if self.ranks is None:
            return max(1, own)
        count, rows = (own, rows) if self.stepping is None else map(round, self.stepping.total(own, rows))
        self._times = 1.0 if self.together or self.plan.local else self.run.batch_size * len(batches) / rows
        return max(1, count * self._times)

    def norm(self, optimizer: Optimizer, gradients: Mapping[nn.Parameter, Tensor]) -> Tensor | None:
        """The norm of all gradients, of all ranks that step together; None where only projections are known.

        Squares are added up over those who hold different numbers: parts over the ranks of a worker, and where all
        ranks step together, what each worker trains apart over the workers.
        """
        if optimizer.holds_projections:
            return None
        apart = {*self.plan.own, *self.plan.local} if self.together else set()
        if not (apart or self.plan.shards):
            return torch.nn.utils.get_total_norm(list(gradients.values()))

        def square(*, sharded: bool, own: bool) -> float:
            some = [g for p, g in gradients.items() if is_sharded(p) == sharded and (p in apart) == own]
            return float(torch.nn.utils.get_total_norm(some)) ** 2

        parts, own_parts = square(sharded=True, own=False), square(sharded=True, own=True)
        if self.plan.intra_worker is not None:
            parts, own_parts = self.plan.intra_worker.total(parts, own_parts)
        own = square(sharded=False, own=True) + own_parts
        if apart and self.plan.workers is not None:
            own = self.plan.workers.total(own)[0]
        norm = (square(sharded=False, own=False) + parts + own) ** 0.5
        return torch.tensor(norm, device=None if self.ranks is None else self.ranks.device)

    def after_step(self, record: Mapping[str, Any], stop: bool, steps: int) -> tuple[Tensor, bool]:
        """(the loss to log, whether to stop): agreed between the ranks wherever they communicate anyway."""
        loss: Tensor = record["loss"]
        if self.ranks is None:
            return loss, stop
        if self.together:
            total, wishes = self.ranks.total(float(loss), float(stop))
            return torch.tensor(total), wishes > 0
        if self.stepping is not None:
            loss = torch.tensor(self.stepping.total(float(loss))[0])
        return loss * self._times, self.synchroniser.communicates_at(steps) and self.ranks.total(float(stop))[0] > 0

    @property
    def sent(self) -> str:
        """What this rank has sent, for people; empty in one process."""
        if self.ranks is None:
            return ""
        traffic = self.ranks.traffic
        between = f", {short_bytes(traffic.between)} of it between workers" if self.plan.layout.is_mesh else ""
        return f"{short_bytes(traffic.sent)}{between}"

    def traffic(self) -> dict[str, int]:
        """Bytes sent and received since the last call, and of those sent what went to other workers, where workers have
        several ranks; empty in one process."""
        if self.ranks is None:
            return {}
        now, before = self.ranks.traffic, self._reported
        self._reported = Traffic(**vars(now))
        found = {"bytes_sent": now.sent - before.sent, "bytes_received": now.received - before.received}
        return found | ({"bytes_sent_between": now.between - before.between} if self.plan.layout.is_mesh else {})

    def summary(self, records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """For the run's summary: ranks, bytes that one sent in the logged steps, DDP's, how often one was left out."""
        if self.ranks is None:
            return {}
        sent = sum(record.get("bytes_sent", 0) for record in records)
        between = sum(record.get("bytes_sent_between", 0) for record in records)
        numbers = [record["step"] for record in records]  # another node's log may hold the ones before
        steps = numbers[-1] - numbers[0] + min(self.run.log_every, numbers[0]) if numbers else 1
        return {
            "ranks": self.ranks.count,
            "workers": self.plan.layout.workers_count,
            "bytes_sent": sent,
            "bytes_sent_per_step": sent // steps,
            **({"bytes_sent_between_per_step": between // steps} if self.plan.layout.is_mesh else {}),
            "ddp_bytes_per_step": self.forecast(self.ranks).ddp,
            "ranks_left_out": len(self.synchroniser.left_out),
        }


def _settings(run: Run) -> dict[str, object]:
    """Every setting as it is typed; where a rank computes, and where a file of one's own lies, is its own business."""
    settings = flat(identified(run).to_json())
    return {as_option(name): settings[name] for name in settings.keys() - {"device"}}


def _check_own_data(run: Run, data: Any) -> None:
    if not hasattr(data, "tokenizer"):  # by which ranks know that they speak of the same
        raise ValueError("--own-data is for text: leave it out, or put the images in one folder that every rank reads")
    for option, value, remedy in (("--steps", run.steps, "--steps N"), ("--eval-every", run.eval_every, "a number")):
        if value is None:
            raise ValueError(
                f"--own-data: an epoch is not the same on every rank, so {option} must be given in steps: use {remedy}"
            )


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose statistics would differ between ranks: use a model with "
                "another normalisation, or one process"
            )
