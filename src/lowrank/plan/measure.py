"""The ledger of anybody's script: what a step of this model, with this optimizer and this batch, takes in memory.

    sheet = lowrank.ledger(model, optimizer, batch); print(sheet)      before the first step, which is not taken
    with lowrank.ledger(model, optimizer, batch) as sheet: …one step…  the same, and what that step really took
    print(sheet)

For the prediction the model's parameters and buffers, and the batch's floating-point tensors, are for a moment replaced
by tensors that have shapes and no numbers; steps of every kind but merges are taken on those (``plan.trace``), and all
is put back. The batch's ids and masks stay as they are, since by them a model chooses how it attends.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from lowrank.models.blocks import blocks_of
from lowrank.optim.optimizer import Optimizer
from lowrank.plan.live_bytes import ACTIVATIONS, STATIC, FakeLiveBytes, LiveBytes, Peak, undisturbed
from lowrank.plan.memory_sheet import Sheet
from lowrank.plan.plan import Plan
from lowrank.plan.trace import Setup, Steps, hold_static

Loss = Callable[[nn.Module, Any], Tensor]


class Ledgered:
    """A prediction, and as a context what was measured in it. ``predicted`` is the ``lowrank.plan.memory_sheet.Sheet``,
    ``measured`` the peak of torch's bytes in the context, None before."""

    def __init__(self, predicted: Sheet, model: nn.Module, optimizer: torch.optim.Optimizer | None):
        self.predicted, self.measured = predicted, None
        self._model, self._optimizer = model, optimizer
        self._live: LiveBytes | None = None

    predicted: Sheet
    measured: int | None

    @property
    def total(self) -> int:
        """The predicted peak in bytes, with what a GPU adds where the model is on one."""
        return self.predicted.total

    def __str__(self) -> str:
        if self.measured is None:
            return str(self.predicted)
        return str(replace(self.predicted, measured={"first": self.measured}))

    def __enter__(self) -> Ledgered:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        self._live = LiveBytes()
        hold_static(self._live, self._model, self._optimizer)
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is None:
            self.measured = torch.cuda.max_memory_allocated(self._device)
            return
        self._live.__exit__(*error)
        self.measured = self._live.peak
        self._live = None

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device


def ledger(model: nn.Module, optimizer_or_plan: Any, batch: Any, loss: Loss | None = None) -> Ledgered:
    """What a training step takes in memory, by what holds it; as a context manager also measured.

    Args:
        model: any module, PEFT's included, as it is about to be trained. It is left as it was.
        optimizer_or_plan: an optimizer of torch or of this library, a plan (``lowrank.apply_``), or the
            ``TrainingArguments`` of a transformers ``Trainer``.
        batch: what ``loss`` takes, of tensors in any nest; of floating-point ones only shapes and dtypes count.
        loss: ``loss(model, batch)`` gives the scalar to go backward from; by default ``model(**batch).loss``.

    Raises:
        TypeError: something else was given as the optimizer, or a batch that the default loss cannot take.
        ValueError: the loss is no scalar, or trains nothing.
    """
    loss = loss or loss_of(batch)
    live = FakeLiveBytes()
    modes = [(module, module.training, module.__dict__.get("on_read")) for module in model.modules()]
    try:
        static = _traced(live, model, optimizer_or_plan, batch, loss)
    finally:
        for module, training, on_read in modes:
            module.training = training
            if "on_read" in module.__dict__:
                module.__dict__["on_read"] = on_read
    parameters = list(model.parameters())
    blocks = blocks_of(model)
    sheet = Sheet(
        title=f"{type(model).__name__} with {type(optimizer_or_plan).__name__}",
        counts=live.counts,
        static={kind: size for kind, size in static.items() if size},
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        blocks=0 if blocks is None else len(blocks),
        on_card=any(p.device.type == "cuda" for p in parameters),
    )
    real = optimizer_or_plan if isinstance(optimizer_or_plan, torch.optim.Optimizer) else None
    return Ledgered(sheet, model, real)


def _traced(live: FakeLiveBytes, model: nn.Module, given: Any, batch: Any, loss: Loss) -> dict[str, int]:
    """Go through steps of every kind but merges, which would change what adapters count; gives the static bytes."""
    with undisturbed(), _arguments(model, given) as (accumulate, autocast), _faked(live, model) as fake, live:
        live.kind = ACTIVATIONS
        optimizer = _optimizer(model, given, fake)
        data = tree_map_only(Tensor, lambda t: live.fake.from_tensor(t) if t.is_floating_point() else t, batch)
        live.hold((t for t in tree_iter(data) if isinstance(t, Tensor)), ACTIVATIONS)
        hold_static(live, model, optimizer)
        static = {kind: live.counts.parts[kind] for kind in STATIC}
        model.train()
        setup = Setup(
            model=model,
            optimizer=optimizer,
            loss=lambda: _scalar(loss(model, data)),
            accumulate=accumulate,
            norm=False,
            autocast=autocast,
        )
        Steps(live, setup).all()
    return _with_late_state(static, live.counts.peaks)


