"""Whether the device computes what float64 on the CPU does: relative errors of weights' changes, not of weights.

Bases that are drawn at random, or found from a random start, differ from device to device. Rules are compared with the
exact SVD, or with numbers drawn on the CPU, in their place; the device's own bases have checks of their own.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tests.models import llama, small_method, text_loss, tokens, vit
from torch import Tensor, nn

import lowrank
from benchmarks.gpu.bench import Bench, check
from lowrank.linalg.basis import SVD, Basis, Gaussian, PowerIteration, Side, captured_energy
from lowrank.linalg.rounding import round_into_
from lowrank.methods import Method
from lowrank.optim import (
    SGD,
    Adafactor,
    AdamW,
    CapturedStep,
    ErrorFeedback,
    Lazy,
    Optimizer,
    Projected,
    Rescale,
    Residual,
    Rule,
)
from lowrank.optim.storage import FIRST, SECOND

STEPS, LR, DECAY = 12, 0.02, 0.1
SHAPES = [(48, 80), (80, 48), (64, 64), (3, 24, 40), (50,)]
INT8 = AdamW(storage="int8")
EIGHT: dict[str, Any] = {"rank": 8, "refresh_every": 5}
RULES: dict[str, Rule] = {
    "adamw": AdamW(),
    "adamw bfloat16": AdamW(storage="bfloat16"),
    "adamw int8": INT8,
    "sgd": SGD(momentum=0.9, nesterov=True),
    "adafactor": Adafactor(beta1=0.9, scale_parameter=True),
    "galore": Projected(**EIGHT),
    "galore left": Projected(**EIGHT, side="left"),
    "galore right, reset": Projected(**EIGHT, side="right", transport="reset"),
    "galore both": Projected(**EIGHT, inner=SGD(momentum=0.9), side="both", transport="rotate"),  # R is diagonal
    "galore int8": Projected(**EIGHT, inner=INT8, basis_storage="int8"),
    "q-galore": Projected(**EIGHT, inner=INT8, basis_storage="int4", lazy=Lazy(window=2)),
    "galore adafactor": Projected(**EIGHT, inner=Adafactor()),
    "ldadam": Projected(rank=8, refresh_every=1, transport="rotate", error_feedback=ErrorFeedback()),
    "apollo": Projected(**EIGHT, basis=Gaussian(), lift=Rescale(), scale=1.0),
    "apollo mini": Projected(rank=1, basis=Gaussian(), lift=Rescale(scope="tensor"), scale=128**0.5),
    "fira": Projected(**EIGHT, lift=Residual()),
    "flora": Projected(**EIGHT, inner=SGD(momentum=0.9), basis=Gaussian()),
}
EXACT, CLOSE = 1e-3, 1e-2  # relative error of a change in float32: by the same gradients, and by a model's own
NARROW = 0.1  # where state is kept in fewer bits
HALF = 0.35  # of a change in half precision: where a gradient is nearly zero Adam's step is its sign
BFLOAT16 = ("adamw", "galore", "apollo", "fira", "galore int8")
VISION = ("galore", "full", "lora")
VARIED = ("lte", "galore", "full", "apollo", "lora")
TINY = ("full", "dora", "galore_8bit", "apollo")
NO_WAITING = [name for name in RULES if name != "ldadam"]  # which refreshes, and so asks, at every step
CAPTURED = ("adamw", "adamw int8", "sgd", "galore", "galore int8", "q-galore", "fira")
RATES = {"lora_plus": 0.001, "apollo_mini": 0.002}  # their steps are many times the others'


@dataclass(frozen=True)
class Drawn(Basis):
    """``Gaussian`` with its numbers drawn on the CPU in float64, so that every device sees the same ones."""

    stored = False
    orthonormal = False

    def fit(self, g: Tensor, side: Side, rank: int, *, old: Tensor | None, seed: int) -> Tensor:
        size = g.shape[-2] if side == "left" else g.shape[-1]
        noise = torch.Generator().manual_seed(seed)
        drawn = torch.randn(size, rank, generator=noise, dtype=torch.float64).mul_(rank**-0.5)
        return drawn.to(g).expand(*g.shape[:-2], size, rank)


def reproducible(rule: Any) -> Any:
    """The rule with a basis that does not depend on the device's random numbers."""
    if not isinstance(rule, Projected):
        return rule
    basis = SVD() if isinstance(rule.basis, PowerIteration) else Drawn() if isinstance(rule.basis, Gaussian) else None
    return replace(rule, inner=reproducible(rule.inner), basis=basis or rule.basis)


def run(bench: Bench) -> None:
    for name, measure in checks(bench.device, tiny=bench.tiny).items():
        bench.item(name, measure)


