"""A training method as a value.

A method is what we add to the weights (adapt), how we turn gradients into steps (rules), and when the first is
merged into the weights (merge).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

from lowrank.adapters import Adapter, Dense, Merge, Site, Unchanged
from lowrank.adapters.adapter import splits_batch
from lowrank.adapters.targets import Targets, as_list
from lowrank.infra.checks import check_choice, check_integer
from lowrank.methods.schedule import Schedule, constant
from lowrank.optim.pairs import PairRule
from lowrank.optim.projected import Projected
from lowrank.optim.rules import AdamW, Rule, check_rule

Rest = Literal["auto", "train", "freeze", "local"]
Ties = Literal["adapt", "leave", "untie"]
Family = Literal["adapter", "projected", "both", "none"]
Group = Literal["embedding", "head", "vector"]
FACTORS = ("*.adapters.*",)
FACTOR_B = ("*.adapters.*.B",)


@dataclass(frozen=True)
class Adapt:
    """Which linear layers get which adapter; ``make`` is called with each layer's ``lowrank.adapters.Site``."""

    target_modules: Targets
    make: Callable[[Site], Adapter]
    exclude_modules: Targets = ()


@dataclass(frozen=True)
class Use:
    """Which parameters follow which rule, at ``lr`` times the run's learning rate.

    ``decay``: whether the run's weight decay applies. The catch-all ``"*"`` exempts adapter factors all the same, since
    the decay of factors would be merged into W; a Use that names them decides for itself.

    Raises:
        ValueError: an ``lr`` that is not above 0, or what is no rule.
    """

    target_modules: Targets
    rule: Rule | PairRule
    lr: float = 1.0
    decay: bool = True
    exclude_modules: Targets = ()

    def __post_init__(self) -> None:
        check_rule(self.rule, f"Use({self.target_modules!r})", (Rule, PairRule))
        if not self.lr > 0:
            raise ValueError(
                f"Use(lr={self.lr}) multiplies the learning rate and must be above 0; freeze= freezes parameters"
            )

    @property
    def is_catch_all(self) -> bool:
        return as_list(self.target_modules) == ["*"]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Ratios to the run's learning rate and weight decay, by group (``methods.groups``).

    Raises:
        ValueError: a rate that is not above 0, a decay below 0.
    """

    embedding_lr: float = 1.0
    head_lr: float = 1.0
    vector_lr: float = 1.0
    embedding_decay: float = 1.0
    head_decay: float = 1.0
    vector_decay: float = 1.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least = getattr(self, each.name), "above 0" if each.name.endswith("_lr") else "0 or more"
            if not (math.isfinite(value) and (value > 0 or (value == 0 and least != "above 0"))):
                remedy = "; freeze= freezes parameters" if least == "above 0" else ""
                raise ValueError(f"{each.name}={value} is a ratio to the run's and must be {least}{remedy}")

    def lr(self, group: Group | None) -> float:
        return 1.0 if group is None else getattr(self, f"{group}_lr")

    def decay(self, group: Group | None) -> float:
        return 1.0 if group is None else getattr(self, f"{group}_decay")

    def told(self) -> dict[str, Group]:
        """The ratios that are not 1 and the groups that they are for."""
        names: tuple[Group, ...] = ("embedding", "head", "vector")
        each = {f"{group}_{what}": group for group in names for what in ("lr", "decay")}
        return {name: group for name, group in each.items() if getattr(self, name) != 1.0}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method: adapters, rules, merging, and what becomes of the rest.

    Args:
        adapt: which layers get which adapter; the first match wins.
        rules: which parameters follow which rule; the first match wins.
        merge: when adapters are merged into the weights, or None for never.
        lr: a schedule that multiplies the run's own.
        rest: what becomes of parameters that are not chosen: ``auto``, ``train``, ``freeze`` or ``local``.
        rest_every: over several ranks, where the rest may train locally, steps between two averages of it; None means
            ``rest_merges`` merge intervals, or so many times 10 steps without merges.
        ties: what becomes of a chosen layer with a tied weight: ``adapt``, ``leave`` or ``untie``.
        freeze: patterns of parameters that are frozen in any case.
        groups: rates and decay of embeddings, output layers and vectors, as ratios to the run's (``methods.groups``).
        name: for tables and messages.

    Raises:
        ValueError: an unknown word, a ``rest_every`` that nothing would use, a merge without adapters.
    """

    adapt: tuple[Adapt, ...] = ()
    rules: tuple[Use, ...] = field(default_factory=lambda: (Use("*", AdamW()),))
    merge: Merge | None = None
    lr: Schedule = constant
    rest: Rest = "auto"
    rest_every: int | None = None
    rest_merges: int = 4
    ties: Ties = "adapt"
    freeze: Targets = ()
    groups: Groups = field(default_factory=Groups)
    name: str = "method"

    def __post_init__(self) -> None:
        check_choice("rest", self.rest, Rest)
        check_choice("ties", self.ties, Ties)
        check_integer("rest_merges", self.rest_merges)
        if self.rest_every is not None:
            check_integer("rest_every", self.rest_every)
        if self.rest_every is not None and self.rest in ("train", "freeze"):
            raise ValueError(
                f"rest_every={self.rest_every} averages a rest that trains on each rank by itself, and not "
                f"rest={self.rest!r}: use rest='local', or leave rest_every out"
            )
        if self.merge is not None and self.merge.fragments > self.rest_interval:
            raise ValueError(
                f"rest_every={self.rest_every} has fewer steps than fragments={self.merge.fragments}, which are "
                f"averaged one at a step: use at least {self.merge.fragments}"
            )
        if (
            self.merge is not None
            and self.merge.fragments > 1
            and any(isinstance(use.rule, Projected) and use.rule.one_basis for use in self.rules)
        ):
            raise ValueError(
                f"fragments={self.merge.fragments} merge at different steps, and a basis that heads share "
                "(one_basis=True) is refreshed for all at once: use fragments=1"
            )
        if self.merge is not None and not self.adapt:
            raise ValueError("merge= merges adapters into the weights, and this method has no adapters (adapt=())")

    def check_quantised(self) -> None:
        """Whether it may train on a base whose weights are quantised, and so stay as they are.

        Raises:
            ValueError: it trains weights, or merges into them.
        """
        if self.adapt and self.merge is None:
            return
        what = "trains the weights themselves" if self.merge is None else "merges its factors into the weights"
        raise ValueError(
            f"{self.name} {what}, and quantised weights stay as they are: use lora, rslora, dora, pissa, lora_plus or "
            "multihead_lora, or a base that is not quantised (leave --model.quantise out)"
        )

    @property
    def family(self) -> Family:
        """Whether weights, gradients, both or neither are of low rank: adapters, projected rules."""
        makes = [adapt.make for adapt in self.adapt if not isinstance(adapt.make, Unchanged)]
        if any(isinstance(use.rule, Projected) for use in self.rules):
            return "both" if makes else "projected"
        return "none" if all(isinstance(make, Dense) for make in makes) else "adapter"

    @property
    def rest_interval(self) -> int:
        """Steps between two averages of a rest that trains locally."""
        if self.rest_every is not None:
            return self.rest_every
        return self.rest_merges * (self.merge.merge_every if self.merge is not None else 10)

    @property
    def splits(self) -> bool:
        """Whether some adapters have heads that split the batch, which several ranks divide between them."""
        return any(splits_batch(adapt.make) for adapt in self.adapt)
