"""A run that has come to its end: its best checkpoint on the split that is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank.evaluate.evaluator import tallied
from lowrank.infra import checkpoint
from lowrank.run.session import Session, pick_checkpoint


def judge(session: Session, folder: Path, *, split: str = "test") -> tuple[dict[str, float], list[str]]:
    """(metrics of a run's best checkpoint on ``split``, what is worth saying of it); a report may lie in ``folder``.

    The session's model gets the checkpoint's weights. Empty where the data has no such split.
    """
    if not session.data.has(split):
        return {}, []
    session.model.load_state_dict(checkpoint.load(pick_checkpoint(folder, "best")).tensors)
    batches = session.data.evaluation(split, session.run.batch_size)
    tally: Any = tallied(session.model, batches, session.task, device=session.device, autocast=session.autocast)
    result: dict[str, float] = tally.result()
    return result, session.task.report(session.data, tally, folder, split)
