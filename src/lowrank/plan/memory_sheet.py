"""The ledger as a table: the answer first, then where the bytes are.

    torch       what torch holds at its peak, traced (``plan.trace``): exact on a CPU, kernels' scratch space apart
    rounding    CUDA's allocator gives whole blocks of 512 bytes
    context     what a CUDA process holds beside its tensors: assumed, since it differs by driver and card

Sizes are binary (1 GiB = 1024³ bytes). A card that is sold as 24 GB holds 24 GiB.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowrank.plan.live_bytes import KINDS, STATIC, Counts, Peak, Place
from lowrank.plan.speed import Rhythm

CARDS = (8, 12, 16, 24, 40, 80)
CUDA_CONTEXT = 512 << 20
STARTING = "start"
_UNITS = {"GB": 10**9, "GIB": 1 << 30, "MB": 10**6, "MIB": 1 << 20, "": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What a run takes in memory.

    Attributes:
        title: what is trained, and how.
        counts: the peaks of each place.
        static: bytes by kind of what is held from the first step to the last.
        parameters: all of them.
        trained: how many train.
        blocks: how many like blocks the model has; 0 where none were found.
        on_card: whether rounding and context of a GPU are added.
        per_block: bytes that a block saves for the backward pass, and of its input, which it keeps when checkpointed.
        layers: the table of every parameter, who trains it and why.
        notes: what a reader should know.
        rhythm: how often refreshes and merges are, where that is known.
        size: tokens or images of a micro-batch, over all ranks.
        measured: the peaks that were found when it ran, by kind of step; None where it has not.
    """

    title: str
    counts: Counts
    static: Mapping[str, int]
    parameters: int
    trained: int
    blocks: int = 0
    on_card: bool = True
    per_block: tuple[int, int] | None = None
    layers: str = ""
    notes: Sequence[str] = ()
    rhythm: Rhythm | None = None
    size: int = 0
    measured: Mapping[str, int] | None = None

    @property
    def place(self) -> Place:
        """Where the peak is: (kind of step, where in it). On a CPU the model's making counts as well."""
        peaks = self.counts.peaks
        return max((p for p in peaks if not (self.on_card and p[0] == STARTING)), key=lambda p: peaks[p].total)

    @property
    def peak(self) -> Peak:
        return self.counts.peaks[self.place]

    @property
    def total(self) -> int:
        """The peak with what a GPU's allocator and context add, where it is for one."""
        return self.peak.total + (self.peak.rounding + CUDA_CONTEXT if self.on_card else 0)

    @property
    def bytes_per_parameter(self) -> float:
        """Weights, gradients and state for each parameter of the model, at the optimizer's step."""
        held = [p for (_, where), p in self.counts.peaks.items() if where == "the optimizer's step"]
        gradients = max((p.parts.get("gradients", 0) for p in held), default=0)
        return (sum(self.static.values()) + gradients) / max(1, self.parameters)

    def by_step(self) -> dict[str, int]:
        """The peak of each kind of step."""
        found: dict[str, int] = {}
        for (step, _), peak in self.counts.peaks.items():
            found[step] = max(found.get(step, 0), peak.total)
        return found

    def __str__(self) -> str:
        answer = self.answer().split("; ")  # two lines, for narrow terminals
        return "\n".join([self.title, *answer, "", *self._table(), "", *self._steps(), *self._closing()])

    def answer(self) -> str:
        """The answer in one sentence."""
        step, where = self.place
        named = _where(where, self.blocks)
        when = f"{named} ({step} step)" if step in ("first", "ordinary", "refresh") else f"{step}: {named}"
        if step == STARTING:
            when = "when the model is made"
        elif step == "merge":
            when = "in the merge"
        text = f"needs {gib(self.total)} at its peak, {when}"
        if not self.on_card:
            return text
        cards = [card for card in CARDS if self.total <= card << 30]
        if not cards:
            return f"{text}; fits no card of {CARDS[-1]} GB"
        a = "an" if cards[0] in (8, 80) else "a"
        return f"{text}; fits {a} {cards[0]} GB card with {gib((cards[0] << 30) - self.total)} to spare"

    def _table(self) -> list[str]:
        rows = [(kind, self.peak.parts.get(kind, 0), "") for kind in KINDS]
        rows = [row for row in rows if row[1]]
        if self.on_card:
            rows += [("rounding", self.peak.rounding, "blocks of 512 bytes"), ("CUDA context", CUDA_CONTEXT, "assumed")]
        lines = ["at the peak            bytes  share"]
        for kind, size, why in rows:
            lines.append(f"{kind.ljust(16)} {gib(size).rjust(11)} {size / max(1, self.total):6.1%}  {why}".rstrip())
        return [*lines, f"{'sum'.ljust(16)} {gib(self.total).rjust(11)}"]

    def _steps(self) -> list[str]:
        parts = {"forward": "forward", "backward": "backward", "the": "step"}
        found: dict[str, dict[str, int]] = {}
        for (step, where), peak in self.counts.peaks.items():
            if step == STARTING:
                continue
            column = parts.get(where.split()[0], "step")
            row = found.setdefault(step, {})
            row[column] = max(row.get(column, 0), peak.total)
        measured = self.measured or {}
        header = "peak of torch's bytes     forward    backward        step"
        lines = [header + ("    measured" if measured else "")]
        for step, row in found.items():
            cells = [gib(row[c]).rjust(11) if c in row else " " * 11 for c in ("forward", "backward", "step")]
            if measured:
                cells.append(gib(measured[step]).rjust(11) if step in measured else " " * 11)
            name = step if step in ("merge", "evaluation") else f"{step} step"
            lines.append(f"{name.ljust(21)} {' '.join(cells)}".rstrip())
        return lines

    def _closing(self) -> list[str]:
        made = max((p.total for (step, _), p in self.counts.peaks.items() if step == STARTING), default=0)
        lines = [f"making the model, on the host: {gib(made)}"] if made else []
        lines += [
            "",
            f"{self.bytes_per_parameter:.2f} bytes a parameter in weights, gradients and state (AdamW in float32: 16)",
            f"{self.trained / 1e6:.3f} M of {self.parameters / 1e6:.3f} M parameters train "
            f"({self.trained / max(1, self.parameters):.2%})",
        ]
        if self.per_block is not None:
            saved, kept = self.per_block
            lines.append(
                f"saved activations: {gib(saved)} a layer; with --checkpoint-activations only its input, {gib(kept)}"
            )
        return [*lines, *(textwrap.fill(note, 100, subsequent_indent="  ") for note in self.notes)]

    def to_json(self) -> dict[str, object]:
        """For a run's records."""
        step, where = self.place
        return {
            "peak_bytes": self.peak.total,
            "total_bytes": self.total,
            "place": f"{step}: {where}",
            "static": {kind: self.static.get(kind, 0) for kind in STATIC},
            "at_peak": dict(self.peak.parts),
            "by_step": self.by_step(),
        }