def loss_of(batch: Any) -> Loss:
    """The default loss, ``model(**batch).loss``.

    Raises:
        TypeError: a batch that it cannot take.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"the default loss is model(**batch).loss, and the batch is a {type(batch).__name__}: give loss=lambda "
            "model, batch: …"
        )
    return _own_loss


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    out = model(**batch)
    loss: Tensor | None = getattr(out, "loss", None)
    if loss is None:
        raise TypeError(
            f"model(**batch) of {type(model).__name__} has no loss: put labels into the batch, or give loss=lambda "
            "model, batch: …"
        )
    return loss


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss must give one number, not {getattr(loss, 'shape', type(loss).__name__)}")
    return loss


def _with_late_state(static: Mapping[str, int], peaks: Mapping[Any, Peak]) -> dict[str, int]:
    """State that an optimizer of torch makes in its first step counts as held."""
    last = max(peaks, key=lambda place: sum(peaks[place].parts.get(kind, 0) for kind in STATIC))
    return {kind: max(size, peaks[last].parts.get(kind, 0)) for kind, size in static.items()}


@contextmanager
def _faked(live: FakeLiveBytes, model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """The model with tensors without numbers; gives them by the id of the real ones, and puts those back."""
    before: list[tuple[Any, str, Tensor]] = []
    fake: dict[int, Tensor] = {}
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    before.append((holder, name, tensor))
                    fake.setdefault(id(tensor), live.fake.from_tensor(tensor))
    try:
        for holder, name, tensor in before:
            holder[name] = fake[id(tensor)]
        yield fake
    finally:
        for holder, name, tensor in before:
            holder[name] = tensor


def _optimizer(model: Any, given: Any, fake: Mapping[int, Tensor]) -> torch.optim.Optimizer:
    """An optimizer like the given one for the tensors without numbers."""
    if isinstance(given, Plan):
        return given.optimizer()
    if isinstance(given, Optimizer):
        rules = [{**group, "params": _named(group, fake)} for group in given.param_groups]
        plain = [{k: v for k, v in group.items() if k not in ("param_names", "steps")} for group in rules]
        how: dict[str, Any] = {"accumulate": given.accumulate, "clip_per_layer": given.clip_per_layer}
        return Optimizer(plain, per_layer=given.per_layer, **how)
    if isinstance(given, torch.optim.Optimizer):
        optimizer = copy.copy(given)
        groups = [{**g, "params": [fake.get(id(p), p) for p in g["params"]]} for g in given.param_groups]
        optimizer.param_groups, optimizer.state = groups, defaultdict(dict)
        return optimizer
    if hasattr(given, "gradient_accumulation_steps"):
        from transformers import Trainer

        kind, options = Trainer.get_optimizer_cls_and_kwargs(given, model)
        made: torch.optim.Optimizer = kind([p for p in model.parameters() if p.requires_grad], **options)
        return made
    raise TypeError(
        f"{type(given).__name__} is none of a torch optimizer, a lowrank.Plan and transformers' TrainingArguments"
    )


def _named(group: Mapping[str, Any], fake: Mapping[int, Tensor]) -> list[Any]:
    params = [fake[id(p)] for p in group["params"]]
    return list(zip(group["param_names"], params, strict=True)) if group.get("param_names") else params


@contextmanager
def _arguments(model: Any, given: Any) -> Iterator[tuple[int, Callable[[], AbstractContextManager[object]]]]:
    """(micro-batches to go through, autocast) as a Trainer's arguments say, its checkpointing switched on meanwhile."""
    accumulate = int(getattr(given, "accumulate", 1) or 1)
    if not hasattr(given, "gradient_accumulation_steps"):
        yield (
            min(2, accumulate) if accumulate == 1 or not getattr(given, "per_layer", False) else accumulate,
            nullcontext,
        )
        return
    dtype = torch.bfloat16 if given.bf16 else torch.float16 if given.fp16 else None
    device = next(model.parameters()).device.type

    def autocast() -> AbstractContextManager[object]:
        return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)

    switched = given.gradient_checkpointing and not getattr(model, "is_gradient_checkpointing", False)
    if switched:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield min(2, given.gradient_accumulation_steps), autocast
    finally:
        if switched:
            model.gradient_checkpointing_disable()
