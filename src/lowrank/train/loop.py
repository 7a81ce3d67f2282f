"""How we train: the one loop, from top to bottom.

    for step: learning rate → micro-batches (loss summed, divided by the step's predictions) → clip
              → step (merges when due) → log → evaluate on the merged weights → checkpoint

Started by ``torchrun``, several ranks run this same loop, each on its rows of every batch (``train.coordinator``). They
evaluate together, each some of the batches; the first rank of each node writes the run's folder (``train.folder``),
rank 0 prints. When one is asked to stop, all do, after the next step at which they communicate.

A step's loss is the mean over all its predictions, whatever micro-batches they came in. Steps are optimizer steps;
``run.steps`` is the schedule's horizon and ``run.stop_at`` ends early without changing it. Everything that the next
step depends on is in a checkpoint (weights, optimizer, random generators, step), and batches are a function of the
step, so a resumed run is bitwise the run that was never stopped, on a CPU.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank import __version__
from lowrank.distributed.process_group import ProcessGroup, joined
from lowrank.evaluate.evaluator import evaluate
from lowrank.infra import checkpoint
from lowrank.infra.files import finite, write_json
from lowrank.infra.log import Writer, open_writers, read_log
from lowrank.infra.progress import Progress
from lowrank.infra.step_clock import StepClock, peak_bytes, reset_peak
from lowrank.interop.adapter_start import start_from_adapter_
from lowrank.methods.schedule import Envelope
from lowrank.plan.synchronisation import consolidated_model
from lowrank.run.run import Run
from lowrank.run.session import Session, learnt_anew, learnt_by_run, open_session, pick_device
from lowrank.run.task import Batch, to_device
from lowrank.run.validation import refuse_occupied
from lowrank.train.changed_data import check_data
from lowrank.train.checkpointing import NotFinite, Saver, not_finite
from lowrank.train.coordinator import Coordinator
from lowrank.train.elastic import newest
from lowrank.train.folder import SUMMARY, describe, is_complete, is_writer, lock_folder, summarised
from lowrank.train.memory import RunMemory
from lowrank.train.prefetch import Prefetch
from lowrank.train.signals import asked_to_stop
from lowrank.train.spectra import Spectra

__all__ = ["NotFinite", "train"]


def train(
    run: Run,
    out: Path,
    *,
    resume: bool = False,
    elastic: bool = False,
    init_from: Path | None = None,
    init_adapter: Path | None = None,
    allow_changed_data: bool = False,
    beside: bool = False,
    judge: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train ``run`` into the folder ``out``, and return its summary (also ``out/summary.json``).

    Args:
        run: what to train.
        out: gets run.json, base.json, env.json, log.jsonl, checkpoints/ and summary.json.
        resume: go on from the latest checkpoint in ``out``; ``run`` is then the same run, perhaps with other ``steps``
            or ``stop_at``.
        elastic: go on from the newest good checkpoint that any node has of this run, or start it where there is none:
            the same call again and again, until the run has come to its end.
        init_from: start from the merged weights of another run's folder or checkpoint.
        init_adapter: start from the factors of an adapter's folder, ours or PEFT's, which are trained further.
        allow_changed_data: go on, although the data's content is not what the run was trained on, or differs between
            ranks.
        beside: a new run, too, is refused where its data is not the content whose fingerprint ``run`` has: that of
            others in one table.
        judge: score the best checkpoint on the test split at the end, where the task asks for it.
        quiet: no progress line.

    Raises:
        NotFinite: the loss is not finite. The checkpoints saved before are kept.
        FileExistsError: ``out`` holds a run already and neither ``resume`` nor ``elastic`` is asked for.
        CheckpointError: nothing to resume from, or the disk is full.
        ChangedDataError: the run, or those beside it, were trained on other data.
        RanksDisagree, RankLost: of several ranks one was started otherwise, or is gone.
    """
    if not (resume or elastic):
        refuse_occupied(out)
    with joined(pick_device(run.device)) as ranks:
        writer = is_writer(out, ranks)
        with lock_folder(out, ranks, writer=writer, new=not (resume or elastic)):
            how: dict[str, Any] = {"resume": resume, "elastic": elastic, "beside": beside}
            how |= {"allow_changed_data": allow_changed_data}
            starts: dict[str, Any] = {"init_from": init_from, "init_adapter": init_adapter}
            return _train(run, out, ranks, **how, **starts, writer=writer, judge=judge, quiet=quiet)


