"""The data that a run can name: functions whose arguments are the run's ``--data.…`` options.

What each returns offers the same to the loop: ``train(...)`` is a source of batches, ``evaluation(...)`` the batches of
a split, each scored once. A batch is a pure function of (seed, n), so that a resumed run needs to know its step and
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

from lowrank.data.images.source import ImageData, images
from lowrank.data.text.corpora import StreamedText, TextData, stream, text

Data = TextData | StreamedText | ImageData
DATA: dict[str, Callable[..., Data]] = {"text": text, "stream": stream, "images": images}
