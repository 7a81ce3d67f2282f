"""Which layer gets which adapter: the first match wins, ties are settled, and only then is the model changed."""

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
    check_embedding,
    is_conv1d,
    matrix_of,
    quantised_layers,
    replace,
    size_of,
)
from lowrank.adapters.targets import Layer
from lowrank.distributed.workers import ProcessLayout
from lowrank.methods import Adapt, Method


class Placement:
    """The adapters of a method on a model: ``place`` decides, checks and puts them in, ``undo`` takes all back.

    Attributes:
        adapters: by the label of what they adapt.
        under, factors, split: ids of the weights under adapters, of the adapters' parameters, and of those whose heads
            are divided between workers.
        told: ids of tied weights that ``notes`` speak of.
    """

    def __init__(self, model: nn.Module, method: Method, seed: int, layout: ProcessLayout):
        self.model, self.method, self.seed, self.layout = model, method, seed, layout
        self.layers = targets.linear_layers(model)
        self.names_of = names_by_parameter(model)
        self.quantised = {id(layer.weight): size_of(layer) for layer in quantised_layers(model).values()}
        if self.quantised:
            method.check_quantised()
        self.claims: dict[str, dict[str, Adapt]] = {}
        self.adapters: dict[str, Adapter] = {}
        self.under: set[int] = set()
        self.factors: set[int] = set()
        self.split: set[int] = set()
        self.told: set[int] = set()
        self.notes: list[str] = []
        self.left: dict[str, str] = {}
        self.undoing: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Put the model back as it was before ``place``."""
        for action in reversed(self.undoing):
            action()

    def place(self) -> None:
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
            others = [n for n in self.names_of[id(weight)] if self.owner(n) is not layer.module]
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
        self.names_of = names_by_parameter(self.model)
        self.notes.append(
            f"{layer.name} was untied from {', '.join(others)}: {old.numel():,} more parameters (ties='untie')"
        )

    def _check_tied(self, layer: Layer, others: Sequence[str]) -> None:
        if WHOLE not in self.claims[layer.name]:
            raise ValueError(
                f"{layer.name} is tied to {others[0]} and cannot be adapted by parts; target the whole layer"
            )
        for name in others:
            module, transposed = self.owner(name), is_conv1d(layer.module)
            if type(module) is nn.Embedding and not transposed:
                check_embedding(module, name)
            elif not targets.is_linear(module) or is_conv1d(module) != transposed:
                raise ValueError(
                    f"{layer.name} is tied to {name} of a {type(module).__name__}, which cannot share an adapter; "
                    "use ties='leave' or ties='untie'"
                )

    def owner(self, name: str) -> nn.Module:
        """The module that holds the parameter of that name."""
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


def names_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    """Every name of a parameter, by its id."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return names
