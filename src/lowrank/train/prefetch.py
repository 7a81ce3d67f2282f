"""The next batches are made while the model works: one thread, a few batches ahead.

Batches are a function of their number, so that being ahead changes nothing but the time of waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
AHEAD = 2


class Prefetch(Generic[T]):
    """``self(n)`` is ``make(n)``; meanwhile those after it are made, up to ``end``, at most two of them.

    What goes wrong in making one is raised where it is asked for.

    >>> squares = Prefetch(lambda n: n * n, end=5)
    >>> [squares(n) for n in range(5)]
    [0, 1, 4, 9, 16]
    >>> squares.close()
    """

    def __init__(self, make: Callable[[int], T], *, end: int):
        self.make, self.end = make, end
        self._made: dict[int, Future[T]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    def __call__(self, n: int) -> T:
        for old in [k for k in self._made if k < n]:
            self._made.pop(old).cancel()
        for k in range(n, max(n + 1, min(n + 1 + AHEAD, self.end))):
            if k not in self._made:
                self._made[k] = self._thread.submit(self.make, k)
        return self._made.pop(n).result()

    def close(self) -> None:
        """Stop making batches; to be called at the end, whatever happened."""
        self._thread.shutdown(wait=True, cancel_futures=True)