def checks(device: torch.device, *, tiny: bool = False) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every check by name (``tiny``: of each kind one or two); each returns a record as ``bench.check`` makes it."""
    methods = TINY if tiny else tuple(lowrank.METHODS)
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    found |= {f"rule {name}": partial(rule_check, device, rule) for name, rule in RULES.items()}
    found |= {f"rule {name}, bfloat16 weights": partial(rounded_check, device, RULES[name]) for name in BFLOAT16}
    found |= {f"method {name}": partial(method_check, device, name) for name in methods}
    found |= {
        f"vision, {name}": partial(method_check, device, name, vision=True) for name in VISION[: 1 if tiny else None]
    }
    for name in VARIED[:1] if tiny else VARIED:
        found[f"{name}, per layer"] = partial(variant_check, device, name, {"per_layer": True}, CLOSE)
        found[f"{name}, accumulation"] = partial(variant_check, device, name, {"accumulate": 2}, CLOSE)
        both = {"per_layer": True, "accumulate": 2}
        found[f"{name}, per layer, accumulation"] = partial(variant_check, device, name, both, CLOSE)
        for kind in ("bfloat16", "float16"):
            found[f"{name}, autocast {kind}"] = partial(variant_check, device, name, {"autocast": kind}, HALF)
        scaled = {"autocast": "float16", "per_layer": True}
        found[f"{name}, autocast float16, per layer"] = partial(variant_check, device, name, scaled, HALF)
        found[f"{name}, resumed"] = partial(resume_check, device, name)
    found["power iteration, share of the SVD's energy that is missed"] = partial(energy_check, device)
    found["gaussian basis, lengths"] = partial(gaussian_check, device)
    found["stochastic rounding, mean"] = partial(rounding_check, device)
    found["codes of 8 bits"] = partial(codes_check, device)
    if device.type == "cuda":
        found |= {f"rule {name}, no synchronisation": partial(waits_check, device, RULES[name]) for name in NO_WAITING}
        found |= {f"rule {name}, captured": partial(captured_check, device, RULES[name]) for name in CAPTURED}
    return found


# --- rules ---------------------------------------------------------------------------------------------------------


def start_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    """A gradient (float64, CPU) whose spectrum falls off, as real ones' do, so that its subspace is well told."""
    noise = torch.Generator().manual_seed(step + 1)
    g = torch.randn(shape, generator=noise, dtype=torch.float64)
    if len(shape) < 2:
        return g
    once = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(*shape[:-1], min(shape[-2:]), generator=once, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(*shape[:-2], shape[-1], u.shape[-1], generator=once, dtype=torch.float64))[0]
    values = 4.0 * 0.7 ** torch.arange(u.shape[-1], dtype=torch.float64)
    return (u * values) @ v.mT + 0.002 * g


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all tensors together, in float64 on the CPU."""
    pairs = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(found, expected, strict=True)]
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(apart / sum(float(b.square().sum()) for _, b in pairs))


def is_narrow(rule: Any) -> bool:
    return "int8" in repr(rule) or "int4" in repr(rule) or "bfloat16" in repr(rule)


def defined(rule: Rule, shape: tuple[int, ...], lr: float = LR, decay: float = DECAY) -> Tensor:
    """The weights after ``STEPS`` of the rule's definition, in float64 on the CPU."""
    p = start_of(shape)
    state = rule.init(p)
    rule.place_(state, 0)
    for step in range(STEPS):
        rule.observe_(p, state)
        direction, gain = rule.update(gradient(shape, step), state)
        p = p * (1 - lr * decay) - lr * gain * direction
    return p


def rule_check(device: torch.device, rule: Rule) -> dict[str, Any]:
    """``apply_`` in float32 on the device against ``update`` in float64 on the CPU."""
    rule, found, expected = reproducible(rule), [], []
    for shape in SHAPES:
        p = start_of(shape).to(device, torch.float32)
        state = rule.init(p)
        rule.place_(state, 0)
        for step in range(STEPS):
            rule.apply_([p], [gradient(shape, step).to(p)], [state], lr=LR, decay=DECAY)
        found.append(p.cpu().double() - start_of(shape))
        expected.append(defined(rule, shape) - start_of(shape))
    return check(relative(found, expected), NARROW if is_narrow(rule) else EXACT)


def rounded_check(device: torch.device, rule: Rule) -> dict[str, Any]:
    """Weights in bfloat16, through the optimizer, which rounds them stochastically."""
    rule = reproducible(rule)
    params = [nn.Parameter(start_of(shape).to(device, torch.bfloat16)) for shape in SHAPES]
    optimizer = Optimizer([{"params": params, "rule": rule, "lr": LR, "decay": DECAY}])
    for step in range(STEPS):
        for p in params:
            p.grad = gradient(tuple(p.shape), step).to(p)
        optimizer.step()
    return check(relative(list(params), [defined(rule, shape) for shape in SHAPES]), 3e-2)


