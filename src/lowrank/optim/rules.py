"""Update rules: how a gradient becomes a step.

A rule is hyper-parameters only (a frozen dataclass: hashable, printable) and two functions, after optax: ``init`` makes
the state of one parameter, ``update`` turns a gradient into a direction U and a gain c, and changes the state in place.
The optimizer then does, for a learning rate η and a decay λ,

    p ← p·(1 − η·λ) − η·c·U

so that no rule ever sees the parameter, the learning rate or the decay. ``update`` is the definition. All else that a
rule may say of itself has a default in :class:`Rule`.

State is a nested dict of tensors whose keys, shapes and dtypes are fixed by ``init``. Unless a rule's ``storage`` says
otherwise it is float32 (float64 for float64 parameters) whatever the parameter's dtype: arithmetic is never narrower.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass, is_dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lowrank.linalg.subspace import Subspace
from lowrank.optim.storage import FIRST, SECOND, Storage, allocate, check_storage, read, wide, write_

State = dict[str, "Tensor | State"]
Move = Callable[[Tensor, int], Tensor]  # (a moment, the power of the gradient in it) -> that moment in another basis
Refresh = Generator[Tensor, None, Subspace]  # a new basis; yields what all who hold a part of the stack are to sum


class Rule(ABC):
    """An update rule for one parameter. Subclasses are frozen dataclasses and give ``init`` and ``update``.

    What else a rule may give is below, with what holds for a rule that does not. ``element_wise`` is True where a
    number's step depends on that number's gradients alone, and all state but scalars is moments of the parameter's
    shape: such a rule may act on a shard of a parameter (``optim.sharded``), and gives ``transport_``. ``projects`` is
    True where the rule keeps a subspace of its own. ``observes`` and ``transports`` follow from what is given.
    """

    element_wise: ClassVar[bool] = False
    projects: ClassVar[bool] = False
    observes: ClassVar[bool] = False  # whether it gives observe_
    transports: ClassVar[bool] = False  # whether it gives transport_

    def __init_subclass__(cls) -> None:
        cls.observes = cls.observe_ is not Rule.observe_
        cls.transports = cls.transport_ is not Rule.transport_

    @abstractmethod
    def init(self, like: Tensor) -> State:
        """A fresh state for a parameter like this one (its shape, dtype and device; the values are not read)."""

    @abstractmethod
    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        """(direction, gain) for gradient ``g``, which stays as it is; ``state`` is changed in place."""

    def apply_(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], *, lr: float, decay: float
    ) -> None:
        """One step of float32 or float64 parameters in place, equal to ``update``'s up to rounding."""
        for p, g, state in zip(params, grads, states, strict=True):
            self.observe_(p, state)
            direction, gain = self.update(g, state)
            p.mul_(1 - lr * decay).sub_(direction * (lr * gain))

    def resolve(self, like: Tensor, *, stacked: bool) -> Rule:
        """The rule that a parameter like this one really follows; ``stacked``: whether its leading dimensions are a
        stack of matrices, as in adapter factors, and not those of a convolution."""
        return self

    def on_layer(self, *, transposed: bool, parts: int) -> Rule:
        """This rule for the weight of a linear layer or an embedding: ``transposed`` where it is stored as (in, out),
        ``parts`` matrices of equal size beside each other along out (fused q, k, v)."""
        return self

    def place_(self, state: State, index: int) -> None:  # noqa: B027  (nothing, where it is not given)
        """Told once, after ``init``, the number of the parameter that the state is for (to stagger, to seed)."""

    def restart_(self, state: State, like: Tensor) -> None:
        """Begin anew, as after ``init``."""
        state.clear()
        state.update(self.init(like))

    def observe_(self, param: Tensor, state: State) -> None:  # noqa: B027
        """Shown the parameter before each step (Adafactor's parameter scale)."""

    def transport_(self, state: State, like: Tensor, move: Move) -> None:
        """The basis has changed: pass every moment, and the power of the gradient in it, through ``move``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its moments move")

    # --- gradients in a smaller form, between micro-batches and on the way to other ranks ---

    def accumulates_projected(self, state: State) -> bool:
        """Whether the coming step needs of each gradient ``project(g, state)`` alone."""
        return False

    def project(self, g: Tensor, state: State) -> Tensor:
        """That smaller form. It is linear: the sum over micro-batches and ranks is the step's."""
        raise NotImplementedError

    def apply_projected_(self, param: Tensor, projected: Tensor, state: State, *, lr: float, decay: float) -> None:
        """The step of ``apply_`` from the sum of the smaller forms."""
        raise NotImplementedError

    # --- a basis that the matrices of a stack share, with who holds others of them ---

    def agreement(self, g: Tensor, state: State) -> Refresh | None:
        """The refresh of a shared basis that is due, to be run before the step by all who hold a part of the stack."""
        return None

    def span(self, like: Tensor, state: State) -> Subspace | None:
        """The one subspace, orthonormal, in which all steps since the last refresh lie; None where there is none."""
        return None

    def span_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of QᵀD of one matrix of a stack of this shape, where its changes have a ``span``."""
        return None

    def agreed_numbers(self, shape: tuple[int, ...]) -> int:
        """How many numbers an ``agreement`` sums over all who hold a part of a stack of this shape."""
        return 0


def check_rule(rule: object, where: str, kinds: tuple[type, ...] = (Rule,)) -> None:
    """Raise ValueError unless ``rule``, given to ``where``, is one of ``kinds`` and a value."""
    if not isinstance(rule, kinds) or not is_dataclass(rule):
        raise ValueError(
            f"{where} needs a rule, such as lowrank.optim.AdamW(), not {rule!r}; a rule of your own is a frozen "
            "dataclass derived from lowrank.optim.Rule, which gives init(like) and update(g, state)"
        )


@dataclass(frozen=True)
class AdamW(Rule):
    """Adam with decoupled weight decay (arXiv 1711.05101), as ``torch.optim.AdamW`` computes it.

    State: ``exp_avg``, ``exp_avg_sq`` (the parameter's shape) and ``step`` (one float32): 8 bytes a number, and 4; as
    int8, 2 bytes a number, 8 a block of up to 256 numbers, and 4.

    Args:
        betas: decay of the first and of the second moment, each in [0, 1).
        eps: added to the root of the second moment, after bias correction.
        storage: how the moments are kept: ``float32``, ``bfloat16`` or ``int8`` (``optim.storage``).

    Raises:
        ValueError: a value out of its range, or an unknown storage.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    storage: Storage = "float32"

    element_wise = True

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be two numbers in [0, 1)")
        if self.eps < 0:
            raise ValueError(f"eps={self.eps} must not be negative")
        check_storage("storage", self.storage)

    def init(self, like: Tensor) -> State:
        return {
            "exp_avg": allocate(like, self.storage, FIRST),
            "exp_avg_sq": allocate(like, self.storage, SECOND),
            "step": torch.zeros((), dtype=torch.float32, device=like.device),
        }

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        """Direction m / (√v + ε√c₂) and gain √c₂ / c₁, where cᵢ = 1 − βᵢᵗ: bias correction is all in the gain."""
        beta1, beta2 = self.betas
        g = g.to(wide(g.dtype))
        m, v = self._read(state, g)
        step = cast(Tensor, state["step"])
        step += 1
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        write_(state["exp_avg"], m, FIRST, step)
        write_(state["exp_avg_sq"], v, SECOND, step)
        count = step.double()
        correction = (1 - beta2**count).sqrt()
        direction = m / v.sqrt().add_((self.eps * correction).to(v.dtype))
        return direction, (correction / (1 - beta1**count)).to(m.dtype)

    def apply_(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], *, lr: float, decay: float
    ) -> None:
        fused: list[tuple[Tensor, Tensor, State]] = []
        for p, g, state in zip(params, grads, states, strict=True):
            if self.storage == "float32" and _laid_out_alike(p, g, state["exp_avg"]):
                fused.append((p, g, state))
            else:
                direction, gain = self.update(g, state)
                p.mul_(1 - lr * decay).sub_(direction.mul_(lr * gain))
        if not fused:
            return
        adamw(
            [p for p, _, _ in fused],
            [g for _, g, _ in fused],
            [state["exp_avg"] for _, _, state in fused],  # type: ignore[misc]
            [state["exp_avg_sq"] for _, _, state in fused],  # type: ignore[misc]
            [],
            [state["step"] for _, _, state in fused],  # type: ignore[misc]
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=decay,
            eps=self.eps,
            maximize=False,
        )

    def transport_(self, state: State, like: Tensor, move: Move) -> None:
        m, v = self._read(state, like)
        write_(state["exp_avg"], move(m, 1), FIRST, None)
        write_(state["exp_avg_sq"], move(v, 2), SECOND, None)

    def _read(self, state: State, g: Tensor) -> tuple[Tensor, Tensor]:
        return read(state["exp_avg"], FIRST, g.shape, wide(g.dtype)), read(
            state["exp_avg_sq"], SECOND, g.shape, wide(g.dtype)
        )