def _train(
    run: Run,
    out: Path,
    ranks: ProcessGroup | None,
    *,
    resume: bool,
    elastic: bool,
    init_from: Path | None,
    init_adapter: Path | None,
    allow_changed_data: bool,
    beside: bool,
    writer: bool,
    judge: bool,
    quiet: bool,
) -> dict[str, Any]:
    """``train`` among its ranks; nothing of the model outlives this call, and so the group of processes may end."""
    found, notes = newest(out, ranks, writer=writer) if elastic else (None, [])
    if resume:
        found = checkpoint.latest(out / "checkpoints")
    if found is not None:
        notes += checkpoint.passed_over(out / "checkpoints")
    saved = None if found is None else checkpoint.load(found)
    learnt = None if saved is None else learnt_by_run(run, out, saved)
    start = None if saved else init_from
    session = open_session(run, init_from=start, learnt=learnt, ranks=ranks, with_base=writer and saved is None)
    if saved is not None and learnt is None and (said := learnt_anew(session.data, out)):
        notes.append(f"note: {said}")
    if init_adapter is not None and saved is None:
        start_from_adapter_(session.plan, init_adapter)
    loop = _Loop(session, out, quiet=quiet, writer=writer, new=saved is None)
    if saved is not None:
        loop.restore(saved, ended=elastic)
    worker, now = session.plan.layout.worker, session.data.fingerprint
    notes += check_data(run, now, saved, ranks, worker=worker, allowed=allow_changed_data, beside=beside)
    loop.coordinator.agree(__version__, loop.step, session.data)
    if saved is not None:
        loop.saver.restore_random(saved)
        del saved  # which holds all that was read
    if writer:
        describe(session, out)
    loop.saver.prepare()
    loop.coordinator.begin()
    with loop.recording(notes, after=loop.step if resume or elastic else None), asked_to_stop() as stopping:
        loop.run_until(loop.end, stopping)
        if judge:
            loop.judge()
    interrupted = stopping.is_set() and loop.step < loop.end
    summary = loop.summary(interrupted=interrupted)
    if writer:
        loop.memory.write(out)
        loop.spectra.write(out)
        write_json(out / SUMMARY, summary)
    if stopping.is_set():
        loop.coordinator.wait()  # the launcher ends all ranks when the first leaves with an exit status
    return summary


