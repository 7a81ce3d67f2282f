"""What a watched step tells of a training script: faults, each a few plain words and what to change.

A fault is something that cannot be meant: whoever wrote the script would say "oh". ``EXAMINATIONS`` lists what is
looked for, a function each. Where a step cannot show whether it is meant, it is a note, which does no more than say so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank.adapters.targets import linear_layers
from lowrank.doctor.watch import LOW_PRECISION, Watch, Watched
from lowrank.infra.loaded_parameters import looks_new
from lowrank.infra.text import some

Kind = Literal[
    "zero scale",
    "no gradient",
    "frozen head",
    "frozen biases",
    "in no group",
    "in two groups",
    "frozen in a group",
    "no compression",
    "DDP before conversion",
    "clipping without effect",
    "a step a micro-batch",
    "rounded away",
    "never called",
    "decay on factors",
    "not stepped",
    "weights tied no more",
    "state that does not load",
]


@dataclass(frozen=True)
class Fault:
    """``what`` is wrong, the ``remedy``, ``where`` it is (file:line: source) if known; a ``note`` may be meant."""

    kind: Kind
    what: str
    remedy: str
    where: str | None = None
    note: bool = False

    def __str__(self) -> str:
        place = f"\n   where: {self.where}" if self.where else ""
        return f"{'note' if self.note else 'fault'}: {self.kind}: {self.what}{place}\n   change: {self.remedy}"


def examine(watch: Watch) -> list[Fault]:
    """Every fault and note that a settled watch shows, the faults first."""
    found = [fault for examination in EXAMINATIONS for fault in examination(watch)]
    return sorted(found, key=lambda fault: fault.note)


def zero_scale(watch: Watch) -> Iterator[Fault]:
    for module, name, attribute in _zero_scales(watch):
        yield Fault(
            "zero scale",
            f"{name}.{attribute} is 0: the adapter adds nothing and learns nothing (alpha // rank is 0 where the rank "
            "is above alpha)",
            f"divide truly, alpha / rank, where {type(module).__name__} sets {attribute}",
            watch.lines.get(f"scale of {type(module).__name__}"),
        )
        return  # one line makes all of them


def no_gradient(watch: Watch) -> Iterator[Fault]:
    excused = {id(p) for module, _, _ in _zero_scales(watch) for p in module.parameters()}
    excused |= {id(p) for _, module in _uncalled_adapters(watch) for p in module.parameters()}
    factors, starting = _factors(watch), _waiting_for_their_partner(watch)
    silent = [w for w in watch.parameters.values() if not w.gradient and id(w.parameter) not in excused | starting]
    adapters = [w for w in silent if id(w.parameter) in factors]
    others = [w for w in silent if id(w.parameter) not in factors]
    if adapters:
        yield Fault(
            "no gradient",
            f"{_count(adapters)} of adapters got no gradient: {_listed(w.name for w in adapters)}",
            "see that the loss goes through them: not detached, not under no_grad, not cut by a scale or mask of 0",
            watch.lines.get("backward"),
        )
    if others:
        yield Fault(
            "no gradient",
            f"{_count(others)} got no gradient: {_listed(w.name for w in others)}",
            "freeze what is not meant to learn: requires_grad_(False)",
            watch.lines.get("backward"),
            note=True,
        )


def frozen_head(watch: Watch) -> Iterator[Fault]:
    for root in watch.roots:
        for name, module in ((layer.name, layer.module) for layer in linear_layers(root) if "head" in layer.groups):
            if not any(p.requires_grad for p in module.parameters()) and looks_new(module):
                yield Fault(
                    "frozen head",
                    f"{name} is frozen and looks as initialised: the output stays a random one",
                    f"train it: model.{name}.requires_grad_(True), after everything else was frozen",
                    watch.lines.get("freezing"),
                )


def frozen_biases(watch: Watch) -> Iterator[Fault]:
    """Of a model trained from scratch, in which adapters stand in for the weights and nothing for the biases."""
    for root in watch.roots:
        frozen = [n for n, p in root.named_parameters() if n.endswith("bias") and not p.requires_grad]
        found = watch.origins[id(root)]
        if frozen and found.why is not None and not found.loaded and _factors(watch):
            yield Fault(
                "frozen biases",
                f"the weights are as initialised, adapters train in their place, and {len(frozen)} biases stay what "
                f"they are for ever: {_listed(frozen)}",
                "train the biases with the adapters (in lowrank: rest='train')",
                watch.lines.get("freezing"),
            )


def groups(watch: Watch) -> Iterator[Fault]:
    """Parameters in no group, in two, and groups in which nothing can move."""
    times: dict[int, int] = {}
    for group in watch.groups():
        for p in {id(p): p for p in group["params"]}.values():
            times[id(p)] = times.get(id(p), 0) + 1
        frozen = [p for p in group["params"] if not p.requires_grad]
        if frozen and len(frozen) == len(group["params"]):
            yield Fault(
                "frozen in a group",
                f"a group holds only frozen parameters ({_listed(_names(watch, frozen))}): its settings do nothing",
                "give the group the parameters that train, those after the adapters were placed",
                watch.lines.get("optimizer"),
            )
    missed = [w for w in watch.parameters.values() if w.gradient is not None and id(w.parameter) not in times]
    if missed:
        yield Fault(
            "in no group",
            f"{_count(missed)} got a gradient and no optimizer steps it: {_listed(w.name for w in missed)}",
            "make the optimizer after the model is complete, from all parameters with requires_grad",
            watch.lines.get("optimizer"),
        )
    twice = [w for w in watch.parameters.values() if times.get(id(w.parameter), 0) > 1]
    if twice:
        yield Fault(
            "in two groups",
            f"{_count(twice)} in two groups or optimizers, stepped twice: {_listed(w.name for w in twice)}",
            "leave it out of one of them",
            watch.lines.get("optimizer"),
        )


def no_compression(watch: Watch) -> Iterator[Fault]:
    for group in watch.groups():
        rank = group.get("rank", getattr(group.get("rule"), "rank", None))
        if not isinstance(rank, int):
            continue
        whole = [p for p in group["params"] if _smaller_side(p) <= rank]
        if whole:
            yield Fault(
                "no compression",
                f"rank {rank} projects {_listed(_names(watch, whole))} onto all of it (smaller side "
                f"{min(map(_smaller_side, whole))}): nothing is saved",
                "project the large matrices, with a rank below their smaller side; the factors of an adapter are none",
                watch.lines.get("optimizer"),
            )


def wrapped_too_early(watch: Watch) -> Iterator[Fault]:
    for name, module in watch.modules():
        known = getattr(module, "_module_parameters", None)
        if not isinstance(module, nn.parallel.DistributedDataParallel) or known is None:
            continue
        inside = {id(p) for p in known}
        missed = [n for n, p in module.module.named_parameters() if p.requires_grad and id(p) not in inside]
        if missed:
            yield Fault(
                "DDP before conversion",
                f"{len(missed)} trained parameters came after DistributedDataParallel was made, which does not sum "
                f"their gradients: {_listed(missed)}",
                "place the adapters first, then wrap the model",
                watch.lines.get("ddp") or name or None,
            )


def clipping(watch: Watch) -> Iterator[Fault]:
    per_layer = any(getattr(optimizer, "clip_per_layer", None) for optimizer in watch.optimizers)
    setting = next((n for n in watch.settings if re.search(r"clip|max_grad_norm|max_norm", n, re.I)), None)
    remedy = "clip after the last backward() and before step(), over the parameters that the optimizer steps"
    if not watch.clips:
        if setting is not None and watch.settings[setting] > 0 and not per_layer:
            what = f"{setting} = {watch.settings[setting]:g}, and nothing clips before the step"
            yield Fault("clipping without effect", what, remedy, watch.lines.get("step"))
        return
    last = watch.clips[-1]
    if last.with_gradient == 0:
        what = "it was given no parameter that has a gradient (freed by a step in the backward pass, frozen, or an "
        yield Fault("clipping without effect", what + "iterator that was used up)", remedy, last.where)
    elif last.scaled:
        what = "gradients were clipped while GradScaler's factor was on them"
        yield Fault("clipping without effect", what, "call scaler.unscale_(optimizer) before clipping", last.where)


def micro_batches(watch: Watch) -> Iterator[Fault]:
    setting = next((n for n in watch.settings if re.search(r"accum", n, re.I)), None)
    if setting is None or watch.settings[setting] <= 1 or watch.micro_batches >= watch.settings[setting]:
        return
    yield Fault(
        "a step a micro-batch",
        f"{setting} = {watch.settings[setting]:g}, and the first step came after {watch.micro_batches} micro-batch: "
        "the weights move at each, and the batch is not the one that is meant",
        "step once a batch; an optimizer that steps within the backward pass must be told of accumulation "
        "(lowrank: per_layer=True, accumulate=N)",
        watch.lines.get("step"),
    )


def rounding(watch: Watch) -> Iterator[Fault]:
    held = [w for w in _moved_by_an_optimizer(watch) if w.parameter.dtype in LOW_PRECISION and not _master(watch, w)]
    lost = [w for w in held if w.lost > 0.5]
    if lost:
        worst = max(lost, key=lambda w: w.lost)
        yield Fault(
            "rounded away",
            f"{str(worst.parameter.dtype).removeprefix('torch.')} holds {_count(lost)} whose step is too small for it: "
            f"of {worst.name} {worst.lost:.0%} of the numbers with a gradient did not move",
            "keep the trained weights in float32 (with autocast), or use an optimizer that rounds stochastically or "
            "keeps float32 copies; lowrank's rounds stochastically",
            watch.lines.get("optimizer"),
        )


def never_called(watch: Watch) -> Iterator[Fault]:
    uncalled = list(_uncalled_adapters(watch))
    if uncalled:
        yield Fault(
            "never called",
            f"{_listed(name for name, _ in uncalled)} carries an adapter and its forward never ran: what it stands in "
            "for reads its weight directly, or does not use it",
            "adapt a layer that is called (module(x)), or leave this one out of the targets",
            watch.lines.get("forward"),
        )


def decay(watch: Watch) -> Iterator[Fault]:
    factors = _factors(watch)
    for group in watch.groups():
        rate = group.get("weight_decay", group.get("decay", 0.0))
        these = [p for p in group["params"] if id(p) in factors]
        if these and rate:
            yield Fault(
                "decay on factors",
                f"weight_decay {rate:g} shrinks {len(these)} factors of adapters ({_listed(_names(watch, these))}), "
                "that is their product and not the weights; merged, the decay becomes part of these",
                "put the factors into a group with weight_decay 0",
                watch.lines.get("optimizer"),
            )
            return


def not_stepped(watch: Watch) -> Iterator[Fault]:
    still = [w for w in _moved_by_an_optimizer(watch) if w.lost == 1.0 and w.parameter.dtype not in LOW_PRECISION]
    if still:
        yield Fault(
            "not stepped",
            f"{_count(still)} got a gradient and the step did not move it: {_listed(w.name for w in still)}",
            "look at what the optimizer does with it: a zero update is one of the known faults of projected 8-bit "
            "optimizers on newer bitsandbytes",
            watch.lines.get("step"),
        )
    if watch.parameters and watch.rates and not any(watch.rates.values()):
        what = "the learning rate of the first step is 0 (a warm-up), so that its rounding cannot be seen"
        yield Fault("not stepped", what, "start the warm-up above 0", watch.lines.get("step"), note=True)


def untied(watch: Watch) -> Iterator[Fault]:
    places: dict[tuple[int, torch.Size], dict[str, nn.Parameter]] = {}
    for name, p in watch.named().items():
        if p.numel():
            places.setdefault((p.data_ptr(), p.shape), {})[name] = p
    for found in places.values():
        if len(set(map(id, found.values()))) > 1:
            names = list(found)
            yield Fault(
                "weights tied no more",
                f"{_listed(names)} share memory and are two parameters: each is stepped or merged as if it were alone",
                f"let them be one: assign the same nn.Parameter to both, such as {names[1]} = {names[0]}",
                watch.lines.get("optimizer"),
            )


def unreadable_state(watch: Watch) -> Iterator[Fault]:
    for optimizer in watch.optimizers:
        foreign = {type(value).__name__ for state in optimizer.state.values() for value in _foreign(state)}
        if foreign:
            yield Fault(
                "state that does not load",
                f"{type(optimizer).__name__} keeps objects ({_listed(sorted(foreign))}) in its state, which torch.load "
                "refuses with its defaults: the run cannot be resumed so",
                "use an optimizer whose state is tensors and numbers",
                watch.lines.get("optimizer"),
            )


EXAMINATIONS: tuple[Callable[[Watch], Iterable[Fault]], ...] = (
    zero_scale,
    no_gradient,
    frozen_head,
    frozen_biases,
    groups,
    no_compression,
    wrapped_too_early,
    clipping,
    micro_batches,
    rounding,
    never_called,
    decay,
    not_stepped,
    untied,
    unreadable_state,
)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_FACTOR = re.compile(r"lora|vera|(^|[._])(linear_[ab]_|w_[ab]_|[ABm]$)", re.I)


def _factors(watch: Watch) -> set[int]:
    """The ids of trained matrices that are factors of adapters: by their name, or as a pair B A that starts at zero
    beside a frozen weight."""
    named = {i for i, w in watch.parameters.items() if w.parameter.dim() >= 2 and _FACTOR.search(w.name)}
    return named | {i for a, b in _pairs(watch) for i in (a, b)}


def _pairs(watch: Watch) -> Iterator[tuple[int, int]]:
    """(id of A, id of B) of the factors of one adapter: A (…, r, in) and B (…, out, r) with a small r, one all zero."""
    beside: dict[str, list[Watched]] = {}
    for w in watch.parameters.values():
        if w.parameter.dim() in (2, 3):
            for depth in (1, 2):
                beside.setdefault(".".join(w.name.split(".")[:-depth]), []).append(w)
    for near in beside.values():
        for a in near:
            for b in near:
                rank, width = a.parameter.shape[-2:]
                fits = b.parameter.shape[-1] == rank and 2 * rank <= min(width, b.parameter.shape[-2])
                if a is not b and fits and bool(a.before.any()) != bool(b.before.any()):
                    yield id(a.parameter), id(b.parameter)


def _waiting_for_their_partner(watch: Watch) -> set[int]:
    """The ids of factors with a zero gradient because the other factor is still zero, and gets one."""
    waiting: set[int] = set()
    for pair in _pairs(watch):
        for one, other in (pair, pair[::-1]):
            partner = watch.parameters[other]
            if not partner.before.any() and partner.gradient:
                waiting.add(one)
    return waiting


def _zero_scales(watch: Watch) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, its name, the attribute) of every scale that is zero in a module that has something to train."""
    for name, module in watch.modules():
        if not any(p.requires_grad for p in module.parameters()):
            continue
        for attribute, value in vars(module).items():
            values = list(value.values()) if isinstance(value, dict) else [value]
            numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
            if "scal" in attribute.lower() and numbers and not any(numbers):
                yield module, name or type(module).__name__, attribute


