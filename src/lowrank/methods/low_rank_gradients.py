"""Methods with low-rank gradients: every weight is trained, the optimizer's state lives in a moving subspace.

All are one rule, ``lowrank.optim.Projected``, with different values in its slots. ``target_modules`` are the
matrices that are projected (by default every linear layer but the output, as in the papers' codes); everything else
follows plain AdamW, at the run's full learning rate. ``embeddings`` chooses the rule of the embeddings and the output
layer, which are up to half of a small model: ``adamw`` (as published), ``adamw8bit`` or ``project``. ``basis`` is
``power`` (warm power iteration), ``svd`` (exact) or ``gaussian`` (random).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from lowrank.adapters.targets import Targets
from lowrank.infra.checks import check_choice
from lowrank.infra.registry import register
from lowrank.infra.signatures import also
from lowrank.linalg.basis import SVD, Basis, Gaussian, PowerIteration
from lowrank.methods.groups import groups
from lowrank.methods.method import Method, Rest, Use
from lowrank.optim.adafactor import Adafactor
from lowrank.optim.lifts import Rescale, Residual, Signed
from lowrank.optim.moment_transport import ErrorFeedback, Transport
from lowrank.optim.muon import Muon
from lowrank.optim.pairs import PairRule
from lowrank.optim.projected import Projected, ProjectedSide
from lowrank.optim.refresh_clock import Lazy
from lowrank.optim.rules import AdamW, Rule
from lowrank.optim.storage import BasisStorage

BasisName = Literal["power", "svd", "gaussian"]
Embeddings = Literal["adamw", "adamw8bit", "project"]
_BASES: dict[str, Basis] = {"power": PowerIteration(), "svd": SVD(), "gaussian": Gaussian()}


def basis_named(name: str) -> Basis:
    """The basis that a method's ``basis`` names; ValueError for another word."""
    check_choice("basis", name, _BASES)
    return _BASES[name]


def projected(
    *, embeddings: Embeddings = "adamw", exclude_modules: Targets = (), rest: Rest = "train", freeze: Targets = ()
) -> Callable[[Method], Method]:
    """What these methods share: the rule of the embeddings, which matrices are left out, and all else."""

    def chosen(method: Method) -> Method:
        matrices, *others = method.rules
        matrices = replace(matrices, exclude_modules=exclude_modules)
        rules = (matrices, *embedding_rules(embeddings, matrices.rule), *others)
        return replace(method, rules=rules, rest=rest, freeze=freeze)

    return chosen


@register("method", family="projected")
@also(projected, groups)
def galore(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 128,
    refresh_every: int = 200,
    scale: float = 0.25,
    basis: BasisName = "power",
    side: ProjectedSide = "short",
    transport: Transport = "keep",
    lazy: bool = False,
) -> Method:
    """GaLore (Zhao et al., arXiv 2403.03507): AdamW in the leading singular subspace of the gradient.

    The basis is refreshed every ``refresh_every`` steps, by warm power iteration (``basis="svd"`` decomposes exactly,
    at many times the cost). ``transport`` says what becomes of the moments at a refresh: ``keep`` them as the reference
    does, ``rotate`` them into the new basis, or ``reset`` them. ``lazy`` refreshes less often where the subspace stands
    still (Q-GaLore, arXiv 2407.08296). The paper's learning rate is 0.01, which is multiplied by ``scale`` for
    projected matrices.
    """
    rule = Projected(
        rank=rank,
        refresh_every=refresh_every,
        scale=scale,
        basis=basis_named(basis),
        side=side,
        transport=transport,
        lazy=Lazy() if lazy else None,
    )
    return _method("galore", rule, target_modules)


@register("method", family="projected")
@also(projected, groups, embeddings="adamw8bit")
def galore_8bit(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 128,
    refresh_every: int = 200,
    scale: float = 0.25,
    basis: BasisName = "power",
    basis_storage: BasisStorage = "float32",
    lazy: bool = False,
) -> Method:
    """8-bit GaLore (Zhao et al., arXiv 2403.03507, section 4.3): GaLore with AdamW's moments in block-wise int8.

    ``basis_storage="int4"`` with ``lazy=True`` is Q-GaLore's state (arXiv 2407.08296), without its quantised weights.
    """
    rule = Projected(
        inner=AdamW(storage="int8"),
        rank=rank,
        refresh_every=refresh_every,
        scale=scale,
        basis=basis_named(basis),
        basis_storage=basis_storage,
        lazy=Lazy() if lazy else None,
    )
    return _method("galore_8bit", rule, target_modules)


@register("method", family="projected")
@also(projected, groups)
def galore_adafactor(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 128,
    refresh_every: int = 200,
    scale: float = 0.25,
    basis: BasisName = "power",
) -> Method:
    """GaLore with Adafactor (Zhao et al., arXiv 2403.03507; Shazeer and Stern, arXiv 1804.04235) in the subspace."""
    rule = Projected(inner=Adafactor(), rank=rank, refresh_every=refresh_every, scale=scale, basis=basis_named(basis))
    return _method("galore_adafactor", rule, target_modules)


