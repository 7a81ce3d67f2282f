"""Low-rank weights and low-rank gradients together: LoRA-the-Explorer with GaLore (arXiv 2402.16828 and 2403.03507).

The ancestors of this library set out to combine the two and never ran it; there is no paper. Two senses are offered:

    mixed      LTE heads on some layers (attention), projected AdamW on the other matrices: each method where it saves
               most
    explorers  every head is a full-rank local change D of W, trained on its own shard by projected AdamW: what a head
               adds between two merges has low rank all the same, because its basis is refreshed only at merges

Explorers share one basis Q: in the first step after a merge, with G_h the gradient of head h,

    Q ← orth(Σ_h G_h G_hᵀ Q), twice      (``basis="svd"``: the leading eigenvectors of Σ_h G_h G_hᵀ; "gaussian": drawn)

which keeps the most of Σ_h ‖QᵀG_h‖² (on the right side with transposes). Over several ranks the sum is over the heads
of all of them, so that it is the basis that one process with all heads finds, and nobody's whole gradient travels. As
every D_h then lies in the span of Q, at a merge QᵀD_h is all of it: the sum of rank·long numbers travels instead of
out·in. Where rank does not compress a matrix its heads follow AdamW, and their changes travel dense.
"""

from __future__ import annotations

from typing import Literal

from lowrank.adapters import Dense, LoRA, Merge
from lowrank.adapters.targets import Targets
from lowrank.infra.checks import check_choice
from lowrank.infra.registry import register
from lowrank.infra.signatures import also
from lowrank.methods.groups import adapted, groups, merged
from lowrank.methods.low_rank_gradients import BasisName, Embeddings, basis_named, embedding_rules
from lowrank.methods.method import FACTORS, Adapt, Method, Use
from lowrank.optim.projected import Projected
from lowrank.optim.rules import AdamW, Rule

Kind = Literal["mixed", "explorers"]


@register("method", family="both")
@also(merged, adapted, groups, rest="train")
def lte_galore(
    kind: Kind = "mixed",
    *,
    target_modules: Targets = "attention",
    rank: int = 4,
    heads: int = 4,
    alpha: float | None = None,
    merge_every: int = 10,
    galore_modules: Targets = "all-linear",
    galore_rank: int = 128,
    refresh_every: int = 200,
    scale: float = 0.25,
    basis: BasisName = "power",
    embeddings: Embeddings = "adamw",
) -> Method:
    """LTE + GaLore (Huh et al., arXiv 2402.16828; Zhao et al., 2403.03507): heads on some matrices, GaLore on others.

    Args:
        kind: what a head is: ``mixed`` a LoRA of rank ``rank`` trained by AdamW; ``explorers`` a dense change trained
            by projected AdamW of rank ``rank``, its basis refreshed at every merge.
        target_modules, rank, heads, merge_every: of the heads, as in ``lte``.
        outer_lr, outer_momentum, exchange, weigh: of their merges, as in ``lte``.
        alpha: of the LoRA heads, 4·rank where None; explorers have none.
        galore_modules, galore_rank, refresh_every: the matrices without heads that are projected, the rank and the
            steps between refreshes of their bases.
        scale: of every projected step.
        basis: of every projected matrix, ``power``, ``svd`` or ``gaussian``.
        embeddings: the rule of embeddings and output layer, as in ``galore``.
        exclude_modules, rest, ties, freeze: as in every method.
        rest_every: over several ranks with rest="local", steps between two averages of the rest.

    Raises:
        ValueError: an unknown kind, or an alpha for explorers.
    """
    check_choice("kind", kind, Kind)
    if kind == "explorers" and alpha is not None:
        raise ValueError(f"alpha={alpha} is LoRA's scale; explorers have none: leave it out, and see scale=")
    elsewhere = Projected(rank=galore_rank, refresh_every=refresh_every, scale=scale, basis=basis_named(basis))
    if kind == "mixed":
        make: LoRA | Dense = LoRA(
            rank=rank, alpha=4.0 * rank if alpha is None else alpha, heads=heads, split=True, init="orthogonal"
        )
        inside: Rule = AdamW()
    else:
        make = Dense(heads=heads, split=True)
        inside = Projected(
            rank=rank, refresh_every=merge_every, scale=scale, basis=basis_named(basis), stagger=False, one_basis=True
        )
    return Method(
        name="lte_galore",
        adapt=(Adapt(target_modules, make),),
        rules=(
            Use(FACTORS, inside, decay=False),
            Use(galore_modules, elsewhere),
            *embedding_rules(embeddings, elsewhere),
            Use("*", AdamW()),
        ),
        merge=Merge(merge_every),
    )
