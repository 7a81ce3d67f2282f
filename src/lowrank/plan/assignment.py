"""Which parameters are adapted, frozen, or trained by which rule: the decisions behind ``plan.apply_``.

Whether a parameter is trained is decided by the first of these that applies:

1. it belongs to an adapter: yes; it is the weight under an adapter, or quantised: no
2. it was frozen before, or a ``freeze`` pattern covers it: no
3. a ``Use`` other than the catch-all names it: yes
4. otherwise by ``rest``: ``train``: yes; ``freeze``: no; ``auto``: yes if initialised at random, no if loaded

What was loaded, ``infra.loaded_parameters`` finds out; the plan says how. Weights of more than two dimensions that are
no convolution's (experts, say) are stacks of matrices where their module says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lowrank.adapters import targets
from lowrank.adapters.layers import WHOLE, adapted_layers, is_conv1d
from lowrank.adapters.targets import as_list, name_matches
from lowrank.infra.loaded_parameters import origin
from lowrank.methods import Use
from lowrank.methods.method import Group
from lowrank.optim.pairs import OneFactor, PairRule
from lowrank.optim.rules import Rule
from lowrank.plan.placement import Placement, names_by_parameter
from lowrank.plan.row import ADAPTER, Across, Row
from lowrank.plan.table import notes_on_ranks


class Assignment:
    """Every parameter's place: made before the adapters of ``placement`` are in, asked for ``rows`` when they are."""

    def __init__(self, placement: Placement):
        self.placement = placement
        self.model, self.method, self.layout = placement.model, placement.method, placement.layout
        self.layers, self.quantised, self.names_of = placement.layers, placement.quantised, placement.names_of
        self.under, self.factors, self.split = placement.under, placement.factors, placement.split
        self.notes = placement.notes
        self.frozen_before = {n for n, p in self.model.named_parameters() if not p.requires_grad}
        outputs = [layer.module for layer in self.layers if "head" in layer.groups]
        heads = [module for module in outputs if len(self.names_of[id(module.weight)]) == 1]  # not tied
        self.origin = origin(self.model, heads)
        self.heads = {id(p) for head in heads for p in head.parameters()}
        self.freeze = _expand_freeze(self.model, self.method.freeze)
        self.tables = {n for n, m in self.model.named_modules() if isinstance(m, nn.Embedding)}

    def check_rest(self) -> None:
        """Raise ValueError for what is seen without adapters: patterns of rules and ``freeze`` that match nothing."""
        names = [n for n, _ in self.model.named_parameters(remove_duplicate=False)]
        for pattern in self.freeze:
            if pattern not in (*targets.GROUPS, targets.EMBEDDINGS) and not any(_covers(pattern, n) for n in names):
                raise ValueError(f"freeze={pattern!r} matches no parameter; parameters are {', '.join(names[:4])}, …")
        for use in self.method.rules:
            for pattern in as_list(use.target_modules):
                known = pattern == targets.EMBEDDINGS or (
                    pattern in targets.GROUPS and targets.select(self.layers, pattern)
                )
                if not (known or ".adapters." in pattern or any(_covers(pattern, n) for n in names)):
                    raise targets.no_match(self.model, self.layers, [pattern], "Use")

    def rows(self) -> list[Row]:
        self.names_of = names_by_parameter(self.model)
        self._check_patterns()
        rows = [self._row(self.names_of[id(p)], p) for p in self.model.parameters()]
        if all(row.rule is None for row in rows):
            raise ValueError(
                f"nothing would be trained: all {len(rows)} parameters are frozen (rest={self.method.rest!r}"
                f"{', frozen before apply_' if self.frozen_before else ''}); use rest='train', other targets, or "
                "model.requires_grad_(True)"
            )
        for key, names in self.names_of.items():
            if len(names) > 1 and key not in self.placement.told | self.factors:
                self.notes.append(f"{names[0]} is also {', '.join(names[1:])} (tied): one parameter, counted once")
        self._check_groups(rows)
        if self.method.rest == "auto":
            self._note_origin(rows)
        if self.method.adapt:
            self._note_stacks()
        self.notes += notes_on_ranks(self.method, self.layout, rows, self.placement.adapters)
        return rows

    def _note_origin(self, rows: Sequence[Row]) -> None:
        """Say what ``rest="auto"`` took for loaded, and why.

        Raises:
            ValueError: nothing tells, and more would train than adapters, biases of their layers, and output layers.
        """
        parameters = dict(self.model.named_parameters())
        random = [row for row in rows if row.why == "initialised at random"]
        beside = {
            id(p) for _, layer in adapted_layers(self.model) for p in layer.parameters(recurse=False)
        } | self.heads
        unsure = [row.name for row in random if id(parameters[row.name]) not in beside]
        if self.origin.why is None and self.method.adapt and unsure:
            more = f" and {len(unsure) - 1} more parameters were" if len(unsure) > 1 else " was"
            raise ValueError(
                f"rest='auto' cannot tell whether {unsure[0]}{more} loaded, or initialised at random and to be trained "
                "beside the adapters: the model has neither a loader's marks nor normalisation layers. Use "
                "rest='train' or rest='freeze', or call lowrank.mark_loaded_(model) after loading it"
            )
        loaded = sum(row.numel for row in rows if row.why == "loaded")
        why = self.origin.why or "nothing says that the model was loaded"
        trains = sum(row.numel for row in random)
        self.notes.append(
            f"rest='auto': {trains:,} parameters initialised at random train, {loaded:,} loaded ones are frozen ({why})"
        )

    def _note_stacks(self) -> None:
        """Name the stacked weights, which no adapter takes."""
        named = [(n, p) for n, p in self.model.named_parameters() if id(p) not in self.factors]
        stacks = [f"{name} {tuple(p.shape)}" for name, p in named if _is_stack(self.placement.owner(name), name, p)]
        if stacks:
            more = f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""
            self.notes.append(f"{stacks[0]}{more}: stacks of matrices, which adapters leave alone")

    def _check_patterns(self) -> None:
        """Raise ValueError for what only adapters in place show: rules and ``freeze`` patterns that cover nothing."""
        plain = [n for key, names in self.names_of.items() if key not in self.factors for n in names]
        every = [n for names in self.names_of.values() for n in names]
        given = [("freeze", pattern, plain) for pattern in self.freeze]
        for use in self.method.rules:
            given += [("Use", pattern, every) for pattern in as_list(use.target_modules)]
            given += [("exclude_modules", pattern, every) for pattern in _excluded(use)]
        for what, pattern, names in given:
            if pattern != targets.EMBEDDINGS and not any(self._covers(pattern, [name]) for name in names):
                raise ValueError(
                    f"{what}={pattern!r} covers no parameter of its own (a part of a fused projection has none, and "
                    f"factors exist only where adapters are); parameters are {', '.join(names[:4])}, …"
                )

    def _row(self, names: list[str], p: nn.Parameter) -> Row:
        use = next((u for u in self.method.rules if self._uses(u, names)), None)
        trained, why = self._decide(names, p, use)
        if not trained:
            return Row(names[0], self.quantised.get(id(p), tuple(p.shape)), p.dtype, None, None, why)
        if use is None:
            raise ValueError(
                f"{names[0]} would be trained but no rule covers it; end the method's rules with Use('*', AdamW()), "
                "or freeze it"
            )
        if isinstance(use.rule, PairRule):
            rule: Rule = self._one_factor(use, names[0], use.rule)
        else:
            rule = self._on_layer(self._resolved(use.rule, names[0], p), names, p)
        group, spared = self._group(names, p), not use.decay or (use.is_catch_all and why == ADAPTER)
        return Row(
            names[0],
            tuple(p.shape),
            p.dtype,
            use,
            rule,
            why,
            self._across(p, why),
            group,
            use.lr * self.method.groups.lr(group),
            0.0 if spared else self.method.groups.decay(group),
        )

    def _group(self, names: list[str], p: nn.Parameter) -> Group | None:
        """The group of which a parameter follows the rate and decay (``methods.groups``)."""
        if id(p) in self.factors:
            return None
        if sum(size > 1 for size in p.shape) <= 1:
            return "vector"
        if any(name.rpartition(".")[0] in self.tables for name in names):
            return "embedding"
        return "head" if self._covers("head", names) else None

    def _check_groups(self, rows: Sequence[Row]) -> None:
        """Raise ValueError for ratios of a group of which nothing is trained."""
        trained = {row.group for row in rows if row.rule is not None}
        for option, group in self.method.groups.told().items():
            if group not in trained:
                head = "output layer apart from the embedding"
                what = {"embedding": "embedding table", "head": head, "vector": "norm or bias"}
                raise ValueError(
                    f"{option}={getattr(self.method.groups, option):g} has nothing to act on: no {what[group]} is "
                    "trained by this method in this model; leave it out"
                )

    def _one_factor(self, use: Use, name: str, rule: PairRule) -> Rule:
        """What a rule for both factors of an adapter is to one of them."""
        owner, _, factor = name.rpartition(".")
        other = f"{owner}.{'A' if factor == 'B' else 'B'}"
        beside = dict(self.model.named_parameters(remove_duplicate=False)).get(other)
        if ".adapters." not in name or factor not in ("A", "B") or beside is None:
            raise ValueError(
                f"{rule!r} steps A and B of an adapter together, and {name} is none of them: name both factors, as in "
                "Use(('*.adapters.*.A', '*.adapters.*.B'), rule), and give the rest a rule of its own"
            )
        if next((u for u in self.method.rules if self._uses(u, [other])), None) is not use:
            raise ValueError(f"{rule!r} steps A and B of an adapter together: {name} and {other} must follow one Use")
        return OneFactor(rule, "A" if factor == "A" else "B", tuple(beside.shape))

    def _on_layer(self, rule: Rule, names: list[str], p: nn.Parameter) -> Rule:
        """The rule as it is for the weight of a layer, told how that is stored."""
        layer = next((layer for layer in self.layers if layer.module.weight is p), None)
        if layer is not None:
            return rule.on_layer(transposed=is_conv1d(layer.module), parts=len(layer.parts) or 1)
        owner, within, _ = names[0].partition(f".adapters.{WHOLE}.")
        layer = next((layer for layer in self.layers if layer.name == owner), None) if within else None
        if layer is not None and p.shape[-2:] == (layer.out_features, layer.in_features):  # changes of the whole matrix
            return rule.on_layer(transposed=False, parts=len(layer.parts) or 1)
        is_table = any(name.rpartition(".")[0] in self.tables for name in names)
        return rule.on_layer(transposed=True, parts=1) if is_table else rule

    def _resolved(self, rule: Rule, name: str, p: nn.Parameter) -> Rule:
        """The rule that ``p`` really follows: a projected one gives way to its inner rule where it compresses nothing.

        Raises:
            ValueError: that depends on whether ``p`` is a stack of matrices, which nobody has said.
        """
        stacked = True if id(p) in self.factors else _is_stack(self.placement.owner(name), name, p)
        if stacked is not None:
            return rule.resolve(p, stacked=stacked)
        if (one := rule.resolve(p, stacked=False)) == rule.resolve(p, stacked=True):
            return one
        owner = f"the module {name.rpartition('.')[0]}" if "." in name else "the model"
        raise ValueError(
            f"{name} {tuple(p.shape)} may be a stack of matrices (experts, say), each projected by itself, or one "
            f"matrix {(p.shape[0], p[0].numel())}: set the attribute stacked = True or stacked = False on {owner}"
        )

    def _across(self, p: nn.Parameter, why: str) -> Across:
        """How several ranks train ``p`` (see ``Row.across``)."""
        if self.layout.in_step:
            return "shared"
        if id(p) in self.split:
            return "own"
        if why in (ADAPTER, "chosen"):
            return "shared"
        alone = self.method.rest == "local" or (self.method.rest == "auto" and self.method.splits)
        return "local" if alone else "shared"

    def _decide(self, names: list[str], p: nn.Parameter, use: Use | None) -> tuple[bool, str]:
        if id(p) in self.factors:
            return True, ADAPTER
        if id(p) in self.under:
            return False, "under an adapter"
        if id(p) in self.quantised:
            if use is not None and not use.is_catch_all:
                raise ValueError(
                    f"{names[0]} is quantised and cannot be trained by {use.rule!r}: leave it out of the rule's "
                    "target_modules, or take a base that is not quantised"
                )
            return False, "quantised"
        if self.frozen_before & set(names):
            return False, "frozen before"
        if any(self._covers(pattern, names) for pattern in self.freeze):
            return False, "freeze="
        if use is not None and not use.is_catch_all:
            return True, "chosen"
        if self.method.rest != "auto":
            return self.method.rest != "freeze", f"rest='{self.method.rest}'"
        return (False, "loaded") if id(p) in self.origin.loaded else (True, "initialised at random")

    def _uses(self, use: Use, names: list[str]) -> bool:
        chosen = any(self._covers(pattern, names) for pattern in as_list(use.target_modules))
        return chosen and not any(self._covers(pattern, names) for pattern in _excluded(use))

    def _covers(self, pattern: str, names: list[str]) -> bool:
        """Whether ``pattern`` (a group or a name) means the parameter of these names, or its layer.

        The layer of an adapter's parameter is the one that it adapts.
        """
        if pattern == targets.EMBEDDINGS:
            return any(name.rpartition(".")[0] in self.tables for name in names) or self._covers("head", names)
        if pattern not in targets.GROUPS:
            return any(_covers(pattern, name) for name in names)
        owners = {name.rpartition(".")[0] for name in names} | {name.partition(".adapters.")[0] for name in names}
        parts = {name.partition(".adapters.")[2].partition(".")[0] for name in names}
        return any(layer.name in owners and (pattern in layer.groups or pattern in parts) for layer in self.layers)


