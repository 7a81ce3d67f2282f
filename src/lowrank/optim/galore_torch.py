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
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from lowrank.infra.checks import check_choice
from lowrank.infra.seeds import generator
from lowrank.linalg.basis import SVD
from lowrank.linalg.rounding import round_into_, wide
from lowrank.optim.adafactor import Adafactor
from lowrank.optim.projected import Projected
from lowrank.optim.refresh_clock import count
from lowrank.optim.rules import AdamW, Rule, State
from lowrank.optim.state import matched

SIDES = {"std": "short", "reverse_std": "long", "left": "left", "right": "right", "full": "both"}
DEFAULTS = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
Params = Iterable[Any]  # tensors, (name, tensor) pairs or group dicts, as torch.optim takes them


class GaLoreOptimizer(torch.optim.Optimizer):
    """The base of the three drop-ins: a group with ``rank`` is projected, its other keys default to galore-torch's."""

    def __init__(self, params: Params, defaults: dict[str, Any], *, per_layer: bool):
        for name in ("lr", "weight_decay"):
            if defaults[name] is not None and not defaults[name] >= 0:
                raise ValueError(f"{name}={defaults[name]} must not be negative")
        self._per_layer = per_layer
        self._warned = False
        self._numbers: dict[Tensor, int] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "rank" in param_group:
            param_group = {**DEFAULTS, **param_group}
            _check_group(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if len(set(map(id, group["params"]))) < len(group["params"]):
            raise ValueError("a parameter is given twice in one group; give each once")
        if self._per_layer:
            for p in group["params"]:
                self._hooks.append(p.register_post_accumulate_grad_hook(self._step_and_free(group)))

    def _step_and_free(self, group: dict[str, Any]) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            self._step_one(p, group)
            p.grad = None

        return hook

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss. With ``per_layer`` the backward pass has stepped them all already.

        Raises:
            RuntimeError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._per_layer:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self._step_one(p, group)
        return loss

    @torch.no_grad()
    def _step_one(self, p: Tensor, group: dict[str, Any]) -> None:
        g = cast(Tensor, p.grad)
        if g.is_sparse:
            raise RuntimeError("GaLore needs dense gradients: make the embedding with sparse=False")
        rule = self._rule_for(p, group)
        if not self.state[p]:
            self.state[p] = rule.init(p)
        state = self.state[p]
        target = p.detach().to(wide(p.dtype))
        self._advance_(rule, target, g.to(target.dtype), state, group)
        if target.dtype is not p.dtype:
            round_into_(p.detach(), target, generator(p.device, "rounding", self._number(p), count(state, "step")))

    def _number(self, p: Tensor) -> int:
        """Which parameter it is, in the order of the groups: parameters that are alike round each in its own way."""
        if p not in self._numbers:
            every = [q for group in self.param_groups for q in group["params"]]
            self._numbers = {q: number for number, q in enumerate(every)}
        return self._numbers[p]

    def _rule_for(self, p: Tensor, group: dict[str, Any]) -> Rule:
        if "rank" not in group:
            return self._inner_rule(group, tuple(p.shape))
        options = group["rank"], group["update_proj_gap"], group["scale"], group["proj_type"]
        inside = _projected(AdamW(), *options).inside_shape(tuple(p.shape))
        if p.dim() < 2 and not self._warned:
            self._warned = True
            warnings.warn(
                "a group with a rank holds vectors, which cannot be projected; they follow the plain optimizer "
                "(said once)",
                stacklevel=4,
            )
        inner: Any = self._inner_rule(group, inside)
        return _projected(inner, *options)

    @abstractmethod
    def _inner_rule(self, group: dict[str, Any], shape: tuple[int, ...]) -> Rule:
        """The rule for a parameter whose state has ``shape``."""

    def _advance_(self, rule: Rule, target: Tensor, g: Tensor, state: State, group: dict[str, Any]) -> None:
        """One step of a float32 or float64 parameter."""
        rule.apply_([target], [g], [state], lr=group["lr"], decay=0.0)
        target.mul_(1 - group["lr"] * group["weight_decay"])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; tensors keep the dtypes that they were saved in.

        Raises:
            ValueError: a checkpoint of galore-torch, or state of another method or shape; nothing was changed.
        """
        states = self._states_from(state_dict)  # all checks come before any change
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(states)

    def _states_from(self, state_dict: dict[str, Any]) -> dict[Tensor, State]:
        states: dict[Tensor, State] = {}
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            missing = group.keys() - saved_group.keys() - {"params", "param_names", "initial_lr"}
            if missing or len(group["params"]) != len(saved_group["params"]):
                raise ValueError(
                    "the saved state is of another method or model: its groups lack "
                    f"{', '.join(sorted(missing)) or 'some parameters'}; load it into the optimizer that it came from"
                )
            for key, p in zip(saved_group["params"], group["params"], strict=True):
                if key in state_dict["state"]:
                    states[p] = self._state_from(state_dict["state"][key], p, {**group, **saved_group}, key)
        return states

    def _state_from(self, saved: dict[str, Any], p: Tensor, group: dict[str, Any], key: int) -> State:
        if "projector" in saved:
            raise ValueError(
                f"the state of parameter {key} holds a pickled projector: it is galore-torch's checkpoint, whose "
                "optimizer state is code and not tensors. Load the model's weights from it and start the optimizer "
                "anew; its moments are learnt again within about 1/(1 - beta2) steps"
            )
        state = self._rule_for(p, group).init(p)
        try:
            for mine, theirs in matched(state, saved, f"parameter {key}"):
                mine.copy_(theirs)
        except (ValueError, AttributeError) as error:  # some keep numbers that are no tensors
            raise ValueError(f"the saved state of parameter {key} is of another method or shape: {error}") from None
        return state


@lru_cache(maxsize=256)
def _projected(inner: Any, rank: int, update_proj_gap: int, scale: float, proj_type: str) -> Projected:
    return Projected(
        inner=inner,
        rank=rank,
        basis=SVD(align=False),
        refresh_every=update_proj_gap,
        scale=scale,
        side=cast(Any, SIDES[proj_type]),
        stagger=False,
        stack=False,
        fallback=False,
    )


def _check_group(group: dict[str, Any]) -> None:
    check_choice("proj_type", group["proj_type"], SIDES)
    try:
        _projected(AdamW(), group["rank"], group["update_proj_gap"], group["scale"], group["proj_type"])
    except ValueError as error:
        raise ValueError(str(error).replace("refresh_every", "update_proj_gap")) from None


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
        AdamW(betas=tuple(betas), eps=eps)  # type: ignore[arg-type]  # its checks
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults, per_layer=per_layer)

    def _inner_rule(self, group: dict[str, Any], shape: tuple[int, ...]) -> Rule:
        return EarlyEpsAdam(betas=tuple(group["betas"]), eps=group["eps"], correct_bias=group["correct_bias"])


class GaLoreAdamW8bit(GaLoreOptimizer):
    """galore-torch's ``GaLoreAdamW8bit``: AdamW with its moments in this library's block-wise 8 bits.

    Args:
        params, lr, betas, eps, weight_decay: as in ``GaLoreAdamW``, with bitsandbytes' defaults; ``eps`` is added
            after bias correction, as in ``torch.optim.AdamW``.
        amsgrad, optim_bits, args, percentile_clipping, block_wise, is_paged: galore-torch's; only their defaults are
            supported.
        min_8bit_size: moments of fewer numbers stay float32.
        per_layer: as in ``GaLoreAdamW``.

    Raises:
        ValueError: as in ``GaLoreAdamW``, and where an unsupported option is not at its default.
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
        params: as in ``GaLoreAdamW``.
        lr: the learning rate; None with ``relative_step``, which brings its own.
        eps, clip_threshold, decay_rate, beta1, scale_parameter, relative_step, warmup_init: as in
            ``lowrank.optim.Adafactor``; clipping acts inside the subspace.
        weight_decay: decoupled, applied before the update.
        per_layer: as in ``GaLoreAdamW``.

    Raises:
        ValueError: as in ``GaLoreAdamW``; an ``lr`` beside ``relative_step``, neither of them, or ``warmup_init``
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
        rule.apply_([target], [g], [state], lr=lr, decay=0.0)
        if moment is not None:
            moment.mul_(lr)

    @staticmethod
    def _lr(target: Tensor, state: State, group: dict[str, Any]) -> float:
        lr = group["lr"]
        if group["relative_step"]:
            t = count(state, "step") + 1
            lr = min(1e-6 * t if group["warmup_init"] else 1e-2, t**-0.5)
        if group["scale_parameter"]:
            rms = float(torch.linalg.vector_norm(target)) / target.numel() ** 0.5
            lr *= max(group["eps"][1], rms)
        return max(lr, 1e-30)  # a warm-up may start at 0, which the moment must survive


@dataclass(frozen=True, kw_only=True)
class EarlyEpsAdam(Rule):
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
