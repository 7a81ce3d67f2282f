"""The final test of a run on images: its best checkpoint on the test split, once, and the report beside the run."""

from __future__ import annotations

from pathlib import Path

from lowrank.data.images.source import ImageData
from lowrank.evaluate.evaluator import tallied
from lowrank.evaluate.image_report import Judged, write_report
from lowrank.evaluate.image_task import ImageTally
from lowrank.infra import checkpoint
from lowrank.run.session import Session, pick_checkpoint


def judge(session: Session, folder: Path, *, split: str = "test") -> dict[str, float]:
    """Metrics of a run's best checkpoint on ``split``; the report is written to ``folder/clinic``.

    The session's model gets the checkpoint's weights. Empty where the data has no such split.
    """
    data = session.data
    assert isinstance(data, ImageData)
    if split not in data.set.splits or not len(data.set.splits[split]):
        return {}
    saved = checkpoint.load(pick_checkpoint(folder, "best"))
    session.model.load_state_dict(saved.tensors)
    return judge_model(session, folder / "clinic", split)


def judge_model(session: Session, report: Path, split: str) -> dict[str, float]:
    """Metrics of the session's model as it is, and its report in the folder ``report``."""
    data: ImageData = session.data
    part = data.split(split)
    batches = data.evaluation(split, session.run.batch_size)
    tally = tallied(session.model, batches, session.task, device=session.device, autocast=session.autocast)
    assert isinstance(tally, ImageTally)
    write_report(
        report,
        Judged(
            kind=data.kind,
            classes=data.classes,
            labels=tally.labels,
            scores=tally.scores,
            images=part.images,
            names=part.names,
            patients=part.patients,
        ),
    )
    return tally.result()