def _where(where: str, blocks: int) -> str:
    """A place in words, the blocks numbered."""
    direction, _, rest = where.partition(" of the ")
    named = {"first layer": "layer 0", "last layer": f"layer {blocks - 1}", "layers": "the layers in between"}
    if direction in ("forward", "backward"):
        part = named.get(rest, f"the {rest}")
        return f"in the {direction} pass of {part}" if blocks else f"in the {direction} pass"
    return f"in {where}"


def gib(count: int) -> str:
    """Bytes for people, in binary units.

    >>> gib(0), gib(3 << 20), gib(25 << 30)
    ('0 KiB', '3.0 MiB', '25.00 GiB')
    """
    if abs(count) < 1 << 20:
        return f"{count / 1024:.0f} KiB"
    return f"{count / (1 << 20):.1f} MiB" if abs(count) < 1 << 30 else f"{count / (1 << 30):.2f} GiB"


def parse_size(text: str) -> int:
    """Bytes of ``--fit``: ``24GB`` is 24·10⁹, ``24GiB`` 24·2³⁰, and ``24`` a card sold as 24 GB, which holds 24 GiB.

    Raises:
        ValueError: no size.

    >>> parse_size("24GB"), parse_size("24GiB"), parse_size("24")
    (24000000000, 25769803776, 25769803776)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else None
    if match is None or unit not in _UNITS or float(match[1]) <= 0:
        raise ValueError(
            f"--fit {text!r} is no size: give 24GB (24·10⁹ bytes), 24GiB (24·1024³), 500MiB, or 24 for a card that "
            "is sold as 24 GB and holds 24 GiB"
        )
    return int(float(match[1]) * _UNITS[unit])
