"""What a run changed in its weights as a LoRA of PEFT, whatever method changed them.

    Δ = W − W0             of every linear layer, W merged
    B A                    the leading part of Δ's singular value decomposition (Eckart and Young, 1936)
    energy kept            Σ ‖B A‖² / Σ ‖Δ‖², norms of Frobenius

W0 is made again as the run made it (its folder or name, or its seed), and must be what it was: a run keeps the digests
of what it started from in ``base.json``. Norms, biases and embeddings that were trained, and output layers that were
new, are saved whole.

Shapes: W and Δ (out, in), A (rank, in), B (out, rank).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.adapters import merge_and_unload
from lowrank.adapters.layers import dequantise_, is_conv1d, is_linear
from lowrank.infra.text import some
from lowrank.interop.adapter_bank import ADAPTER, restored_for
from lowrank.interop.peft import Change, base_place, write_changes
from lowrank.run.session import Base, Session, open_session, run_folder


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a LoRA keeps of a change: the rank of each layer, the share of the energy, the modules saved whole."""

    ranks: Mapping[str, int]
    energy: float
    whole: tuple[str, ...]

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
        share = f"{self.energy:.1%}" if self.energy < 0.9995 else f"{self.energy:.4%}"
        text = f"a LoRA of {ranks} on {len(self.ranks)} layers that keeps {share} of what changed in them"
        return f"{text}; saved whole: {some(self.whole)}" if self.whole else text


def export_difference(
    source: Path, out: Path, *, which: str = "best", rank: int | None = None, energy: float | None = None
) -> tuple[int, Kept]:
    """Write what a run changed in its weights as a LoRA for PEFT; returns the checkpoint's step and what was kept.

    Args:
        source: a run's folder or one of its checkpoints.
        out: the adapter's folder; must be empty or missing.
        which: best or latest.
        rank: of every layer, or
        energy: the share of each layer's ‖Δ‖² to keep; 1 keeps all but the rounding of the weights.

    Raises:
        FileExistsError: ``out`` is not empty.
        FileNotFoundError: the base is gone.
        ValueError: the base is not what it was, a number out of its range, or nothing that PEFT could say.
    """
    _check(rank, energy)
    session, step = restored_for(out, source, which)
    base = base_weights(run_folder(source), session)
    place = base_place(session.run.model)
    kept = write_difference(merge_and_unload(session.model), base, out, rank=rank, energy=energy, place=place)
    return step, kept


def base_weights(root: Path, session: Session) -> dict[str, Tensor]:
    """The weights from which the run in ``root`` started, made anew and compared with what they were."""
    told = Base.read(root)
    start = Path(told.init_from) if told is not None and told.init_from else None
    run = replace(session.run, device="cpu")
    try:
        fresh = open_session(run, init_from=start, data=session.data, with_base=True)
    except OSError as error:
        raise FileNotFoundError(f"the base that {root} started from is not to be had: {error}") from error
    if told is None:
        warnings.warn(
            f"{root} was written before runs kept digests of their base: it is taken to be as it was", stacklevel=3
        )
    elif fresh.base is not None and fresh.base.parameters != told.parameters:
        now = fresh.base.parameters
        other = [name for name, wanted in told.parameters.items() if now.get(name) != wanted]
        where = told.init_from or run.model.args.get("path") or f"{run.model.name} drawn from seed {run.seed}"
        raise ValueError(
            f"the base of {root} has changed since it was trained: {len(other)} of {len(told.parameters)} weights of "
            f"{where} differ, {some(other)}; without the base as it was there is no difference to it"
        )
    model = dequantise_(fresh.model)
    return {name: p.detach() for name, p in model.named_parameters() if ADAPTER not in name}


def write_difference(
    model: nn.Module,
    base: Mapping[str, Tensor],
    folder: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    place: str = "",
) -> Kept:
    """Write how ``model`` differs from ``base`` as a folder that ``PeftModel.from_pretrained`` opens.

    Args:
        model: a plain model, trained.
        base: its parameters by name, as they were before.
        folder: is made; files of the same names are overwritten.
        rank, energy: one of them, as in :func:`export_difference`.
        place: where the base is, for PEFT to find it.

    Raises:
        ValueError: no linear layer differs, or a parameter that PEFT could not save.
    """
    _check(rank, energy)
    known = dict(model.named_parameters())
    trained = {name for name, p in known.items() if not torch.equal(p.detach().cpu(), base[name].cpu())}
    changes, shares = {}, []
    for name in _linear_layers(model, trained):
        module = model.get_submodule(name)
        W, before = (_matrix(module, each).double() for each in (known[f"{name}.weight"], base[f"{name}.weight"]))
        rounding = float(torch.finfo(known[f"{name}.weight"].dtype).eps ** 2 * W.square().sum())
        A, B, whole, left = leading_part(W - before.to(W.device), rank=rank, energy=energy, rounding=rounding)
        changes[name] = Change(A.float(), B.float())
        shares.append((whole, left))
    if not changes:
        raise ValueError("no linear layer differs from the base, so that there is nothing to write as a LoRA")
    rest = trained - {f"{name}.weight" for name in changes}
    saved = write_changes(Path(folder), model, changes, rest, base=place)
    whole, left = map(sum, zip(*shares, strict=True))
    ranks = {name: change.A.shape[0] for name, change in changes.items()}
    return Kept(ranks=ranks, energy=max(0.0, 1 - left / whole), whole=tuple(saved))


def leading_part(
    delta: Tensor, *, rank: int | None = None, energy: float | None = None, rounding: float = 0.0
) -> tuple[Tensor, Tensor, float, float]:
    """A (r, in), B (out, r), ‖Δ‖² and what B A leaves of it, by the eigenvectors of Δ's Gram matrix on the short side.

    Args:
        delta: Δ (out, in), float64.
        rank: r, or the smaller side where that is less; or
        energy: r is the least that leaves at most (1 − energy) ‖Δ‖², or ``rounding`` where that is more.
    """
    wide = delta if delta.shape[0] <= delta.shape[1] else delta.mT
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = float(delta.square().sum())
    left = (total - values.cumsum(0)).clamp(min=0)
    if rank is None:
        allowed = max((1 - float(energy or 1)) * total, rounding)
        rank = 1 + int((left > allowed).sum())
    rank = min(rank, len(values))
    U = vectors[:, :rank]
    root = values[:rank].sqrt().sqrt()  # each factor gets half of a singular value
    root = root.clamp(min=1e-6 * float(root[0]))  # below it is rounding
    B, A = U * root, (U.mT @ wide) / root[:, None]
    if wide is not delta:
        A, B = B.mT, A.mT
    return A, B, total, float(left[rank - 1])


def _linear_layers(model: nn.Module, trained: set[str]) -> list[str]:
    """The layers whose changed weight can be a LoRA: not where it is an embedding's too, nor a new output layer, of
    which others will have drawn another."""
    known = dict(model.named_parameters())
    loaded = any(getattr(p, "_lowrank_loaded", False) for p in known.values())
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    chosen = []
    for name, module in model.named_modules():
        weight = known.get(f"{name}.weight")
        if weight is None or f"{name}.weight" not in trained or not is_linear(module) or id(weight) in tables:
            continue
        if not (loaded and getattr(weight, "_lowrank_loaded", None) is False):
            chosen.append(name)
    return chosen


def _matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight of ``module`` as (out, in)."""
    weight = weight.detach()
    return weight.mT if is_conv1d(module) else weight.flatten(1)


def _check(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise ValueError("give one of rank and energy")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy} must lie above 0 and at most at 1: it is a share, such as 0.9")