def _laid_out_alike(p: Tensor, *others: object) -> bool:
    """Whether the fused kernel may be used, which walks all its tensors as if they had the strides of the first."""
    strides = p.stride()
    for other in others:
        assert isinstance(other, Tensor)
        if other.stride() != strides and any(
            n > 1 and a != b for n, a, b in zip(p.shape, strides, other.stride(), strict=True)
        ):
            return False
    return True


@dataclass(frozen=True)
class SGD(Rule):
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD`` computes it, but with decoupled weight decay.

    State: ``momentum_buffer`` (the parameter's shape) where ``momentum`` is not 0, else nothing.

    Args:
        momentum: decay of the sum of gradients, in [0, 1).
        nesterov: step along g + momentum·buffer (Nesterov's accelerated gradient).

    Raises:
        ValueError: a momentum out of its range, or ``nesterov`` without one.
    """

    momentum: float = 0.0
    nesterov: bool = False

    element_wise = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1)")
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov=True needs a momentum above 0")

    def init(self, like: Tensor) -> State:
        if self.momentum == 0.0:
            return {}
        return {"momentum_buffer": torch.zeros_like(like, dtype=wide(like.dtype))}

    def update(self, g: Tensor, state: State) -> tuple[Tensor, Tensor | float]:
        g = g.to(wide(g.dtype))
        if self.momentum == 0.0:
            return g, 1.0
        buffer = state["momentum_buffer"]
        assert isinstance(buffer, Tensor)
        buffer.mul_(self.momentum).add_(g)
        return (g + self.momentum * buffer if self.nesterov else buffer.clone()), 1.0

    def transport_(self, state: State, like: Tensor, move: Move) -> None:
        if state:
            buffer = cast(Tensor, state["momentum_buffer"])
            buffer.copy_(move(buffer, 1))