def _uncalled_adapters(watch: Watch) -> Iterator[tuple[str, nn.Module]]:
    """The adapted layers that were not called though what they stand in was. A factor's layer is the lowest module
    above it that holds something else too."""
    factors, modules = _factors(watch), dict(watch.modules())
    layers: dict[str, nn.Module] = {}
    for i in factors:
        above = watch.parameters[i].name.split(".")[:-1]
        names = [".".join(above[:depth]) for depth in range(len(above), -1, -1)]
        holds = [name for name in names if any(id(p) not in factors for p in modules[name].parameters())]
        layers |= {name: modules[name] for name in holds[:1]}
    for name, layer in layers.items():
        parent = modules[name.rpartition(".")[0]]
        if id(layer) not in watch.called and (id(parent) in watch.called or isinstance(parent, _CONTAINERS)):
            yield name, layer


def _moved_by_an_optimizer(watch: Watch) -> list[Watched]:
    """The parameters that should have moved: with a gradient, and stepped at a rate above zero."""
    return [w for w in watch.parameters.values() if w.gradient and watch.rates.get(id(w.parameter))]


def _master(watch: Watch, watched: Watched) -> bool:
    """Whether an optimizer keeps the parameter in float32 beside."""
    copies = [
        value
        for optimizer in watch.optimizers
        for value in optimizer.state.get(watched.parameter, {}).values()
        if isinstance(value, Tensor) and value.shape == watched.before.shape and value.dtype == torch.float32
    ]
    return any(torch.allclose(copy, watched.before.float(), rtol=0.05, atol=1e-3) for copy in copies)


def _foreign(value: Any) -> Iterator[object]:
    """What in a nest is neither a tensor nor of a type that torch.load reads by default."""
    if isinstance(value, dict):
        for each in value.values():
            yield from _foreign(each)
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from _foreign(each)
    elif not isinstance(value, (Tensor, int, float, str, bytes, bool, type(None), torch.dtype, torch.device)):
        yield value


def _smaller_side(p: Tensor) -> int:
    """Of the matrix, or of each in a stack; a convolution counts as (out, the rest); 1 of a vector."""
    return min(p.shape[-2:]) if p.dim() == 3 else min(p.shape[0], p.numel() // p.shape[0]) if p.dim() else 1


def _names(watch: Watch, parameters: Iterable[nn.Parameter]) -> list[str]:
    names = {id(p): name for name, p in watch.named().items()}
    return [names.get(id(p), f"a parameter {tuple(p.shape)} that is not the model's") for p in parameters]


def _count(watched: list[Watched]) -> str:
    return "1 parameter" if len(watched) == 1 else f"{len(watched)} parameters"


def _listed(names: Iterable[str]) -> str:
    return some(list(names), most=3)
