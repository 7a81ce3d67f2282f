"""What a reader of a report on images should see before its figures, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lowrank.evaluate.image_metrics import predicted

if TYPE_CHECKING:
    from lowrank.evaluate.image_report import Judged

NEARLY = 0.95


def findings(judged: Judged) -> list[str]:
    """Sentences about answers that tell the classes apart hardly or not at all; empty where there is nothing to say."""
    answers = predicted(judged.scores, judged.kind)
    if judged.kind == "multi-label":
        never = [name for i, name in enumerate(judged.classes) if judged.labels[:, i].any() and not answers[:, i].any()]
        return [f"The model finds {', '.join(map(repr, never))} in no image, though there are some."] if never else []
    counts = np.bincount(answers.astype(int), minlength=len(judged.classes))
    top, n = int(counts.argmax()), len(answers)
    share, truth = counts[top] / n, float((judged.labels == top).mean())
    name = judged.classes[top]
    if share == 1 and truth < 1:
        return [
            f"The model calls every image {name!r}: its answers do not tell the classes apart, and its accuracy, "
            f"{truth:.0%}, is the share of {name!r}."
        ]
    if share > NEARLY and truth < NEARLY:
        return [f"The model calls {share:.0%} of the images {name!r}, of which there are {truth:.0%}."]
    return []