def _excluded(use: Use) -> list[str]:
    return as_list(use.exclude_modules) if use.exclude_modules else []


def _covers(pattern: str, name: str) -> bool:
    """Whether ``pattern`` means the parameter ``name``, its module, or a module that holds it."""
    pieces = name.split(".")
    return any(name_matches(".".join(pieces[:end]), pattern) for end in range(1, len(pieces) + 1))


def _expand_freeze(model: nn.Module, freeze: targets.Targets) -> list[str]:
    """``freeze`` as a list, ``first:n`` replaced by the names of the first n blocks of the longest module list."""
    patterns: list[str] = []
    for pattern in as_list(freeze) if freeze else []:
        if not pattern.startswith("first:"):
            patterns.append(pattern)
            continue
        stacks = {n: m for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)}
        name = max(stacks, key=lambda n: len(stacks[n]), default=None)
        count = pattern.removeprefix("first:")
        if name is None or not count.isdigit() or not 1 <= int(count) <= len(stacks[name]):
            blocks = len(stacks[name]) if name is not None else 0
            raise ValueError(f"freeze={pattern!r} must be first:n with n from 1 to the model's {blocks} blocks")
        patterns += [f"{name}.{i}" if name else str(i) for i in range(int(count))]
    return patterns


def _is_stack(owner: nn.Module, name: str, p: nn.Parameter) -> bool | None:
    """Whether the leading dimensions of ``p``, a parameter of ``owner``, are a batch of matrices; None: unknown.

    ``owner`` may say so by an attribute ``stacked``, by a number of experts, or by its name.
    """
    if p.dim() <= 2 or len(p) == 1 or isinstance(owner, nn.modules.conv._ConvNd):
        return False
    said = getattr(owner, "stacked", None)
    if isinstance(said, bool):
        return said
    counts = {getattr(owner, attribute, None) for attribute in ("num_experts", "n_experts", "num_local_experts")}
    is_expert = "expert" in f"{type(owner).__name__} {name}".lower()
    return True if is_expert or len(p) in counts else None
