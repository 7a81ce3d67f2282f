"""What methods can be told beside their own arguments: how heads are merged, what becomes of the rest, and every one of
them Adam's constants, and rates and decay by group of parameters.

    lr of a parameter = run's lr · Use.lr · ratio of its group,      weight decay likewise

    embedding   the tables of ``nn.Embedding`` (also where one is tied to the output layer)
    head        the matrix of an output layer that is not tied
    vector      norms, biases, and whatever else has one dimension, wherever it stands
    (matrices)  all others: ratio 1, so that the run's learning rate is theirs

Factors of adapters belong to no group. A ratio for a group of which nothing is trained is an error when the method is
bound. The arguments are those of ``groups``, written there once and taken by every function of the catalogue; those of
``others``, ``adapted`` and ``merged`` by the functions that they are for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from lowrank.adapters.compression import Compression
from lowrank.adapters.merge import Weigh
from lowrank.adapters.targets import Targets
from lowrank.methods.method import Groups, Method, Rest, Ties
from lowrank.optim.pairs import PairRule
from lowrank.optim.rules import Rule


def others(*, rest: Rest = "train", freeze: Targets = ()) -> Callable[[Method], Method]:
    """What becomes of the parameters that a method did not choose, and which are frozen in any case."""
    return lambda method: replace(method, rest=rest, freeze=freeze)


def adapted(
    *, exclude_modules: Targets = (), rest: Rest = "auto", ties: Ties = "adapt", freeze: Targets = ()
) -> Callable[[Method], Method]:
    """As ``others``, and what is left out of the layers with adapters, and becomes of tied ones."""

    def left_out(method: Method) -> Method:
        adapt = tuple(replace(each, exclude_modules=exclude_modules) for each in method.adapt)
        return replace(method, adapt=adapt, rest=rest, ties=ties, freeze=freeze)

    return left_out


def merged(
    *,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    exchange: Compression = "float32",
    weigh: Weigh = "equal",
    rest_every: int | None = None,
) -> Callable[[Method], Method]:
    """The outer step of merges, what travels between ranks and what each weighs (``Merge``), and how often a rest that
    trains locally is averaged."""

    def merging(method: Method) -> Method:
        assert method.merge is not None, f"{method.name} has no merges"
        merge = replace(method.merge, outer_lr=outer_lr, outer_momentum=outer_momentum, exchange=exchange, weigh=weigh)
        return replace(method, merge=merge, rest_every=rest_every)

    return merging


def groups(
    *,
    embedding_lr: float = 1.0,
    head_lr: float = 1.0,
    vector_lr: float = 1.0,
    embedding_decay: float = 1.0,
    head_decay: float = 1.0,
    vector_decay: float = 1.0,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
) -> Callable[[Method], Method]:
    """What makes a method have these group ratios, and these constants of Adam in every rule that has such.

    Args:
        embedding_lr, head_lr, vector_lr: ratios to the run's learning rate.
        embedding_decay, head_decay, vector_decay: ratios to the run's weight decay; 0 for none.
        betas: decay of Adam's two moments, each in [0, 1); None: as each rule has them.
        eps: added to the root of Adam's second moment; None: as each rule has it.

    Raises:
        ValueError: a value out of its range, or constants for a method of whose rules none is of Adam's kind.
    """
    ratios = Groups(
        embedding_lr=embedding_lr,
        head_lr=head_lr,
        vector_lr=vector_lr,
        embedding_decay=embedding_decay,
        head_decay=head_decay,
        vector_decay=vector_decay,
    )
    constants: dict[str, Any] = {} if betas is None else {"betas": tuple(betas)}
    constants |= {} if eps is None else {"eps": eps}

    def grouped(method: Method) -> Method:
        rules = tuple(replace(use, rule=_with_constants(use.rule, constants)) for use in method.rules)
        idle = [name for name in constants if not any(_takes(use.rule, name) for use in rules)]
        if idle:
            raise ValueError(
                f"{' and '.join(idle)} are for rules of Adam's kind, and {method.name} has none: leave them out"
            )
        return replace(method, rules=rules, groups=ratios)

    return grouped


def _with_constants(rule: Any, constants: dict[str, Any]) -> Any:
    inside = {name: _with_constants(each, constants) for name, each in _inner_rules(rule).items()}
    own = {name: value for name, value in constants.items() if name in _constants_of(rule)}
    return replace(rule, **inside, **own)


def _takes(rule: Any, name: str) -> bool:
    return name in _constants_of(rule) or any(_takes(each, name) for each in _inner_rules(rule).values())


def _constants_of(rule: Any) -> set[str]:
    """Which of Adam's constants a rule has; one without betas is not of its kind, and means another eps."""
    names = {each.name for each in fields(rule)}
    return names & {"betas", "eps"} if "betas" in names else set()


def _inner_rules(rule: Any) -> dict[str, Any]:
    values = {each.name: getattr(rule, each.name) for each in fields(rule)}
    return {
        name: value for name, value in values.items() if isinstance(value, (Rule, PairRule)) and is_dataclass(value)
    }
