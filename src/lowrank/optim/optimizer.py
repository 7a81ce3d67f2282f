"""The one optimizer: it runs the rules, at the end of a backward pass or inside it.

Every group of parameters has a rule (``rules``), a learning rate and a decay. ``step()`` is

    p.grad → clip (per layer, on request) → rule → p ← p(1 − lr·decay) − lr·gain·direction → synchroniser(step)

where ``lr = group["lr"] · group["lr_ratio"] · schedule(steps done)`` and ``synchroniser`` merges adapters into the
weights when that is due, so that nobody can forget to.

Per layer (``per_layer=True``) the same step runs in a hook as soon as a parameter's gradient is complete, which is then
freed: only one layer's gradient exists at a time (LOMO, arXiv 2306.09782; GaLore, arXiv 2403.03507, section 4.3). The
result equals the ordinary step's, bitwise. With ``accumulate=K`` the hook waits for the K-th micro-batch; a rule whose
coming step needs only R = QᵀG (``accumulates_projected``) keeps that between micro-batches, every other ``p.grad``.
A rule that sees both factors of an adapter (``optim.pairs``) steps them when the second gradient has come.

Over several ranks gradients are summed before the step (each rank divides its loss by the global batch, so that the sum
is the mean's gradient), each over the ranks that ``summed`` gives for its parameter: plain sums of our own gradients
after the backward pass, in buckets, and not DDP, whose reducer knows only the parameters that it was wrapped round,
sums within the backward pass whatever the rule, and has no place where R could stand for G. Such a rule sends
R = QᵀG, rank-sized, and the basis is refreshed from the one summed G. Per layer the sum is in the hook;
otherwise, on request, it is overlapped with the backward pass (``gradient_sync``).

Of a parameter that is sharded (FSDP2) all that is seen here is this rank's shard: of the parameter, the gradient that
FSDP has summed, and the state (``optim.sharded`` says what each rule makes of that).

State is made when the optimizer is, so that it costs what the plan said from the first moment on. ``state_dict()``
hands out its tensors themselves, as torch does: they change with the next step. It is loaded only where rules, names,
shapes and dtypes agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank.distributed.collectives import Group
from lowrank.distributed.process_group import ProcessGroup
from lowrank.distributed.shards import shard_of, to_local
from lowrank.linalg.subspace import Subspace
from lowrank.optim.gradient_sync import OverlappedSums, agree_bases_, sum_gradients_
from lowrank.optim.pairs import PairRule, rule_of_each
from lowrank.optim.per_layer import LayerSteps
from lowrank.optim.rules import Rule, check_rule
from lowrank.optim.scaler import LayerScaler
from lowrank.optim.sharded import on_shard
from lowrank.optim.state import check_forgets, find_saved, forget_smallest_, leaves, mapped, matched
from lowrank.optim.stepper import Stepper

_HOOKS = WeakTensorKeyDictionary()  # parameter -> its hook: that of the last optimizer that was made with one


def _whole(p: nn.Parameter, g: Tensor) -> None:
    """The projection of a gradient that is to stay whole: none."""


def constant(step: int) -> float:
    """The schedule that changes nothing."""
    return 1.0


class Optimizer(torch.optim.Optimizer):
    """Runs one rule per parameter group; ``plan.optimizer(...)`` makes it for a bound method.

    Args:
        groups: dicts with ``params`` (a list of parameters or of (name, parameter) pairs), ``rule``, and optionally
            ``lr`` (1e-3), ``lr_ratio`` (1.0) and ``decay`` (0.0).
        per_layer: step each parameter inside the backward pass and free its gradient.
        accumulate: micro-batches in one step; only ``per_layer`` needs to know.
        clip_per_layer: scale each parameter's gradient so that its norm is at most this.
        scaler: with ``per_layer`` under float16, the ``torch.amp.GradScaler``; ``step()`` then updates it, and a layer
            whose gradient overflows skips that step. Call neither ``scaler.step`` nor ``scaler.update``. Without
            ``per_layer`` use the scaler as with any optimizer.
        schedule: a further factor on every learning rate, as a function of the steps done.
        synchroniser: called with the number of completed steps after each step (merging); ``opt.synchroniser``.
        expect: label by parameter for those that must have a gradient at the first step; an adapter that was never
            called in the forward pass is found by this.
        seed: of the rounding noise for bfloat16 parameters.
        intra_worker: the ranks that train in step with this one, which may hold parameters in shards between them.
        summed: the ranks over which a parameter's gradient is summed before its step; none for who trains it alone, or
            where FSDP has done it.
        agreed: with whom the heads in a parameter share a basis, where they share one.
        capturable: learning rates are tensors on the device, so that ``optim.capture`` can hold steps in a CUDA graph.

    Raises:
        ValueError: no parameters, a parameter given twice or frozen, a group without a rule, a size that is not
            positive, a ``scaler`` without ``per_layer`` or with several ranks, or what no graph can hold.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        per_layer: bool = False,
        accumulate: int = 1,
        clip_per_layer: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        schedule: Callable[[int], float] = constant,
        synchroniser: Callable[[int], None] | None = None,
        expect: Mapping[nn.Parameter, str] | None = None,
        seed: int = 0,
        intra_worker: ProcessGroup | None = None,
        summed: Mapping[nn.Parameter, Group] | None = None,
        agreed: Mapping[nn.Parameter, Group] | None = None,
        capturable: bool = False,
    ):
        if (intra_worker is not None or summed or agreed) and scaler is not None and scaler.is_enabled():
            raise ValueError("float16 scales the loss of each rank by itself: use bfloat16 with several ranks")
        if capturable and (intra_worker is not None or summed or agreed):
            raise ValueError("a CUDA graph cannot hold the sums over ranks that a step begins with: capturable=False")
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate} must be at least 1")
        if clip_per_layer is not None and not clip_per_layer > 0:
            raise ValueError(f"clip_per_layer={clip_per_layer} must be above 0 (None for no clipping)")
        if scaler is not None and not per_layer:
            raise ValueError("scaler= is for per_layer=True; otherwise call scaler.step(optimizer) as usual")
        self.per_layer, self.accumulate, self.clip_per_layer = per_layer, accumulate, clip_per_layer
        self.schedule, self.seed = schedule, seed
        self.synchroniser: Any = synchroniser  # a plan's has more to offer than to be called
        self._scaler = LayerScaler(scaler) if scaler is not None and scaler.is_enabled() else None
        self._expect = dict(expect or {})
        self._projected: dict[nn.Parameter, Tensor] = {}
        self._intra_worker = intra_worker
        self._summed, self._agreed = dict(summed or {}), dict(agreed or {})
        self._agreeing: list[nn.Parameter] = []  # heads of which share a basis
        self.stepper = Stepper(self)
        self.layers = LayerSteps(self, self.stepper, self._projected, self._scaler, self._summed, self._agreed)
        self._synchronised = False
        self._overlapped: OverlappedSums | None = None
        self.capturable = capturable
        self._rates: dict[int, Tensor] = {}  # by the number of a group, where ``capturable``
        self.replaced = 0  # how often tensors of the state have given way to others, which a graph does not know
        super().__init__(groups, {"lr": 1e-3, "lr_ratio": 1.0, "decay": 0.0, "steps": 0})
        if capturable:
            from lowrank.optim.capture import check_capturable

            check_capturable(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        """All of it; torch's own copies forget what is not in ``__getstate__``. Copy the model with it, in one call."""
        if self.per_layer:
            raise ValueError("an optimizer that steps by hooks on its parameters cannot be copied: make a second one")
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; it needs a ``rule``, and joins at the step that the others are at.

        Raises:
            ValueError: no rule, a parameter given twice, a frozen one, or one that is not floating point.
        """
        check_rule(param_group.get("rule"), "every parameter group of lowrank.Optimizer", (Rule, PairRule))
        super().add_param_group({**param_group, "steps": self.steps if self.param_groups else 0})
        group, stepper = self.param_groups[-1], self.stepper
        try:
            each = rule_of_each(group["rule"], group["params"])
            for i, (p, rule) in enumerate(zip(group["params"], each, strict=True)):
                if not p.requires_grad:
                    raise ValueError("a frozen parameter (requires_grad=False) was given to the optimizer")
                if not p.is_floating_point():
                    raise ValueError(f"parameters must be floating point, not {p.dtype}")
                name = group["param_names"][i] if group.get("param_names") else f"parameter {len(stepper.place) + i}"
                stepper.shards[p] = shard_of(p, self._intra_worker, name)
                stepper.rules[p] = on_shard(rule, stepper.shards[p], name)
        except ValueError:
            self.param_groups.pop()
            raise
        for p in group["params"]:
            index, rule = len(stepper.place), stepper.rules[p]
            stepper.place[p] = (index, group)
            self.state[p] = rule.init(to_local(p))
            if rule.agrees:
                self._agreeing.append(p)
            if rule is not group["rule"]:
                stepper.alone.add(p)
            stepper.any_shard |= stepper.shards[p] is not None
            rule.place_(self.state[p], index)
            if p in _HOOKS:  # of an earlier optimizer, which this one replaces
                _HOOKS.pop(p).remove()
            if self.per_layer:
                _HOOKS[p] = p.register_post_accumulate_grad_hook(self.layers.on_gradient)

    # --- names and sizes -----------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Completed steps."""
        return self.param_groups[0]["steps"]

    def name_of(self, p: nn.Parameter) -> str:
        """The name that ``p`` was given with, or its number."""
        group = self.stepper.place[p][1]
        names = group.get("param_names")
        index = next(i for i, q in enumerate(group["params"]) if q is p)
        return names[index] if names else f"parameter {self.stepper.place[p][0]}"

    def state_bytes(self) -> int:
        """Bytes of state held now, micro-batch gradients kept as R included (those kept in ``p.grad`` are not)."""
        tensors = [t for p in self.stepper.place for _, t in leaves(self.state[p])]
        return sum(t.numel() * t.element_size() for t in [*tensors, *self._projected.values()])

    # --- the step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, then the synchroniser; returns the closure's loss.

        With ``per_layer`` the backward pass has stepped the parameters already; what is left is to check that it ran,
        to update the scaler, and the synchroniser.

        Raises:
            RuntimeError: a sparse gradient; an expected parameter without a gradient at the first step; with
                ``per_layer`` fewer backward passes than ``accumulate``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.steps == 0:
            self._check_expected()
        if self.per_layer:
            self.layers.finish()
        else:
            self.synchronise_()
            agree_bases_(self._agreeing, self.stepper.rules, self.state, self._agreed)
            self.set_rates_()
            self.step_groups_()
        self.complete_step_()
        return loss

    def step_groups_(self) -> None:
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            self.stepper.step_group(group, self._projected)

    def complete_step_(self) -> None:
        """What follows when all parameters have stepped."""
        for group in self.param_groups:
            group["steps"] += 1
        self._synchronised = False
        if self.synchroniser is not None:
            self.synchroniser(self.steps)

    # --- a step in a CUDA graph (``optim.capture``) ----------------------------------------------------------------

    def is_ordinary_step(self) -> bool:
        """Whether the coming step, which is not the first, leaves the host nothing to decide."""
        return self.steps > 0 and all(self.stepper.rules[p].is_ordinary(self.state[p]) for p in self.stepper.place)

    def set_rates_(self) -> None:
        """Where ``capturable``, write the coming step's learning rates to the device."""
        for i, group in enumerate(self.param_groups if self.capturable else ()):
            if i not in self._rates:
                self._rates[i] = torch.zeros((), dtype=torch.float32, device=group["params"][0].device)
            factor = group["lr_ratio"] * self.schedule(self.steps)
            if isinstance(group["lr"], Tensor):
                torch.mul(group["lr"], factor, out=self._rates[i])
            else:
                self._rates[i].fill_(group["lr"] * factor)

    def advance_host_(self) -> None:
        """Advance what the host counts, beside a step that a graph makes."""
        for p in self.stepper.place:
            if p.grad is not None:
                self.stepper.rules[p].advance_host_(self.state[p])

    @torch.no_grad()
    def synchronise_(self, *, whole: bool = False) -> None:
        """Sum the gradients over the ranks; ``step()`` does it where it has not been done.

        Afterwards ``grad`` is the same on all ranks that sum it, or None where the rule needs only R = QᵀG, which was
        then summed in its place; ``whole=True`` sums G all the same, for callers that need its norm. A parameter
        without a gradient on some ranks counts as zero there. Does nothing in one process, and with ``per_layer``.
        """
        if self.per_layer or self._synchronised:
            return
        self._synchronised = True
        if self._overlapped is not None:
            self._overlapped.finish(self._projected)
        else:
            sum_gradients_(self._summed, _whole if whole else self.project, self._projected)

    def sum_during_backward(self, micro_batches: int = 1, *, whole: bool = False) -> None:
        """From now on sums over the ranks are overlapped with the backward pass (``gradient_sync``).

        Args:
            micro_batches: backward passes in each step.
            whole: sum whole gradients, as ``synchronise_(whole=True)`` would.

        Raises:
            ValueError: with ``per_layer``, whose sums are in the backward pass anyway.
        """
        if self.per_layer:
            raise ValueError("per_layer=True sums each gradient where it steps, inside the backward pass")
        if self._summed and self._overlapped is None:
            self._overlapped = OverlappedSums(self._summed, _whole if whole else self.project, micro_batches)
            for p in self._overlapped.params:
                _HOOKS[p] = p.register_post_accumulate_grad_hook(self._overlapped.arrived)

    def span(self, p: nn.Parameter) -> Subspace | None:
        """The subspace in which the steps of ``p`` have lain since its basis was refreshed, the same for all its heads
        and on all ranks; None where there is none."""
        return self.stepper.rules[p].span(p, self.state[p])

    @property
    def holds_projections(self) -> bool:
        """Whether some gradients are held only as R = QᵀG, so that their norm is unknown."""
        return bool(self._projected)

    def project(self, p: nn.Parameter, g: Tensor) -> Tensor | None:
        """R = QᵀG where that is all that the coming step needs; None where it needs the whole gradient."""
        rule, state = self.stepper.rules[p], self.state[p]
        if self.clip_per_layer is not None or not rule.accumulates_projected(state):
            return None
        return rule.project(g, state)

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """What this rank holds of every gradient that there is, to be changed in place."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        return {p: to_local(p.grad) for p in parameters if p.grad is not None}

    def rate_of(self, group: dict[str, Any]) -> Any:
        """The learning rate of the coming step for a group: a tensor where ``capturable``."""
        if self.capturable:
            return self._rates[next(i for i, each in enumerate(self.param_groups) if each is group)]
        return float(group["lr"]) * group["lr_ratio"] * self.schedule(self.steps)

    def _check_expected(self) -> None:
        """Raise RuntimeError at the first step for adapters whose layer never ran: they would never be trained."""
        seen = set(self.layers.stepped) if self.per_layer else {p for p in self._expect if p.grad is not None}
        seen |= self.layers.waiting.keys()
        missing = sorted({label for p, label in self._expect.items() if p not in seen})
        if missing:
            raise RuntimeError(
                f"adapters of {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''} were never called in the "
                "first training forward: the model reads their weights without calling the layer, so they would do "
                "nothing. Leave these layers out with exclude_modules=, or train them with a method without adapters."
            )
        self._expect.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; also drops the kept micro-batches of an unfinished step."""
        if self._overlapped is not None:
            self._overlapped.drop()
        super().zero_grad(set_to_none)
        self.layers.drop()
        self._synchronised = False

    # --- forgetting ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forget(self, params: Iterable[nn.Parameter], share: float) -> None:
        """Zero a ``share`` of the entries in the moments of ``params`` (ReLoRA's partial reset, arXiv 2307.05695).

        Those at which the first moment is smallest, in each head apart, and the same ones in all moments; ``share=1``
        starts the state anew, its step count included.

        Raises:
            ValueError: a share outside [0, 1], or state that is more than moments (``state.check_forgets``).
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share={share} must lie in [0, 1]")
        params = list(params)
        for p in params:
            if 0.0 < share < 1.0:
                check_forgets(self.stepper.rules[p], p, self.name_of(p))
                if self.stepper.shards[p] is not None:
                    raise ValueError(
                        f"the smallest numbers of the state of {self.name_of(p)} cannot be told from a shard of it: "
                        "it is sharded; use share=0 or share=1"
                    )
        for p in params:
            if share == 1.0:
                self.replaced += 1
                self.stepper.rules[p].restart_(self.state[p], to_local(p))
                self.stepper.rules[p].place_(self.state[p], self.stepper.place[p][0])
            elif share > 0.0:
                moments = [t for _, t in leaves(self.state[p]) if t.shape == p.shape]
                if moments:
                    forget_smallest_(moments, share)

    # --- saving and loading --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``{"state": {i: nested dict of tensors}, "param_groups": [...]}``, torch's form; rules are saved as text.

        The dicts are new, the tensors are the optimizer's own: ``copy.deepcopy`` what is to outlive the next step.
        """
        number = {p: index for p, (index, _) in self.stepper.place.items()}
        groups = []
        for group in self.param_groups:
            plain = {k: v for k, v in group.items() if k not in ("params", "rule")}
            groups.append({**plain, "rule": repr(group["rule"]), "params": [number[p] for p in group["params"]]})
        extra = {"scale_age": self._scaler.age} if self._scaler is not None else {}
        return {
            "state": {number[p]: mapped(self.state[p], lambda _, t: t) for p in self.stepper.place},
            "param_groups": groups,
            **extra,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, matched by parameter name where both have names, else by position.

        Raises:
            ValueError: names the first parameter whose rule, name, shape or dtype differs; nothing was changed.
        """
        pairs: list[tuple[Tensor, Tensor]] = []
        for p, (key, state) in find_saved(state_dict, self.param_groups).items():
            pairs += matched(self.state[p], state, str(key))
        for target, source in pairs:
            target.copy_(source)
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in saved_group.items() if k not in ("params", "rule", "param_names")})
        if self._scaler is not None:
            self._scaler.age = state_dict.get("scale_age", 0)
        self._expect.clear()
        self.zero_grad()
        self.layers.stepped.clear()
