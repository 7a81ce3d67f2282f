"""What a run changes in its weights, and how its bases move: for pictures, off the step's path.

    at the end       change = ‖Δ‖ / ‖W₀‖,  effective rank = exp(−Σ p log p),  p = σ(Δ) / Σ σ(Δ);   Δ = merged(W) − W₀
    at a refresh     the share of ‖G‖² in the basis, and its overlap with the one before (``optim.basis_fit``)

The effective rank is Roy and Vetterli's (EUSIPCO 2007). W₀ is kept from the start of a new run, in copies on the CPU of
at most ``NUMBERS`` numbers, a matrix of each group of layers in turn; a run that was resumed has none, and so no
figures. Nor has one of several ranks.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.layers import AdaptedLayer, matrix_of
from lowrank.adapters.targets import Layer, linear_layers
from lowrank.infra.files import write_json
from lowrank.optim.basis_fit import Noted, noting_refreshes
from lowrank.report.comparison import REFRESHED, SPECTRA
from lowrank.run.session import Session

NUMBERS = 1 << 23  # of the weights that are kept
WIDEST = 2048  # the short side of a matrix; its spectrum takes about a second there
_GROUPS = ("attention", "mlp", "lm_head", "classifier", "patch_embed")


class Spectra:
    """The weights of a run at its start, to be compared with those at its end."""

    def __init__(self, session: Session, *, kept: bool):
        """``kept``: whether the weights are those at the start, and all in this process."""
        self.model, self.refreshes = session.model, list[Noted]()
        self.before: list[tuple[Layer, Tensor]] = []
        left, trained = NUMBERS, _trained(session) if kept else {}
        layers = [layer for layer in _in_turn(session.model) if trained.get(layer.name)] if kept else []
        for layer in layers:
            numbers, short = layer.out_features * layer.in_features, min(layer.out_features, layer.in_features)
            if short <= WIDEST and numbers <= left:
                left -= numbers
                self.before.append((layer, matrix_of(layer.module).detach().to("cpu", copy=True)))
        self.trained: Counter[str] = Counter()
        for layer in layers:
            self.trained[_group(layer)] += trained[layer.name]

    def noting(self) -> AbstractContextManager[None]:
        """A context of a step, in which refreshes are noted."""
        return noting_refreshes(self.refreshes)

    def noted(self) -> dict[str, float]:
        """What the step's refreshes came to, for the log: means over its matrices; nothing where there were none."""
        both = [[value for each in self.refreshes if (value := each[at]) is not None] for at in (0, 1)]
        self.refreshes.clear()
        return {name: float(torch.stack(values).mean()) for name, values in zip(REFRESHED, both, strict=True) if values}

    def write(self, folder: Path) -> None:
        """``spectra.json``: by group of layers the means over its matrices, and how many numbers train there;
        none where there is nothing to say."""
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for layer, before in self.before:
            for name, value in figures(before, _now(self.model, layer).cpu()).items():
                found[_group(layer)][name].append(value)
        layers = {
            group: {name: statistics.fmean(values) for name, values in each.items()} | {"trained": self.trained[group]}
            for group, each in found.items()
        }
        write_json(folder / SPECTRA, {"layers": layers})


def figures(before: Tensor, after: Tensor) -> dict[str, float]:
    """``change`` and, of what has changed at all, ``effective_rank`` (module docstring) of a matrix.

    >>> found = figures(torch.eye(3), torch.diag(torch.tensor([2.0, 2.0, 1.0])))
    >>> {name: round(value, 3) for name, value in found.items()}
    {'change': 0.816, 'effective_rank': 2.0}
    """
    delta = after.double() - before.double()
    norm = float(delta.norm())
    found = {"change": norm / max(float(before.double().norm()), 1e-30)}
    if norm > 0:
        delta = delta if delta.shape[0] <= delta.shape[1] else delta.mT
        values = torch.linalg.eigvalsh(delta @ delta.mT).clamp_min(0).sqrt()
        shares = values / values.sum()
        found["effective_rank"] = float(torch.special.entr(shares).sum().exp())
    return found


def _trained(session: Session) -> Counter[str]:
    """Numbers that train in each linear layer, its adapters' among them."""
    found: Counter[str] = Counter()
    names = {layer.name for layer in linear_layers(session.model, adapted=True)}
    for row in session.plan.rows:
        if row.rule is not None:
            parts = row.name.split(".")
            owner = next((n for end in range(len(parts), 0, -1) if (n := ".".join(parts[:end])) in names), None)
            found[owner or ""] += row.numel
    return found


def _in_turn(model: nn.Module) -> list[Layer]:
    """The linear layers: the first of each group, then the second, …"""
    seen: Counter[str] = Counter()
    places: list[tuple[int, int, Layer]] = []
    for layer in linear_layers(model, adapted=True):
        places.append((seen[_group(layer)], len(places), layer))
        seen[_group(layer)] += 1
    return [layer for *_, layer in sorted(places, key=lambda place: place[:2])]


def _group(layer: Layer) -> str:
    return next((name for name in _GROUPS if name in layer.groups), "other")


@torch.no_grad()
def _now(model: nn.Module, layer: Layer) -> Tensor:
    """The layer's matrix as it computes now, adapters merged."""
    module: Any = model.get_submodule(layer.name)
    if not isinstance(module, AdaptedLayer):
        return matrix_of(module).detach()
    W = module.matrix.detach().float().clone()
    for part, adapter, rows in module.pieces():
        W[module.parts[part]] = adapter.merged(rows.float())
    return W
