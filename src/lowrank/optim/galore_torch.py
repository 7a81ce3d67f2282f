"""galore-torch's three optimizers, with its interface, its defaults and its trajectory: change one import line.

    from lowrank.optim import GaLoreAdamW      # was: from galore_torch import GaLoreAdamW
    GaLoreAdamW([{"params": others}, {"params": matrices, "rank": 128, "update_proj_gap": 200, "scale": 0.25,
                  "proj_type": "std"}], lr=0.01)

What makes the trajectory that one, and differs from ``Projected``'s defaults: exact SVD of the gradient in the
stored orientation, no aligning of signs, every layer refreshed in the same step, moments kept, epsilon added before
bias correction (AdamW), decay after the update (Adafactor: before it), a rank that does not compress projected all
the same. Arithmetic is float32 for narrower parameters, and bfloat16 parameters are rounded stochastically, where
galore-torch computes in their dtype.

What fails or does nothing there works here: vectors in a group with a rank follow the plain optimizer (a warning
says so once), tensors of more dimensions are read as (out, −1), ``reverse_std`` takes wide matrices, state is
tensors only and loads with ``weights_only=True`` in the dtypes that it was saved in, parameters may live on several
devices, and ``per_layer=True`` steps each parameter inside the backward pass and frees its gradient. The 8-bit one
needs no bitsandbytes and runs on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lowrank.linalg.rounding import wide
from lowrank.optim.adafactor import Adafactor
from lowrank.optim.galore_base import GaLoreOptimizer, Params, check_lr, step_of
from lowrank.optim.rules import AdamW, Rule, State, step_


class GaLoreAdamW(GaLoreOptimizer):
    """galore-torch's ``GaLoreAdamW`` (arXiv 2403.03507): AdamW as in transformers 4, projected where there is a rank.

    Args:
        params: tensors, (name, tensor) pairs, or groups; a group with ``rank`` may set ``update_proj_gap`` (200 steps),
            ``scale`` (0.25) and ``proj_type``: ``std`` (the short side, the default), ``reverse_std`` (the long one),
            ``left``, ``right`` or ``full``.
        lr: the learning rate.
        betas: decay of the first and of the second moment.
        eps: added to √v before bias correction.
        weight_decay: decoupled, applied after the update.
        correct_bias: False leaves bias correction out.
        no_deprecation_warning: accepted for galore-torch's sake, whose warning does not exist here.
        per_layer: step in the backward pass, freeing each gradient; ``step()`` then does nothing more.

    Raises:
        ValueError: a value out of range, an unknown ``proj_type``, a parameter given twice.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        *,
        per_layer: bool = False,
    ):
        check_lr(lr)
        AdamW(betas=tuple(betas), eps=eps)  # type: ignore[arg-type]  # its checks
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults, per_layer=per_layer)

    def _inner_rule(self, group: dict[str, Any], shape: tuple[int, ...]) -> Rule:
        return EarlyEpsAdam(betas=tuple(group["betas"]), eps=group["eps"], correct_bias=group["correct_bias"])


