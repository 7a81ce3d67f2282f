"""What a link between the ranks makes of a run: seconds and bytes a step, and from which interval on it hardly matters.

A step takes what a rank computes and then what it sends; merges with ``overlap``, which travel while training goes on,
are counted as if it waited for them, and so are sums of gradients, which travel during the backward pass:

    communication    bytes / bandwidth + messages · latency, in seconds
    bytes            those of ``lowrank.traffic``: what a ring sends per rank, in full duplex
    messages         a ring of R ranks passes on 2(R − 1) of them one after the other, for each bucket of a sum, and
                     as many for each of two words of control (are all numbers finite, is one to stop)

DDP is given every benefit: it sends while it computes backwards, so its step lies between the longer of the two (all
hidden) and their sum (nothing hidden); the former is what we compare with. Computing is taken to cost both the same.
``python -m benchmarks.link`` compares these figures with two processes on a throttled link.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank.distributed.collectives import BUCKET_BYTES
from lowrank.infra.convert import nearest
from lowrank.infra.progress import short_bytes, short_count

LITTLE = 0.05  # of a step: communication below this hardly matters
AVERAGE = "average of the rest"
CONTROL_WORDS = 2
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-?[0-9]+)?"
_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


@dataclass(frozen=True, kw_only=True)
class Link:
    """Each rank's own connection: bytes per second in either direction, and seconds until a message has arrived."""

    bandwidth: float
    latency: float = 0.0

    def seconds(self, sent: int, ranks: int) -> float:
        """Until every one of ``ranks`` has sent so many bytes round a ring and passed on everybody's; 0 of nothing."""
        if not sent:
            return 0.0
        buckets = math.ceil(sent / (2 * BUCKET_BYTES * (ranks - 1) / ranks))
        return sent / self.bandwidth + 2 * (ranks - 1) * (buckets + CONTROL_WORDS) * self.latency

    def __str__(self) -> str:
        late = f", {self.latency * 1e3:g} ms a message" if self.latency else ""
        return f"{short_count(self.bandwidth * 8)}bit/s{late}"


def parse_link(text: str, latency: str = "0") -> Link:
    """A link as it is written: ``100Mbit``, ``1Gbit/s``, ``2.5Gbps``, ``10GB/s``; decimal, b and bit are bits, B bytes.

    Raises:
        ValueError: no number, no unit, or one that is not known; the message names those that are.

    >>> parse_link("100Mbit", "1ms").bandwidth, parse_link("10GB/s").bandwidth
    (12500000.0, 10000000000.0)
    """
    found = re.fullmatch(rf"({_NUMBER})\s*([kmgt]?)(bits?|b)(?:/s|ps)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError(f"--link {text}: expected a speed above 0 with its unit, such as 100Mbit, 1Gbit or 10GB/s")
    bandwidth = float(found[1]) * _PREFIX[found[2].lower()] / (1.0 if found[3] == "B" else 8.0)
    return Link(bandwidth=bandwidth, latency=parse_seconds(latency, "--latency"))


def parse_seconds(text: str, name: str) -> float:
    """Seconds of ``0.2``, ``0.2s``, ``1ms`` or ``50us``.

    Raises:
        ValueError: anything else, negative numbers included.
    """
    found = re.fullmatch(rf"({_NUMBER})\s*([^0-9.\s]*)", text.strip())
    unit = found[2] or "s" if found else "s"
    if found is None or unit not in _SECONDS:
        raise ValueError(f"{name} {text}: expected a time such as 1ms, 50us or 0.2s{nearest(unit, _SECONDS)}")
    return float(found[1]) * _SECONDS[unit]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is sent every so many steps: bytes and seconds of one time. ``scales``: the factor by which its interval
    follows ``merge_every`` (1 where it is the only interval), else 0."""

    what: str
    every: int
    sent: int
    seconds: float
    scales: int = 0


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A run over a link: seconds of one rank's ``compute`` a step, the parts of what it sends, the ``most`` bytes that
    merges and averages send at one step, and DDP's."""

    link: Link
    ranks: int
    compute: float
    parts: Sequence[Part]
    interval: str | None
    most: int
    ddp_bytes: int
    ddp_communication: float

    @property
    def bytes_a_step(self) -> float:
        return sum(part.sent / part.every for part in self.parts)

    @property
    def communication(self) -> float:
        """Seconds of communication a step, in the mean."""
        return sum(part.seconds / part.every for part in self.parts)

    @property
    def step(self) -> float:
        return self.compute + self.communication

    @property
    def ddp_step(self) -> float:
        """DDP's step at best: all that can be hidden behind computing is."""
        return max(self.compute, self.ddp_communication)

    def enough(self, little: float = LITTLE) -> int | None:
        """The least interval at which communication is at most the share ``little`` of a step; None where none is."""
        budget = self.compute * little / (1 - little)
        fixed = sum(part.seconds / part.every for part in self.parts if not part.scales)
        moving = sum(part.seconds / part.scales for part in self.parts if part.scales)
        if not moving or fixed >= budget:
            return None
        return max(1, math.ceil(moving / (budget - fixed)))


def table(found: Outlook, source: str) -> str:
    """An outlook for people; ``source`` names where its compute is from."""
    rows = [("", "every", "bytes a step", "seconds a step")]
    rows += [("compute", "1", "", f"{found.compute:.3g}")]
    rows += [
        (part.what, str(part.every), short_bytes(round(part.sent / part.every)), f"{part.seconds / part.every:.3g}")
        for part in found.parts
    ]
    rows += [
        ("a step", "", short_bytes(round(found.bytes_a_step)), f"{found.step:.3g}"),
        ("a step of DDP, at best", "", short_bytes(found.ddp_bytes), f"{found.ddp_step:.3g}"),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    text = ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]) for row in rows]
    head = f"{found.ranks} ranks over {found.link}; compute {source}"
    return "\n".join([head, "", *text, "", *_verdict(found)])


def _verdict(found: Outlook) -> list[str]:
    faster, bare = found.ddp_step / found.step, found.compute + found.ddp_communication
    lines = [
        f"communication takes {found.communication / found.step:.1%} of a step; {faster:.3g} times as fast as DDP at "
        f"best (which takes {bare:.3g} s where nothing is hidden)"
    ]
    if not found.parts:
        return [*lines, "nothing is sent at all"]
    if found.most:
        lines.append(f"merges and averages send at most {short_bytes(found.most)} at one step")
    if found.interval is None:
        return [
            *lines,
            "it communicates at every step, which no interval changes: lte, lte_galore, diloco and rest=local have one",
        ]
    enough = found.enough()
    if enough is not None:
        follows = [p.scales for p in found.parts if p.scales and p.what.startswith(AVERAGE)]
        rest = f", the rest averaged every {follows[0] * enough}" if follows and found.interval == "merge_every" else ""
        return [*lines, f"communication is at most {LITTLE:.0%} of a step from {found.interval}={enough} on{rest}"]
    fixed = " and ".join(part.what for part in found.parts if not part.scales)
    return [
        *lines,
        f"no {found.interval} makes it {LITTLE:.0%}, as {fixed} would remain: raise --method.rest_every, or use "
        "--method.rest local or freeze",
    ]
