"""What of a training run is saved, by which rank, and how a run goes back to it.

Everything that the next step depends on: weights, the optimizer's state, random generators, the step. What is saved is
what one process with all heads would have saved (``gathered``), so that any number of ranks can go on from it; a model
that is held in parts is saved in parts where it can be (``gathered_parts``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowrank.distributed.sharded_checkpoint import save_in_parts
from lowrank.distributed.shards import to_local
from lowrank.infra import checkpoint
from lowrank.infra.checkpoint_tensors import random_state, set_random_state_
from lowrank.optim.optimizer import Optimizer
from lowrank.plan.plan import Plan
from lowrank.run.run import Run
from lowrank.train.coordinator import Team
from lowrank.train.elastic import keeping
from lowrank.train.gathered import load_model_, own_optimizer_state, whole_optimizer_state
from lowrank.train.gathered_parts import Keeping, whole_model_state


class NotFinite(FloatingPointError):
    """The loss or a weight became NaN or infinite; the message names the last good checkpoint."""


def not_finite(what: str, step: int, root: Path) -> NotFinite:
    """The error for it, with what there is to go back to among the checkpoints in ``root``."""
    kept = checkpoint.saved(root)
    where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been saved yet"
    return NotFinite(
        f"{what} at step {step}; {where}. Lower --lr, lengthen --warmup or clip (--max-grad-norm 1.0), then start "
        "again or resume"
    )


class Saver:
    """Writes the checkpoints of a run into ``root``, and puts the run back where one of them was; all ranks have one.

    ``keeper``: whether this rank writes. ``last``: the step that was last saved.
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        team: Team,
        root: Path,
        *,
        keeper: bool,
    ):
        self.run, self.plan, self.optimizer, self.scaler, self.team = run, plan, optimizer, scaler, team
        self.root, self.keeper, self.last = root, keeper, -1
        self.keeping: Keeping = "whole" if keeper else "help"

    def prepare(self) -> None:
        """Find out, when the run's folder may be made, what each rank is to keep; every rank must call it."""
        self.keeping = keeping(self.root.parent, self.plan, keeper=self.keeper)

    def save(self, step: int, metrics: dict[str, float], best: float | None, *, is_best: bool) -> None:
        """Save the run after ``step`` steps, inside ``consolidated_model``; once a step.

        Raises:
            NotFinite: a weight is not finite: the checkpoints of before are what one can go back to.
            CheckpointError: it could not be written.
        """
        if self.last == step:
            return
        self._check_weights(step)
        self.last = step
        model = whole_model_state(self.plan, self.keeping)
        optimizer = whole_optimizer_state(self.plan, self.optimizer, self.keeping)
        random = self.team.everyones(random_state())
        work = self.team.everyones(dict(self.plan.work.since)) if self.team.weighs else []
        if self.keeping in ("help", "nothing"):
            return
        meta = {
            "random": random[0],
            "random_of_ranks": random[1:],
            "work_of_ranks": work,
            "scaler": self.scaler.state_dict(),
            "best": best,
            "metrics": metrics,
            "method": self.run.method.to_json(),
        }
        what = (self.root, step, model, optimizer, meta)
        options: dict[str, Any] = {"keep": self.run.keep, "best": is_best}
        if self.keeping == "parts" and self.plan.intra_worker is not None:
            save_in_parts(*what, ranks=self.plan.intra_worker, writes=self.keeper, **options)
        else:
            checkpoint.save(*what, **options)

    def _check_weights(self, step: int) -> None:
        named = self.plan.model.named_parameters()
        bad = next((name for name, p in named if not bool(to_local(p).isfinite().all())), None)
        if self.plan.shards:  # what is not finite may be in another rank's part
            bad = next((name for name in self.team.everyones(bad) if name is not None), None)
        if bad is not None:
            raise not_finite(f"{bad} became NaN or infinite", step, self.root)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Weights, optimizer and scaler as they were.

        Raises:
            ValueError: the checkpoint is of another method, or its state does not fit.
        """
        method = self.run.method.to_json()
        if saved.meta["method"] != method:
            raise ValueError(
                f"the run was trained with {saved.meta['method']}, not with {method}; resume it with its own method, "
                "or start a new run from its weights with --init-from"
            )
        load_model_(self.plan, saved)
        self.plan.anchor_rest_()
        self.optimizer.load_state_dict(own_optimizer_state(self.plan, self.optimizer, saved))
        self.scaler.load_state_dict(saved.meta["scaler"])
        self.last = saved.step

    def restore_random(self, saved: checkpoint.Checkpoint) -> None:
        """Put the random generators back, where the run was saved by as many ranks; drop later checkpoints."""
        states = [saved.meta["random"], *saved.meta.get("random_of_ranks", [])]
        rank, ranks = self.team.place or (0, 1)
        if len(states) == ranks:
            set_random_state_(states[rank])
            self.plan.work.since.update((saved.meta.get("work_of_ranks") or [{}] * ranks)[rank])
        if self.keeper:
            checkpoint.discard_after(self.root, saved.step)