def waits_check(device: torch.device, rule: Rule) -> dict[str, Any]:
    """CUDA raises where the host waits for it, in an ordinary step."""
    if isinstance(rule, Projected):
        rule = replace(rule, refresh_every=10_000)
    params = [nn.Parameter(start_of(shape).to(device, torch.float32)) for shape in SHAPES]
    optimizer = Optimizer([{"params": params, "rule": rule, "lr": LR}])
    for p in params:
        p.grad = gradient(tuple(p.shape), 0).to(p)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        return check(0.0, 0.0)
    except RuntimeError as error:
        return check(1.0, 0.0, why=str(error).splitlines()[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured_check(device: torch.device, rule: Rule) -> dict[str, Any]:
    """Steps of which the ordinary ones are replayed from a CUDA graph, against steps that are launched."""
    runs, replays = [], 0
    for captured in (False, True):
        params = [nn.Parameter(start_of(shape).to(device, torch.float32)) for shape in SHAPES]
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer = Optimizer(
            [{"params": params, "rule": reproducible(rule), "lr": LR, "decay": DECAY}], capturable=True
        )
        step = CapturedStep(optimizer)
        for n in range(STEPS):
            for p in params:
                p.grad.copy_(gradient(tuple(p.shape), n))  # type: ignore[union-attr]
            (step if captured else optimizer.step)()
        runs.append([p.detach() - start_of(tuple(p.shape)).to(p) for p in params])
        replays = step.replays
    return check(relative(*runs), NARROW if is_narrow(rule) else EXACT, replays=replays)


# --- methods -------------------------------------------------------------------------------------------------------


def method_of(name: str) -> Method:
    """A method for the tiny models, with bases that do not depend on the device."""
    method = small_method(name)
    return replace(method, rules=tuple(replace(use, rule=reproducible(use.rule)) for use in method.rules))


def prepared(name: str, device: torch.device, dtype: torch.dtype, vision: bool) -> tuple[nn.Module, Any]:
    """A tiny model with the method; drawn in float32 on the CPU, so that all start alike."""
    model = (vit if vision else llama)()
    plan = lowrank.apply_(model, method_of(name))
    start = copy.deepcopy({**dict(model.named_parameters()), **dict(model.named_buffers())})
    model = (vit if vision else llama)().to(device, dtype)
    plan = lowrank.apply_(model, method_of(name))
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(start[key])
    return model, plan


def batch_loss(model: nn.Module, step: int, part: int, parts: int, vision: bool) -> Tensor:
    """The mean loss of part ``part`` of a batch of 8, divided by their number."""
    p = next(model.parameters())
    rows = slice(part * 8 // parts, (part + 1) * 8 // parts)
    if not vision:
        return text_loss(model, tokens(batch=8, seed=step % 3)[rows].to(p.device)) / parts
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(step % 3))[rows].to(p.device)
    if not torch.is_autocast_enabled(p.device.type):
        x = x.to(p.dtype)
    labels = torch.arange(8)[rows].to(p.device) % 3
    return nn.functional.cross_entropy(model(x).to(torch.promote_types(torch.float32, p.dtype)), labels) / parts


@dataclass
class Training:
    """A tiny model in training; ``options`` are ``per_layer``, ``accumulate`` and ``autocast`` (a dtype's name)."""

    model: nn.Module
    optimizer: Any
    options: Mapping[str, Any]
    vision: bool = False
    scaler: Any = None

    @classmethod
    def begin(
        cls, name: str, device: torch.device, dtype: torch.dtype, vision: bool = False, **options: Any
    ) -> Training:
        model, plan = prepared(name, device, dtype, vision)
        per_layer = options.get("per_layer", False)
        scaler = None
        if options.get("autocast") == "float16":
            scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
        accumulate = options.get("accumulate", 1) if per_layer else 1
        optimizer = plan.optimizer(
            lr=RATES.get(name, LR), per_layer=per_layer, accumulate=accumulate, scaler=scaler if per_layer else None
        )
        return cls(model, optimizer, options, vision, scaler)

    def steps(self, begin: int, end: int) -> None:
        self.model.train()
        parts = self.options.get("accumulate", 1)
        device, narrow = next(self.model.parameters()).device.type, self.options.get("autocast")
        for step in range(begin, end):
            for part in range(parts):
                with torch.autocast(device, getattr(torch, narrow)) if narrow else nullcontext():
                    loss = batch_loss(self.model, step, part, parts, self.vision)
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            if self.scaler is None or self.options.get("per_layer"):
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.optimizer.zero_grad()

    def changes(self) -> list[Tensor]:
        """What the weights of the plain model have changed by, and the loss on another batch at last."""
        plain = lowrank.merge_and_unload(copy.deepcopy(self.model))
        start = dict((vit if self.vision else llama)().named_parameters())
        return [p.detach().cpu().double() - start[name].double() for name, p in plain.named_parameters()]


def reference(name: str, vision: bool = False, **options: Any) -> list[Tensor]:
    training = Training.begin(name, torch.device("cpu"), torch.float64, vision, **options)
    training.steps(0, 6)
    return training.changes()


def method_check(device: torch.device, name: str, vision: bool = False) -> dict[str, Any]:
    """Six steps, merges and refreshes among them, and the plain model at the end."""
    training = Training.begin(name, device, torch.float32, vision)
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):  # as products' default
        training.steps(0, 6)
    narrow = any(is_narrow(use.rule) for use in method_of(name).rules)
    return check(relative(training.changes(), reference(name, vision)), NARROW if narrow else CLOSE)


def variant_check(device: torch.device, name: str, options: dict[str, Any], allowed: float) -> dict[str, Any]:
    """Another way to the same six steps: float64 takes it in whole batches at the end of each step."""
    training = Training.begin(name, device, torch.float32, **options)
    training.steps(0, 6)
    splits = {k: v for k, v in options.items() if k == "accumulate"}  # heads see parts of micro-batches
    return check(relative(training.changes(), reference(name, **splits)), allowed)


def resume_check(device: torch.device, name: str) -> dict[str, Any]:
    """Three steps, saved, loaded with ``weights_only``, and three more, against six."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # CUDA's embeddings otherwise add up in any order
    try:
        return resumed(device, name)
    finally:
        torch.use_deterministic_algorithms(False)


def resumed(device: torch.device, name: str) -> dict[str, Any]:
    whole = Training.begin(name, device, torch.float32)
    whole.steps(0, 6)
    first = Training.begin(name, device, torch.float32)
    first.steps(0, 3)
    buffer = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict()}, buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True, map_location=device)
    second = Training.begin(name, device, torch.float32)
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.steps(3, 6)
    pairs = list(zip(whole.model.parameters(), second.model.parameters(), strict=True))
    bitwise = all(torch.equal(a, b) for a, b in pairs)
    return check(relative([b for _, b in pairs], [a for a, _ in pairs]), 1e-6, bitwise=bitwise)


# --- bases and rounding ----------------------------------------------------------------------------------------------


def energy_check(device: torch.device) -> dict[str, Any]:
    """A warm power iteration after the gradient has moved, against the exact basis; and QᵀQ = I."""
    shape, rank = (192, 320), 24
    first, then = gradient(shape, 0).to(device, torch.float32), gradient(shape, 1).to(device, torch.float32)
    basis = PowerIteration()
    old = basis.fit(first, "left", rank, old=None, seed=0)
    new = basis.fit(then, "left", rank, old=old, seed=1)
    exact = SVD().fit(then, "left", rank, old=None, seed=0)
    apart = new.mT @ new - torch.eye(rank, device=device)
    missed = 1 - float(captured_energy(then, new, "left") / captured_energy(then, exact, "left"))
    return check(max(missed, 0.0), 0.01, orthonormal_to=float(apart.abs().max()))


def gaussian_check(device: torch.device) -> dict[str, Any]:
    """E|Qᵀx|² = |x|², and the same numbers from the same seed."""
    x = start_of((512, 64)).to(device, torch.float32)
    draws = [Gaussian().fit(x, "left", 64, old=None, seed=seed) for seed in (1, 1, 2)]
    same = torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    lengths = (draws[0].mT @ x).square().sum() / x.square().sum()
    return check(abs(float(lengths) - 1), 0.1 if same else -1.0, repeats=same)


def rounding_check(device: torch.device) -> dict[str, Any]:
    """1 + 2⁻¹⁰ lies an eighth of the way to the next bfloat16 above 1: its mean over many is itself."""
    exact = torch.full((1 << 18,), 1 + 2.0**-10, device=device)
    rounded = torch.empty_like(exact, dtype=torch.bfloat16)
    round_into_(rounded, exact, torch.Generator(device=device).manual_seed(0))
    return check(abs(float(rounded.float().mean()) - float(exact[0])) / 2**-7, 0.01)


def codes_check(device: torch.device) -> dict[str, Any]:
    """8-bit codes of the device and of the CPU: what share of them differs (by one, at an edge)."""
    apart = 0.0
    for code, x in ((FIRST, start_of((96, 200))), (SECOND, start_of((96, 200)).square())):
        stored = []
        for place in (device, torch.device("cpu")):
            kept = code.allocate(torch.empty(x.shape, device=place))
            code.encode_(kept, x.to(place, torch.float32), tick=3)
            stored.append(kept["codes"].cpu().int())
        steps = (stored[0] - stored[1]).abs()
        apart = max(apart, float((steps > 0).double().mean()) if int(steps.max()) <= 1 else 1.0)
    return check(apart, 1e-3)
