"""What the three drop-ins for galore-torch share: groups with a rank, state made at the first step, hooks, loading."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from lowrank.infra.seeds import generator
from lowrank.linalg.basis import SVD
from lowrank.linalg.rounding import round_into_, wide
from lowrank.optim.projected import Projected
from lowrank.optim.refresh import copy_into_
from lowrank.optim.rules import AdamW, Rule, State, step_

SIDES = {"std": "short", "reverse_std": "long", "left": "left", "right": "right", "full": "both"}
DEFAULTS = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
Params = Iterable[Any]  # tensors, (name, tensor) pairs or group dicts, as torch.optim takes them


class GaLoreOptimizer(torch.optim.Optimizer):
    """The base of the three drop-ins: a group with ``rank`` is projected, its other keys default to galore-torch's."""

    def __init__(self, params: Params, defaults: dict[str, Any], *, per_layer: bool):
        if defaults["weight_decay"] < 0:
            raise ValueError(f"weight_decay={defaults['weight_decay']} must not be negative")
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
            round_into_(p.detach(), target, generator(p.device, "rounding", self._number(p), int(step_of(state))))

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
        step_(rule, [target], [g], [state], lr=group["lr"], decay=0.0)
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
            copy_into_(state, saved)
        except ValueError as error:
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


def step_of(state: State) -> int:
    return int(cast(Tensor, state["step"]))


def _check_group(group: dict[str, Any]) -> None:
    if group["proj_type"] not in SIDES:
        raise ValueError(f"proj_type={group['proj_type']!r} is unknown; it is one of {', '.join(SIDES)}")
    try:
        _projected(AdamW(), group["rank"], group["update_proj_gap"], group["scale"], group["proj_type"])
    except ValueError as error:
        raise ValueError(str(error).replace("refresh_every", "update_proj_gap")) from None


def check_lr(lr: float) -> None:
    if not lr >= 0:
        raise ValueError(f"lr={lr} must not be negative")
