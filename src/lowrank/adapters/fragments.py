"""Fragments: what is merged in an interval, in groups that are sent at different steps of it.

Of F fragments and an interval of T steps, fragment f is due at the steps n with n mod T = ⌊(f + 1)·T/F⌋ mod T: each
every T steps, one after the other, the last where without fragments all would be sent. So as many bytes travel in all,
and at one step at most those of the largest fragment (Streaming DiLoCo, arXiv 2501.18512; its fragments are layers,
ours matrices, divided so that each fragment sends about as much). A rest that trains locally is averaged in the same
way, a fragment being a share of the rows of each parameter.
"""

from __future__ import annotations

from collections.abc import Sequence


def due(steps: int, every: int, fragments: int = 1) -> int | None:
    """The fragment that is due after ``steps`` completed steps, if any; ``fragments`` is at most ``every``.

    >>> [due(n, 4, 2) for n in range(9)]
    [None, None, 0, None, 1, None, 0, None, 1]
    """
    places = [(f + 1) * every // fragments % every for f in range(fragments)]
    return places.index(steps % every) if steps > 0 and steps % every in places else None


def divide(sizes: Sequence[int], fragments: int) -> list[int]:
    """Of things of these ``sizes`` the fragment of each: the largest first, each into the fragment with the least; the
    first fragment ends with the most.

    >>> divide([3, 1, 2, 3, 1, 1], 2)
    [0, 1, 0, 1, 1, 0]
    """
    filled, found = [0] * fragments, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[i] = filled.index(min(filled))
        filled[found[i]] += sizes[i]
    order = sorted(range(fragments), key=lambda f: -filled[f])
    return [order.index(f) for f in found]