class GaLoreAdamW8bit(GaLoreOptimizer):
    """galore-torch's ``GaLoreAdamW8bit``: AdamW with its moments in this library's block-wise 8 bits.

    Args:
        params, lr, betas, eps, weight_decay: as in :class:`GaLoreAdamW`, with bitsandbytes' defaults; ``eps`` is added
            after bias correction, as in ``torch.optim.AdamW``.
        amsgrad, optim_bits, args, percentile_clipping, block_wise, is_paged: galore-torch's; only their defaults are
            supported.
        min_8bit_size: moments of fewer numbers stay float32.
        per_layer: as in :class:`GaLoreAdamW`.

    Raises:
        ValueError: as in :class:`GaLoreAdamW`, and where an unsupported option is not at its default.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: None = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        *,
        per_layer: bool = False,
    ):
        only = {"amsgrad": (amsgrad, False), "optim_bits": (optim_bits, 32), "args": (args, None)}
        only |= {"percentile_clipping": (percentile_clipping, 100), "block_wise": (block_wise, True)}
        for name, (given, default) in {**only, "is_paged": (is_paged, False)}.items():
            if given != default:
                raise ValueError(f"{name}={given!r} is not supported; leave it at {default!r}")
        check_lr(lr)
        AdamW(betas=tuple(betas), eps=eps)  # type: ignore[arg-type]  # its checks
        self._min_8bit_size = min_8bit_size
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, per_layer=per_layer)

    def _inner_rule(self, group: dict[str, Any], shape: tuple[int, ...]) -> Rule:
        narrow = math.prod(shape) >= self._min_8bit_size
        return AdamW(betas=tuple(group["betas"]), eps=group["eps"], storage="int8" if narrow else "float32")


class GaLoreAdafactor(GaLoreOptimizer):
    """galore-torch's ``GaLoreAdafactor``: Adafactor as in transformers, projected where a group has a rank.

    Args:
        params: as in :class:`GaLoreAdamW`.
        lr: the learning rate; None with ``relative_step``, which brings its own.
        eps, clip_threshold, decay_rate, beta1, scale_parameter, relative_step, warmup_init: as in
            :class:`~lowrank.optim.Adafactor`; clipping acts inside the subspace.
        weight_decay: decoupled, applied before the update.
        per_layer: as in :class:`GaLoreAdamW`.

    Raises:
        ValueError: as in :class:`GaLoreAdamW`; an ``lr`` beside ``relative_step``, neither of them, or ``warmup_init``
            without ``relative_step``.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        per_layer: bool = False,
    ):
        if lr is not None and relative_step:
            raise ValueError(
                f"lr={lr} cannot be combined with relative_step=True; pass relative_step=False, or lr=None"
            )
        if lr is None and not relative_step:
            raise ValueError("relative_step=False needs an lr")
        if warmup_init and not relative_step:
            raise ValueError("warmup_init=True needs relative_step=True")
        if lr is not None:
            check_lr(lr)
        defaults = {"lr": lr, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate, "beta1": beta1}
        defaults |= {"weight_decay": weight_decay, "scale_parameter": scale_parameter, "relative_step": relative_step}
        super().__init__(params, {**defaults, "warmup_init": warmup_init}, per_layer=per_layer)

    def _inner_rule(self, group: dict[str, Any], shape: tuple[int, ...]) -> Rule:
        return Adafactor(
            eps=tuple(group["eps"]),
            clip_threshold=group["clip_threshold"],
            decay_rate=group["decay_rate"],
            beta1=group["beta1"],
        )

    def _advance_(self, rule: Rule, target: Tensor, g: Tensor, state: State, group: dict[str, Any]) -> None:
        """As in the reference, the step size multiplies the decay too, and the first moment is one of whole steps."""
        lr = self._lr(target, state, group)
        inner = cast(State, state.get("inner", state))
        moment = cast("Tensor | None", inner.get("exp_avg"))
        if moment is not None:  # stored times the step size, as in the reference; the rule's own is without it
            moment.div_(lr)
        target.mul_(1 - lr * group["weight_decay"])
        step_(rule, [target], [g], [state], lr=lr, decay=0.0)
        if moment is not None:
            moment.mul_(lr)

    @staticmethod
    def _lr(target: Tensor, state: State, group: dict[str, Any]) -> float:
        lr = group["lr"]
        if group["relative_step"]:
            t = step_of(state) + 1
            lr = min(1e-6 * t if group["warmup_init"] else 1e-2, t**-0.5)
        if group["scale_parameter"]:
            rms = float(torch.linalg.vector_norm(target)) / target.numel() ** 0.5
            lr *= max(group["eps"][1], rms)
        return max(lr, 1e-30)  # a warm-up may start at 0, which the moment must survive


@dataclass(frozen=True, kw_only=True)
class EarlyEpsAdam:
    """Adam as in transformers 4: direction m / (√v + ε), gain √(1 − β₂ᵗ)/(1 − β₁ᵗ).

    State: 8 bytes a number in float32, and 8 for the step count.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    correct_bias: bool = True

    def init(self, like: Tensor) -> State:
        zeros = torch.zeros_like(like, dtype=wide(like.dtype))
        step = torch.zeros((), dtype=torch.int64, device="cpu")
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": step}

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        beta1, beta2 = self.betas
        m, v, step = (cast(Tensor, state[name]) for name in ("exp_avg", "exp_avg_sq", "step"))
        t = int(step.add_(1))
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        gain = math.sqrt(1 - beta2**t) / (1 - beta1**t) if self.correct_bias else 1.0
        return m / v.sqrt().add_(self.eps), gain