class _Loop:
    """The state of a training run between two steps, and what moves it on."""

    def __init__(self, session: Session, out: Path, *, quiet: bool, writer: bool, new: bool):
        run = session.run
        self.writer = writer  # of the run's folder
        self.session, self.out = session, out
        self.scaler = torch.amp.GradScaler(session.device.type, enabled=session.needs_scaler)
        self.optimizer = session.plan.optimizer(
            run.lr,
            run.weight_decay,
            per_layer=run.per_layer,
            accumulate=run.grad_accum,
            clip_per_layer=run.clip_per_layer,
            scaler=self.scaler if run.per_layer else None,
        )
        self.coordinator = Coordinator(session.plan, self.optimizer, run)
        self.quiet = quiet or not self.coordinator.first
        self.source = session.data.train(run.batch_size, run.seed, *self.coordinator.place)
        self.steps = run.steps or run.horizon(self.source.batches_per_epoch)
        self.end = min(run.stop_at or self.steps, self.steps)
        self.eval_every = self._eval_every()
        self.batches = Prefetch(self.source.batch, end=self.end * run.grad_accum)
        if (merge := session.plan.method.merge) is not None:
            merge.check_steps(self.steps)
        self.envelope = Envelope(
            steps=self.steps, warmup=run.warmup_steps(self.steps), min_ratio=run.min_lr_ratio, shape=run.schedule
        )
        self.coordinator.check(self.optimizer, session.data, needs_scaler=session.needs_scaler)
        if self.coordinator.ranks is not None and not run.per_layer and not session.plan.shards:
            self.optimizer.sum_during_backward(run.grad_accum, whole=run.max_grad_norm is not None)
        self.forward: Any = torch.compile(session.model) if run.compile else session.model
        self.step = 0
        self.best: float | None = None
        self.latest_metrics: dict[str, float] = {}
        self.test_metrics: dict[str, float] = {}
        self.writers: list[Writer] = []
        self.progress = Progress(self.end, quiet=True)
        root = out / "checkpoints"
        parts = (run, session.plan, self.optimizer, self.scaler, self.coordinator, root)
        self.saver = Saver(*parts, writer=writer, data=session.data)
        self.clock = StepClock()
        self.memory = RunMemory(session, self.optimizer, alone=self.coordinator.ranks is None)
        self.spectra = Spectra(session, kept=new and writer and self.coordinator.ranks is None)

    def _eval_every(self) -> int:
        """Steps between evaluations; 0: never, as asked for or as there is nothing to evaluate on."""
        run = self.session.run
        if run.eval_every == "never" or not all(self.coordinator.gathered(self.session.data.has("val"))):
            return 0
        return run.eval_every or max(1, math.ceil(self.source.batches_per_epoch / run.grad_accum))

    def notes(self) -> list[str]:
        """What a reader should know before the first step."""
        missing = self.eval_every == 0 and self.session.run.eval_every != "never"
        why = "note: the data has no val split, so there is no evaluation and no best checkpoint, only the latest"
        return [*self.coordinator.notes(), *([f"{why} (--eval-every never says that it is meant)"] if missing else [])]

    # --- the loop ------------------------------------------------------------------------------------------------

    def run_until(self, end: int, stopping: threading.Event) -> None:
        """Step until ``end`` or until asked to stop; evaluated and saved at the end in either case."""
        self.session.model.train()
        reset_peak(self.session.device)
        self.clock = StepClock()
        stop = stopping.is_set() and not self.coordinator.ranks
        while self.step < end and not stop:
            with self.memory.watching(self.memory.kind_of_step(self.step)), self.spectra.noting():
                made = self._one_step()
            self.step += 1
            made["loss"], stop = self.coordinator.after_step(made, stopping.is_set(), self.step)
            self._log(made)
            if noted := self.spectra.noted():
                self._write({"step": self.step, **noted})
            last = self.step == end
            evaluating = self.eval_every > 0 and (last or self.step % self.eval_every == 0)
            saving = last or self.step % self.session.run.checkpoint_every == 0
            if evaluating or saving:
                with self.clock.paused(), consolidated_model(self.session.plan, self.optimizer):
                    improved = evaluating and self._evaluate()
                    if improved or saving:
                        self._save(best=improved)
        if self.saver.last != self.step and self.step:
            with consolidated_model(self.session.plan, self.optimizer):
                self._save(best=False)
        if stop:
            stopping.set()
            self.progress.note(f"stopped at step {self.step}, saved; go on with: lowrank train --resume {self.out}")

    def _one_step(self) -> dict[str, Any]:
        """Forward, backward and step; returns the record of it, the loss as a tensor."""
        run, optimizer, began = self.session.run, self.optimizer, time.perf_counter()
        lr = run.lr * self.envelope(self.step)
        factor = self.session.plan.method.lr(optimizer.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = [self.batches(self.step * run.grad_accum + k) for k in range(run.grad_accum)]
        waited = time.perf_counter() - began
        loss = self._backward(batches)
        grad_norm = self._clip()
        if run.per_layer or not self.scaler.is_enabled():
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.clock.tick(waited)
        return {
            "loss": loss,
            "lr": lr * factor,
            "grad_norm": grad_norm,
            "size": sum(self.session.task.size(batch) for batch in batches) * self.coordinator.whole_rows(batches),
        }

    def _backward(self, batches: list[Batch]) -> Tensor:
        """Gradients of the mean loss over the predictions of all micro-batches; returns that mean."""
        task, device = self.session.task, self.session.device
        predictions = self.coordinator.divisor(batches, task)
        total = torch.zeros((), device=device)
        for batch in batches:
            with self.session.autocast():
                loss = task.loss(self.forward, to_device(batch, device)) / predictions
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _clip(self) -> Tensor | None:
        """Clip the global norm where asked, and return it; None with per-layer updates, where it is never known."""
        run = self.session.run
        if run.per_layer:
            return None
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        self.optimizer.synchronise_(whole=run.max_grad_norm is not None)
        gradients = self.optimizer.gradients()
        norm = self.coordinator.norm(self.optimizer, gradients)
        if run.max_grad_norm is not None and norm is not None:
            torch._foreach_mul_(list(gradients.values()), (run.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    # --- log, evaluation, checkpoints ----------------------------------------------------------------------------

    @contextmanager
    def recording(self, notes: Sequence[str] = (), *, after: int | None) -> Iterator[None]:
        """Open log, writers and progress line, which begins with ``notes``; close them whatever happens."""
        run, first = self.session.run, self.coordinator.first
        if self.writer:
            others = {"tensorboard": run.tensorboard and first, "wandb": run.wandb and first}
            self.writers = open_writers(self.out, run.to_json(), **others, after=after)
        unit = self.session.task.unit
        self.progress = Progress(self.end, start=self.step, quiet=self.quiet, unit=unit)
        for note in [*self.memory.notes(), *self.session.data.notes, *self.notes(), *notes]:
            self.progress.note(note)
        try:
            yield
        finally:
            self.batches.close()
            self.progress.close()
            for writer in self.writers:
                writer.close()

    def _log(self, made: dict[str, Any]) -> None:
        run = self.session.run
        if self.step % run.log_every and self.step != self.end:
            return
        loss = float(made["loss"])  # waits for the device: the clock then shows whole steps
        seconds, waited = self.clock.read()
        # a rank that steps alone is left out of the next merge, and begins anew
        if not math.isfinite(loss) and (self.coordinator.ranks is None or self.coordinator.together):
            self._write({"step": self.step, "loss": loss})
            raise not_finite(f"the loss became {loss}", self.step, self.saver.root)
        rate, peak = made["size"] / seconds, peak_bytes(self.session.device)
        record = {
            "step": self.step,
            "loss": loss,
            "lr": made["lr"],
            "grad_norm": None if made["grad_norm"] is None else float(made["grad_norm"]),
            f"{self.session.task.unit}_per_second": rate,
            "step_seconds": seconds,
            "wait_seconds": waited,
            "peak_bytes": peak,
            **self.coordinator.traffic(),
        }
        self._write({name: value for name, value in record.items() if value is not None})
        extra = "" if self.coordinator.ranks is None else f"sent {self.coordinator.sent}"
        self.progress.update(self.step, loss=loss, rate=rate, peak_bytes=peak, extra=extra)

    def _records(self) -> list[dict[str, Any]]:
        path = self.out / "log.jsonl"
        return read_log(path) if self.writer and path.is_file() else []

    def _write(self, record: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.write(record)

    def _evaluate(self) -> bool:
        """Evaluate on the validation split; whether it is the best so far."""
        session = self.session
        batches = session.data.evaluation("val", session.run.batch_size, session.run.eval_batches)
        where: dict[str, Any] = {"ranks": self.coordinator.ranks, "sharing": self.coordinator.sharing}
        where |= {"device": session.device, "autocast": session.autocast}
        with self.memory.watching("evaluation"):
            metrics = evaluate(session.model, batches, session.task, **where)
        self.latest_metrics = {f"val_{name}": value for name, value in metrics.items()}
        self._write({"step": self.step, **self.latest_metrics})
        if shown := [f"val {name} {metrics[name]:.4f}" for name in session.task.shown]:
            self.progress.note("  ".join([self._place(), *shown]))
        value = metrics[session.task.metric]
        better = self.best is None or (value < self.best if session.task.lower else value > self.best)
        if better and math.isfinite(value):
            self.best = value
            return True
        return False

    def _place(self) -> str:
        """How far the run has come: the step, and the epoch where the length of the data is known."""
        try:
            epoch = self.step * self.session.run.grad_accum / self.source.batches_per_epoch
        except ValueError:  # a stream
            return f"step {self.step}"
        return f"epoch {epoch:.3g}  step {self.step}"

    def judge(self) -> None:
        """Where the task asks for it: the best checkpoint on the test split, when the run has come to its end."""
        task = self.session.task
        if not task.judged or self.step < self.end:
            return
        from lowrank.evaluate.judge import judge

        with consolidated_model(self.session.plan, self.optimizer):
            if not self.coordinator.first:
                return
            session = self.session
            if session.plan.shards:  # the others do not score, so rank 0 takes a whole model
                session = open_session(session.run, data=session.data)
            metrics, said = judge(session, self.out)
        self.test_metrics = {f"test_{name}": value for name, value in metrics.items()}
        record = {"step": self.step, **self.test_metrics}
        if metrics and finite(record) not in self._records():  # a killed run that is finished may have it already
            self._write(record)
            shown = "  ".join(f"test {name} {metrics[name]:.4f}" for name in task.shown)
            self.progress.note(f"best checkpoint  {shown}")
            for sentence in said:
                self.progress.note(sentence)

    def _save(self, *, best: bool) -> None:
        self.saver.save(self.step, self.latest_metrics, self.best, is_best=best)

    def restore(self, saved: checkpoint.Checkpoint, *, ended: bool = False) -> None:
        """Go back to a checkpoint: weights, optimizer, step. To a run's end only where ``ended``, or where its report
        or summary has not been written.

        Raises:
            ValueError: it is of another method or step count, or its state does not fit.
        """
        complete = any(self.coordinator.gathered(is_complete(self.out, self.end)))
        if saved.step > self.end or (saved.step == self.end and complete and not ended):
            raise ValueError(
                f"the run has already reached step {saved.step} of {self.end}; give a larger --steps (or --stop-at) to "
                "go on"
            )
        self.saver.restore(saved)
        self.best, self.latest_metrics = saved.meta["best"], saved.meta["metrics"]
        self.step = saved.step

    def summary(self, *, interrupted: bool) -> dict[str, Any]:
        """What the run came to: the last metrics, the best, and what it cost."""
        records = [r for r in self._records() if "step_seconds" in r]
        metrics = {**self.latest_metrics, **self.test_metrics, f"best_val_{self.session.task.metric}": self.best}
        found = {"steps": self.step, "interrupted": interrupted, **metrics}
        return summarised(self.session, found, records) | self.coordinator.summary(records)
