"""Which parameters are adapted, frozen, or trained by which rule: the decisions behind ``plan.apply_``.

Whether a parameter is trained is decided by the first of these that applies:

1. it belongs to an adapter: yes; it is the weight under an adapter, or quantised: no
2. it was frozen before, or a ``freeze`` pattern covers it: no
3. a ``Use`` other than the catch-all names it: yes
4. otherwise by ``rest``: ``train``: yes; ``freeze``: no; ``auto``: yes if initialised at random, no if loaded

What was loaded, ``infra.loaded`` finds out; the plan says how. Weights of more than two dimensions that are no
convolution's (experts, say) are stacks of matrices where their module says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace as replace_field
from functools import partial

from torch import nn

from lowrank.adapters import Adapter, Site, SplitAdapter, targets
from lowrank.adapters.layers import (
    WHOLE,
    AdaptedLayer,
    adapted,
    adapted_layers,
    check_embedding,
    is_conv1d,
    matrix_of,
    quantised_layers,
    replace,
    size_of,
)
from lowrank.adapters.targets import Layer, as_list, name_matches
from lowrank.distributed.workers import ProcessLayout
from lowrank.infra.loaded import origin
from lowrank.methods import Adapt, Method, Use
from lowrank.methods.method import Group
from lowrank.optim.pairs import OneFactor, PairRule
from lowrank.optim.rules import Rule
from lowrank.plan.row import ADAPTER, Across, Row
from lowrank.plan.table import notes_on_ranks


class Binding:
    """The work of ``apply_``: first everything is decided and checked, then ``place_adapters`` changes the model."""

    def __init__(self, model: nn.Module, method: Method, seed: int, layout: ProcessLayout):
        self.model, self.method, self.seed, self.layout = model, method, seed, layout
        self.layers = targets.linear_layers(model)
        self.names_of = _names_by_parameter(model)
        self.frozen_before = {n for n, p in model.named_parameters() if not p.requires_grad}
        heads = [layer.module for layer in self.layers if "head" in layer.groups and self._is_untied(layer)]
        self.origin = origin(model, heads)
        self.heads = {id(p) for head in heads for p in head.parameters()}
        self.quantised = {id(layer.weight): size_of(layer) for layer in quantised_layers(model).values()}
        if self.quantised:
            method.check_quantised()
        self.freeze = _expand_freeze(model, method.freeze)
        self.tables = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
        self.claims: dict[str, dict[str, Adapt]] = {}
        self.adapters: dict[str, Adapter] = {}
        self.under: set[int] = set()
        self.factors: set[int] = set()
        self.split: set[int] = set()  # factors of heads that are divided between workers
        self.told: set[int] = set()
        self.notes: list[str] = []
        self.left: dict[str, str] = {}
        self.undoing: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Put the model back as it was before ``apply_``."""
        for action in reversed(self.undoing):
            action()

    # --- adapters ------------------------------------------------------------------------------------------------

    def place_adapters(self) -> None:
        """Decide which layer gets which adapter, make them all (a rank may be refused here), only then put them in."""
        if self.method.adapt and targets.is_linear(self.model):
            raise ValueError("the model is one linear layer, which nothing holds: give nn.Sequential(model)")
        for adapt in self.method.adapt:
            self._claim(adapt)
        by_name = {layer.name: layer for layer in self.layers}
        claimed = [by_name[name] for name in self.claims]
        self._settle_ties(claimed)
        if self.method.adapt and not self.claims:
            raise ValueError(
                f"every layer that the method targets was left alone ({'; '.join(sorted(set(self.left.values())))}); "
                "use ties='adapt' or ties='untie', or other target_modules"
            )
        made = {name: self._make(by_name[name]) for name in self.claims}
        for name, adapters in made.items():
            self._put(by_name[name], adapters)

    def _claim(self, adapt: Adapt) -> None:
        chosen = targets.select_all(self.model, self.layers, adapt.target_modules)
        spared = set()
        if adapt.exclude_modules:
            out = targets.select_all(self.model, self.layers, adapt.exclude_modules, "exclude_modules")
            spared = {(layer.name, part) for layer, part in out}
        left = [(layer, part) for layer, part in chosen if not {(layer.name, part), (layer.name, WHOLE)} & spared]
        if not left:
            raise ValueError(
                f"exclude_modules={adapt.exclude_modules!r} takes away all that "
                f"target_modules={adapt.target_modules!r} matched"
            )
        targets.refuse_hidden(self.model, [layer for layer, _ in left])
        before = sum(map(len, self.claims.values()))
        for layer, part in left:
            self._claim_part(layer, part, adapt, {p for n, p in spared if n == layer.name})
        if sum(map(len, self.claims.values())) == before:
            raise ValueError(
                f"Adapt({adapt.target_modules!r}) gets nothing: earlier entries of adapt= (the first match wins) or "
                "exclude_modules take all that it matches"
            )

    def _claim_part(self, layer: Layer, part: str, adapt: Adapt, spared: set[str]) -> None:
        """Claim ``part`` of ``layer`` for ``adapt``, unless an earlier one has: the first match wins.

        Where the whole layer is meant and some of its parts are taken or spared, its other parts are claimed.
        """
        taken = self.claims.get(layer.name, {})
        if WHOLE in taken:
            return
        wanted = [part] if part != WHOLE or not (taken or spared) else [p for p, _ in layer.parts if p not in spared]
        for p in wanted:
            self.claims.setdefault(layer.name, {}).setdefault(p, adapt)

    def _settle_ties(self, claimed: list[Layer]) -> None:
        for layer in claimed:
            weight = layer.module.weight
            others = [n for n in self.names_of[id(weight)] if self._owner(n) is not layer.module]
            if not others or layer.name not in self.claims:
                continue
            self.told.add(id(weight))
            if self.method.ties == "leave":
                self.left[layer.name] = f"{layer.name} is tied to {others[0]}"
                self.notes.append(f"{layer.name} is tied to {', '.join(others)}: left alone (ties='leave')")
                del self.claims[layer.name]
            elif self.method.ties == "untie":
                self._untie(layer, others)
            else:
                self._check_tied(layer, others)
                for name in others:  # tied linear layers share the adapters of the first
                    self.claims.pop(name.rpartition(".")[0], None)
                self.notes.append(f"{layer.name} is tied to {', '.join(others)}: adapted as one matrix (ties='adapt')")

    def _untie(self, layer: Layer, others: Sequence[str]) -> None:
        assert isinstance(layer.module.weight, nn.Parameter)
        old = layer.module.weight
        self.undoing.append(lambda: setattr(layer.module, "weight", old))
        layer.module.weight = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        layer.module.weight.__dict__.update(
            {k: v for k, v in old.__dict__.items() if k.endswith(("_loaded", "_initialized"))}
        )
        config = getattr(self.model, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            self.undoing.append(lambda: setattr(config, "tie_word_embeddings", True))
            config.tie_word_embeddings = False  # type: ignore[union-attr]
        self.names_of = _names_by_parameter(self.model)
        self.notes.append(
            f"{layer.name} was untied from {', '.join(others)}: {old.numel():,} more parameters (ties='untie')"
        )

    def _check_tied(self, layer: Layer, others: Sequence[str]) -> None:
        if WHOLE not in self.claims[layer.name]:
            raise ValueError(
                f"{layer.name} is tied to {others[0]} and cannot be adapted by parts; target the whole layer"
            )
        for name in others:
            module, transposed = self._owner(name), is_conv1d(layer.module)
            if type(module) is nn.Embedding and not transposed:
                check_embedding(module, name)
            elif not targets.is_linear(module) or is_conv1d(module) != transposed:
                raise ValueError(
                    f"{layer.name} is tied to {name} of a {type(module).__name__}, which cannot share an adapter; "
                    "use ties='leave' or ties='untie'"
                )

    def _owner(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def _make(self, layer: Layer) -> dict[str, Adapter]:
        merge = self.method.merge
        keep = merge is not None and merge.keep
        matrix, made = matrix_of(layer.module).detach(), {}
        for part, adapt in self.claims[layer.name].items():
            W = matrix[layer.rows(part)]
            site = Site(layer.label(part), W, self.seed, keep, self.layout.worker, self.layout.workers_count)
            made[part] = adapt.make(site if merge is None else replace_field(site, compression=merge.exchange))
            if merge is not None:
                merge.prepare_(made[part], W)
            if id(layer.module.weight) in self.quantised and type(made[part]).onto is Adapter.onto:
                raise ValueError(
                    f"{type(made[part]).__name__} needs the weight of {layer.label(part)} itself, which is quantised: "
                    "give it a method onto, as LoRA and DoRA have, or take a base that is not quantised"
                )
            if made[part].split and self.layout.workers_count > 1 and not isinstance(made[part], SplitAdapter):
                raise ValueError(
                    f"heads of {type(made[part]).__name__} on {layer.label(part)} split the batch, and cannot be "
                    "divided between ranks as those of LoRA and Dense can: use split=False, or one process"
                )
        return made

    def _put(self, layer: Layer, adapters: dict[str, Adapter]) -> None:
        weight = layer.module.weight
        for name in self.names_of[id(weight)]:
            owner = name.rpartition(".")[0]
            module = self.model.get_submodule(owner)
            if isinstance(module, AdaptedLayer):
                continue
            self.undoing.append(partial(replace, self.model, owner, module))
            replace(self.model, owner, adapted(module, adapters, {part: layer.rows(part) for part in adapters}))
        self.under.add(id(weight))
        for part, adapter in adapters.items():
            self.adapters[layer.label(part)] = adapter
            self.factors |= {id(p) for p in adapter.parameters()}
            self.split |= {id(p) for p in adapter.parameters() if adapter.split}

    # --- every parameter -----------------------------------------------------------------------------------------

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
        self.names_of = _names_by_parameter(self.model)
        self._check_patterns()
        rows = [self._row(self.names_of[id(p)], p) for p in self.model.parameters()]
        if all(row.rule is None for row in rows):
            raise ValueError(
                f"nothing would be trained: all {len(rows)} parameters are frozen (rest={self.method.rest!r}"
                f"{', frozen before apply_' if self.frozen_before else ''}); use rest='train', other targets, or "
                "model.requires_grad_(True)"
            )
        for key, names in self.names_of.items():
            if len(names) > 1 and key not in self.told | self.factors:
                self.notes.append(f"{names[0]} is also {', '.join(names[1:])} (tied): one parameter, counted once")
        self._check_groups(rows)
        if self.method.rest == "auto":
            self._note_origin(rows)
        if self.method.adapt:
            self._note_stacks()
        self.notes += notes_on_ranks(self.method, self.layout, rows, self.adapters)
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
        stacks = [f"{name} {tuple(p.shape)}" for name, p in named if _is_stack(self._owner(name), name, p)]
        if stacks:
            more = f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""
            self.notes.append(f"{stacks[0]}{more}: stacks of matrices, which adapters leave alone")

    def _is_untied(self, layer: Layer) -> bool:
        return len(self.names_of[id(layer.module.weight)]) == 1

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
                what = {
                    "embedding": "embedding table",
                    "head": "output layer apart from the embedding",
                    "vector": "norm or bias",
                }
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
        is_table = any(name.rpartition(".")[0] in self.tables for name in names)
        return rule.on_layer(transposed=True, parts=1) if is_table else rule

    def _resolved(self, rule: Rule, name: str, p: nn.Parameter) -> Rule:
        """The rule that ``p`` really follows: a projected one gives way to its inner rule where it compresses nothing.

        Raises:
            ValueError: that depends on whether ``p`` is a stack of matrices, which nobody has said.
        """
        stacked = True if id(p) in self.factors else _is_stack(self._owner(name), name, p)
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


# --- small helpers ---------------------------------------------------------------------------------------------------


def _excluded(use: Use) -> list[str]:
    return as_list(use.exclude_modules) if use.exclude_modules else []


def _covers(pattern: str, name: str) -> bool:
    """Whether ``pattern`` means the parameter ``name``, its module, or a module that holds it."""
    pieces = name.split(".")
    return any(name_matches(".".join(pieces[:end]), pattern) for end in range(1, len(pieces) + 1))


def _names_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return names


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
