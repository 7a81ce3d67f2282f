"""What a run takes on several ranks over a link: what one rank computes, measured here, and what it then sends."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from lowrank.plan.communication import Forecast, forecast
from lowrank.plan.network import AVERAGE, Link, Outlook, Part
from lowrank.run.memory_estimate import any_batch
from lowrank.run.run import Call, Run
from lowrank.run.session import Session
from lowrank.run.task import to_device
from lowrank.run.validation import refuse_few


def outlook(session: Session, ranks: int, link: Link, compute: float) -> Outlook:
    """What ``link`` makes of a session's run on ``ranks`` ranks, where one rank computes ``compute`` seconds a step.

    Raises:
        ValueError: fewer than two ranks, or fewer heads or rows than ranks.
    """
    _check(session.run, ranks)
    run, method = session.run, session.plan.method
    found = forecast(session.plan, ranks, whole=run.max_grad_norm is not None and not run.per_layer)
    merging = found.merge_every is not None
    follows = 0 if merging and method.rest_every is not None else (method.rest_merges if merging else 1)
    parts = [
        _part("merge", found.merge_every or 1, found.merges, 1, found, link),
        _part("basis that heads share", found.basis_every, [found.basis], 0, found, link),
        _part(AVERAGE, found.rest_every, found.averages, follows, found, link),
        _part("gradients", 1, [found.gradients_between], 0, found, link),
        _part("gradients, refresh", found.refresh_every, [found.gradients - found.gradients_between], 0, found, link),
    ]
    return Outlook(
        link=link,
        ranks=ranks,
        compute=compute,
        parts=[part for part in parts if part.sent],
        interval="merge_every" if merging else "rest_every" if found.average else None,
        most=found.most,
        ddp_bytes=found.ddp,
        ddp_communication=link.seconds(found.ddp, ranks),
    )


def rank_of(run: Run, ranks: int) -> Run:
    """The run of one process that does what the busiest of ``ranks`` ranks does: its rows and its heads.

    Raises:
        ValueError: as ``outlook``.
    """
    _check(run, ranks)
    args = dict(run.method.args)
    if run.split_heads is not None:
        args["heads"] = math.ceil(run.split_heads / ranks)
    return replace(run, batch_size=math.ceil(run.batch_size / ranks), method=Call(name=run.method.name, args=args))


def measured(session: Session, steps: int = 3) -> float:
    """Seconds of a step of a session here, on any data of its shape: the median, after one to warm up."""
    run, task, device = session.run, session.task, session.device
    batch = to_device(any_batch(session), device)
    optimizer = session.plan.optimizer(run.lr, run.weight_decay, per_layer=run.per_layer, accumulate=run.grad_accum)
    session.model.train()
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        for _ in range(run.grad_accum):
            with session.autocast():
                loss = task.loss(session.model, batch) / task.count(batch) / run.grad_accum
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[steps // 2]


def _part(what: str, every: int, sent: Sequence[int], scales: int, found: Forecast, link: Link) -> Part:
    """``sent``: of each fragment, which travel one after the other."""
    seconds = sum(link.seconds(each, found.ranks) for each in sent)
    what += f", {len(sent)} fragments" if len(sent) > 1 else ""
    return Part(what=what, every=every, sent=sum(sent), seconds=seconds, scales=scales)


def _check(run: Run, ranks: int) -> None:
    if ranks < 2:
        raise ValueError(f"--ranks {ranks}: at least 2 are needed for a link to matter")
    refuse_few(run, ranks)
