"""Update rules: how a gradient becomes a step.

A rule is hyper-parameters only (a frozen dataclass: hashable, printable) and two functions, after optax: ``init`` makes
the state of one parameter, ``update`` turns a gradient into a direction U and a gain c, and changes the state in place.
The optimizer then does, for a learning rate η and a decay λ,

    p ← p·(1 − η·λ) − η·c·U

so that no rule ever sees the parameter, the learning rate or the decay. ``update`` is the definition. All else that a
rule may say of itself has a default in ``Rule``.

State is a nested dict of tensors whose keys, shapes and dtypes are fixed by ``init``. Unless a rule's ``storage`` says
otherwise it is float32 (float64 for float64 parameters) whatever the parameter's dtype: arithmetic is never narrower.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lowrank.infra.checks import check_choice
from lowrank.linalg.chunks import parts
from lowrank.linalg.kernels import chosen, rate
from lowrank.linalg.kernels import takes as kernels_take
from lowrank.linalg.quantise import split
from lowrank.linalg.subspace import Subspace
from lowrank.optim.stacks import add_one_, alike, joined, joined_states
from lowrank.optim.storage import FIRST, SECOND, Storage, allocate, read, wide, write_

State = dict[str, "Tensor | State"]
Move = Callable[[Tensor, int], Tensor]  # (a moment, the power of the gradient in it) -> that moment in another basis
Refresh = Generator[Tensor, None, Subspace]  # a new basis; yields what all who hold a part of the stack are to sum


class Rule(ABC):
    """An update rule for one parameter. Subclasses are frozen dataclasses and give ``init`` and ``update``.

    What else a rule may give is below, with what holds for a rule that does not. ``element_wise`` is True where a
    number's step depends on that number's gradients alone, and all state but scalars is moments of the parameter's
    shape: such a rule may act on a shard of a parameter (``optim.sharded``), and gives ``transport_``. ``projects`` is
    True where the rule keeps a subspace of its own. ``stacks`` is True where ``update`` takes parameters of one shape
    joined along a new first dimension, N of them, and their states likewise, scalars as (N, 1, ..., 1), and then
    returns a gain that is a float or such a scalar (``optim.stacks``). ``observes`` and ``transports`` follow from what
    is given.
    """

    element_wise: ClassVar[bool] = False
    projects: ClassVar[bool] = False
    stacks: ClassVar[bool] = False
    observes: ClassVar[bool] = False  # whether it gives observe_
    transports: ClassVar[bool] = False  # whether it gives transport_
    divides: ClassVar[bool] = False  # whether it gives ``pieces``

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
        if self.joins(grads):
            for at in alike(grads):
                ps, gs = [params[i] for i in at], joined([grads[i] for i in at])
                direction, gain = self.update_joined(gs, [states[i] for i in at])
                change = direction * (lr * gain) if direction is gs else direction.mul_(lr * gain)
                if decay:
                    torch._foreach_mul_(ps, 1 - lr * decay)
                torch._foreach_sub_(ps, list(change.unbind()))
            return
        for p, g, state in zip(params, grads, states, strict=True):
            self.observe_(p, state)
            direction, gain = self.update(g, state)
            p.mul_(1 - lr * decay).sub_(direction * (lr * gain))

    def pieces(self, param: Tensor, grad: Tensor, state: State) -> Iterator[tuple[Tensor, Tensor, State]]:
        """A large parameter in parts, views of all three, which step one by one as the whole would (``linalg.chunks``):
        so that what a step needs for itself is bounded. By default one part."""
        yield param, grad, state

    def joins(self, grads: list[Tensor]) -> bool:
        """Whether ``apply_`` steps parameters of one shape at once."""
        return self.stacks and not self.observes

    def fused_(self, param: Tensor, grad: Tensor, state: State, *, lr: float | Tensor, decay: float, seed: int) -> bool:
        """The whole step of one parameter by a kernel (``linalg.kernels``), a bfloat16 one rounded stochastically with
        ``seed``; False, and nothing was done, where none was chosen for it."""
        return False

    def update_joined(self, g: Tensor, states: list[State]) -> tuple[Tensor, Tensor | float]:
        """``update`` of N parameters of one shape at once, from their gradients (N, ...): each as if it were alone."""
        if not self.stacks and len(states) == 1:
            direction, gain = self.update(g[0], states[0])
            return direction[None], gain[None] if isinstance(gain, Tensor) and gain.dim() else gain
        with joined_states(states, g.dim() - 1) as state:
            return self.update(g, state)

    # --- steps in a CUDA graph (``optim.capture``) ---

    refuses_capture: ClassVar[str] = ""  # why its ordinary steps cannot be in one ("draws …"), or nothing

    def is_ordinary(self, state: State) -> bool:
        """Whether the host decides nothing in the coming step."""
        return True

    def advance_host_(self, state: State) -> None:  # noqa: B027
        """Count on what is counted on the host, as a step does."""

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

    def transport_statistics_(self, state: State, like: Tensor, move: Move) -> None:
        """As ``transport_``, where second moments move as a variance about the mean and the mean's square."""
        self.transport_(state, like, move)

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

    agrees: ClassVar[bool] = False  # whether it has agreements at all

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
    stacks = True

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be two numbers in [0, 1)")
        if self.eps < 0:
            raise ValueError(f"eps={self.eps} must not be negative")
        check_choice("storage", self.storage, Storage)

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
        if self.storage != "float32":
            return super().apply_(params, grads, states, lr=lr, decay=decay)
        by_kind: dict[Any, list[int]] = {}
        for i, (p, g, state) in enumerate(zip(params, grads, states, strict=True)):
            kind = (p.device, p.dtype) if _laid_out_alike(p, g, state["exp_avg"]) else None
            by_kind.setdefault(kind, []).append(i)
        for kind, at in by_kind.items():
            step_ = super().apply_ if kind is None else self._fused_
            step_([params[i] for i in at], [grads[i] for i in at], [states[i] for i in at], lr=lr, decay=decay)

    def fused_(self, param: Tensor, grad: Tensor, state: State, *, lr: float | Tensor, decay: float, seed: int) -> bool:
        if self.storage != "int8" or not chosen("int8", param) or not kernels_take(param, grad):
            return False
        from lowrank.linalg.kernels.int8 import adamw_int8_

        moments: Any = state["exp_avg"], state["exp_avg_sq"], state["step"]
        adamw_int8_(
            param, grad, *moments, lr=rate(lr, param), decay=decay, betas=self.betas, eps=self.eps, seed=seed
        )  # fmt: skip
        return True

    @property
    def divides(self) -> bool:  # type: ignore[override]
        return self.storage == "int8"

    def pieces(self, param: Tensor, grad: Tensor, state: State) -> Iterator[tuple[Tensor, Tensor, State]]:
        """By whole blocks of codes, each of which counts as a matrix of its own."""
        _, blocks, size = split(param.shape)
        exact = param.dim() == 2 and param.numel() == blocks * size and param.is_contiguous() and grad.is_contiguous()
        if self.storage != "int8" or not exact:
            yield param, grad, state
            return
        moments: Any = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        step, rows = cast(Tensor, state["step"]), [t.view(blocks, 1, size) for t in (param, grad)]
        for part in parts(blocks, size, param):
            last = part.stop >= blocks
            inside: Any = {name: {k: t[part].unsqueeze(1) for k, t in kept.items()} for name, kept in moments.items()}
            yield rows[0][part], rows[1][part], {**inside, "step": step if last else step.clone()}

    def _fused_(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], *, lr: float, decay: float
    ) -> None:
        """The kernel of ``torch.optim.AdamW(fused=True)``, on parameters of one dtype and device."""
        every: Any = states
        m, v, step = ([state[k] for state in every] for k in ("exp_avg", "exp_avg_sq", "step"))
        add_one_(step)
        torch._fused_adamw_(
            params,
            grads,
            m,
            v,
            [],
            step,
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

    def transport_statistics_(self, state: State, like: Tensor, move: Move) -> None:
        """v ← c₂·|move(v/c₂ − (m/c₁)²) + move(m/c₁)²| with cᵢ = 1 − βᵢᵗ (LDAdam, arXiv 2410.16103, algorithm 1)."""
        m, v = self._read(state, like)
        step = cast(Tensor, state["step"]).double()
        c1, c2 = ((1 - beta**step).to(m.dtype) for beta in self.betas)
        variance, moved = move(v / c2 - (m / c1).square(), 2), move(m, 1)
        write_(state["exp_avg_sq"], (variance + (moved / c1).square()).abs() * c2, SECOND, None)
        write_(state["exp_avg"], moved, FIRST, None)

    def first_moment(self, state: State, like: Tensor) -> Tensor:
        """m, in the shape of ``like``."""
        return self._read(state, like)[0]

    def _read(self, state: State, g: Tensor) -> tuple[Tensor, Tensor]:
        return read(state["exp_avg"], FIRST, g.shape, wide(g.dtype)), read(
            state["exp_avg_sq"], SECOND, g.shape, wide(g.dtype)
        )


def _laid_out_alike(p: Tensor, g: Tensor, m: Any) -> bool:
    """Whether the fused kernel may be used, which walks all its tensors as if they had the strides of the first."""
    if p.is_contiguous() and g.is_contiguous() and m.is_contiguous():
        return True
    strides = p.stride()
    return all(n == 1 or a == b == c for n, a, b, c in zip(p.shape, strides, g.stride(), m.stride(), strict=True))


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
    stacks = True

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
