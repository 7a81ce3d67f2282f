"""What a rank has done since it last met the others: the weight of its share in a merge or an average
(``Merge(weigh=...)``).

    tokens     as many as the loop has said (``saw``)
    steps      optimizer steps
    seconds    from the end of one meeting to the start of the next, evaluation included
"""

from __future__ import annotations

import time
from typing import Literal

What = Literal["merge", "average"]


class Work:
    """The counts of one rank; ``kind`` is what they count, and ``equal`` counts nothing."""

    def __init__(self, kind: str = "equal"):
        self.kind = kind
        self.since: dict[What, float] = {"merge": 0.0, "average": 0.0}
        self._clock = time.perf_counter()

    def saw(self, tokens: int) -> None:
        """So many tokens (predictions) were learnt from."""
        if self.kind == "tokens":
            self._add(tokens)

    def stepped(self) -> None:
        """A step was made."""
        if self.kind == "steps":
            self._add(1)
        if self.kind == "seconds":
            now = time.perf_counter()
            self._add(now - self._clock)
            self._clock = now

    def met(self, *what: What) -> None:
        """Begin to count anew after a meeting, which is itself no work."""
        self._clock = time.perf_counter()
        self.since.update(dict.fromkeys(what, 0.0))

    def _add(self, amount: float) -> None:
        for what in self.since:
            self.since[what] += amount