@register("method", family="projected")
@also(projected, groups)
def apollo(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 128,
    refresh_every: int = 200,
    scale: float = 1.0,
    basis: BasisName = "gaussian",
) -> Method:
    """APOLLO (Zhu et al., arXiv 2412.05270): the raw gradient, each channel scaled as in a random subspace.

    The subspace only estimates each channel's step length; the gradient is the direction.
    """
    rule = Projected(rank=rank, refresh_every=refresh_every, scale=scale, basis=basis_named(basis), lift=Rescale())
    return _method("apollo", rule, target_modules)


@register("method", family="projected")
@also(projected, groups)
def apollo_mini(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 1,
    refresh_every: int = 200,
    scale: float = 128.0,
    basis: BasisName = "gaussian",
) -> Method:
    """APOLLO-Mini (Zhu et al., arXiv 2412.05270): rank 1 and one step length for the whole matrix, times √scale.

    ``scale`` is under a root as in the authors' code, whose default of 128 it keeps.
    """
    rule = Projected(
        rank=rank,
        refresh_every=refresh_every,
        scale=scale**0.5,
        basis=basis_named(basis),
        lift=Rescale(scope="tensor"),
    )
    return _method("apollo_mini", rule, target_modules)


@register("method", family="projected")
@also(projected, groups)
def fira(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 128,
    refresh_every: int = 200,
    scale: float = 0.25,
    basis: BasisName = "power",
) -> Method:
    """Fira (Chen et al., arXiv 2410.01623): GaLore, plus the gradient outside the subspace at the inside's step length.

    ``scale`` multiplies both (the paper's α).
    """
    rule = Projected(rank=rank, refresh_every=refresh_every, scale=scale, basis=basis_named(basis), lift=Residual())
    return _method("fira", rule, target_modules)


@register("method", family="projected")
@also(projected, groups)
def galore_muon(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 128,
    refresh_every: int = 200,
    scale: float = 1.0,
    momentum: float = 0.95,
    basis: BasisName = "power",
    side: ProjectedSide = "short",
) -> Method:
    """Muon inside GaLore's subspace (Zhao et al., arXiv 2403.03507; Liu et al., arXiv 2502.16982).

    The momentum is kept and orthogonalised as a matrix of ``rank`` rows, and rotated into each new basis. Steps are as
    long as Muon's on a matrix of that size, and ``scale`` multiplies them.
    """
    rule = Projected(
        inner=Muon(momentum=momentum),
        rank=rank,
        refresh_every=refresh_every,
        scale=scale,
        basis=basis_named(basis),
        side=side,
        transport="keep" if basis == "gaussian" else "rotate",
    )
    return _method("galore_muon", rule, target_modules)


@register("method", family="projected")
@also(projected, groups)
def ldadam(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 16,
    scale: float = 1.0,
    follow: float = 0.908,
) -> Method:
    """LDAdam (Robert et al., arXiv 2410.16103): a new subspace at every step, moments carried over, error feedback.

    The basis follows a mean of gradient and momentum (ρ = ``follow``) by one power iteration a step; what it leaves
    out, and what the momentum loses as the basis turns, is added to the next gradient. As in the paper's algorithm 1,
    but for the first basis, from a random sketch of the gradient and not its SVD.
    """
    rule = Projected(
        inner=AdamW(betas=(0.908, 0.99)),
        rank=rank,
        refresh_every=1,
        scale=scale,
        basis=PowerIteration(iterations=1),
        transport="statistics",
        error_feedback=ErrorFeedback(moments=True),
        follow=follow,
    )
    return _method("ldadam", rule, target_modules)


@register("method", family="projected")
@also(projected, groups)
def frugal(
    target_modules: Targets = "all-linear",
    *,
    rank: int = 128,
    refresh_every: int = 200,
    scale: float = 1.0,
    outside: float = 1.0,
    basis: BasisName = "power",
) -> Method:
    """FRUGAL (Zmushko et al., arXiv 2411.07837): AdamW inside the subspace, sign descent outside, which has no state.

    The steps outside are ``outside`` learning rates long. Moments begin anew at each refresh, as in the paper, whose
    main runs take whole blocks of the model in turn for the subspace; here, as in its variant by SVD, each matrix has
    one.
    """
    rule = Projected(
        rank=rank,
        refresh_every=refresh_every,
        scale=scale,
        basis=basis_named(basis),
        lift=Signed(outside=outside),
        transport="reset",
    )
    return _method("frugal", rule, target_modules)


def _method(name: str, rule: Projected, target_modules: Targets) -> Method:
    return Method(name=name, rules=(Use(target_modules, rule), Use("*", AdamW())))


def embedding_rules(embeddings: Embeddings, rule: Rule | PairRule) -> tuple[Use, ...]:
    """The rule of embeddings and output layer; empty where that is the catch-all's AdamW.

    Raises:
        ValueError: an unknown choice.
    """
    chosen: dict[str, Rule | PairRule | None] = {"adamw": None, "adamw8bit": AdamW(storage="int8"), "project": rule}
    check_choice("embeddings", embeddings, Embeddings)
    found = chosen[embeddings]
    return () if found is None else (Use("embeddings", found),)
