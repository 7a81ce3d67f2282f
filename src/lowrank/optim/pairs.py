"""Rules that see both factors of an adapter at once: A and B, their gradients, and one state.

    (U_A, U_B), c = update((A, B), (∂A, ∂B), state),    A ← A·(1 − η·λ) − η·c·U_A,    B likewise

For optimizers on the product BA, whose steps on the two factors depend on each other (ScaledGD for LoRA, arXiv
2402.02347; LoRA-RITE, 2410.20625). Unlike a :class:`Rule`, a rule for pairs sees the parameters: what it does to BA may
then be the same however BA is split into factors.

A method names it as any other rule, for both factors: ``Use(("*.A", "*.B"), rule)``. The state lies with A. Per layer
both are stepped when the second of their gradients has come.

Shape legend: A, ∂A, U_A (..., rank, in);  B, ∂B, U_B (..., out, rank);  heads are a stack of pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lowrank.optim.rules import Rule, State

Pair = tuple[Tensor, Tensor]


class PairRule(ABC):
    """An update rule for the pair (A, B) of an adapter. Subclasses are frozen dataclasses."""

    @abstractmethod
    def init(self, factors: Pair) -> State:
        """A fresh state for factors like these (their shapes, dtypes and device; the values are not read)."""

    @abstractmethod
    def update(self, factors: Pair, grads: Pair, state: State) -> tuple[Pair, Tensor | float]:
        """((U_A, U_B), gain); ``state`` is changed in place, factors and gradients stay as they are."""

    def apply_(self, factors: Pair, grads: Pair, state: State, *, lr: float, decay: float) -> None:
        """One step of float32 or float64 factors in place, equal to ``update``'s up to rounding."""
        directions, gain = self.update(factors, grads, state)
        for p, direction in zip(factors, directions, strict=True):
            p.mul_(1 - lr * decay).sub_(direction * (lr * gain))


class OneFactor(Rule):
    """The place of one factor in a plan and in an optimizer: A has the state of the pair, B none. Final.

    Args:
        pair: the rule for both. factor: which of them this is. partner: the shape of the other.
    """

    def __init__(self, pair: PairRule, factor: Literal["A", "B"], partner: tuple[int, ...]):
        self.pair, self.factor, self.partner = pair, factor, tuple(partner)

    def __repr__(self) -> str:
        return f"{self.pair!r} (of A and B together)"

    def init(self, like: Tensor) -> State:
        return self.pair.init((like, like.new_empty(self.partner))) if self.factor == "A" else {}

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        raise RuntimeError(f"{self.pair!r} steps A and B of an adapter together, and was asked to step {self.factor}")


def rule_of_each(rule: Rule | PairRule, params: Sequence[Tensor]) -> list[Rule]:
    """The rule that each parameter of a group follows by itself.

    Raises:
        ValueError: the parameters of a rule for pairs are not A, B, A, B, ….
    """
    if isinstance(rule, Rule):
        return [rule] * len(params)
    each: list[Rule] = []
    for first in range(0, len(params), 2):
        shapes = [p.shape for p in params[first : first + 2]]
        A, B = shapes if len(shapes) == 2 else (torch.Size(), torch.Size())
        if len(A) < 2 or len(B) < 2 or A[:-2] != B[:-2] or A[-2] != B[-1]:
            raise ValueError(
                f"{rule!r} takes the factors of each adapter one after the other, A (..., rank, in) and B (..., out, "
                f"rank); parameters {first} and {first + 1} of the group are {[tuple(shape) for shape in shapes]}"
            )
        each += [OneFactor(rule, "A", B), OneFactor(rule, "B", A)]
    return each
