"""In the ``Trainer`` of transformers, and what derives from it (TRL): the optimizer, and checkpoints that open.

    trainer = Trainer(
        model,
        args,
        train_dataset=…,
        optimizers=lowrank.interop.trainer(model, args, lowrank.methods.lora(rank=16)),
        callbacks=[lowrank.interop.MergeOnSave()],
    )

The Trainer does the rest: its schedule multiplies the rate, ``max_grad_norm`` clips, checkpoints hold the optimizer's
state, and training goes on from them to the last bit.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from lowrank.adapters.layers import adapted_layers
from lowrank.linalg.rounding import wide
from lowrank.methods.groups import groups
from lowrank.methods.method import Method
from lowrank.optim.optimizer import Optimizer
from lowrank.plan.plan import apply_

if TYPE_CHECKING:
    from transformers import TrainingArguments

TRAINED = "lowrank_training.safetensors"  # the model as it trains, beside the merged one


def trainer(
    model: nn.Module, args: TrainingArguments, method: Method, *, per_layer: bool = False, seed: int | None = None
) -> tuple[Optimizer, None]:
    """Bind ``method`` to ``model`` in place; gives what ``Trainer(optimizers=…)`` takes.

    Rate, weight decay, accumulation and, where they are not the defaults, Adam's constants are those of ``args``. The
    schedule (the second of the two) is the Trainer's own.

    Args:
        model: as it is given to the Trainer.
        args: the Trainer's, complete.
        method: from ``lowrank.methods``, or your own.
        per_layer: step each layer within the backward pass, so that no more than one gradient exists.
        seed: of adapters and rounding; ``args.seed`` by default.

    Raises:
        ValueError: ``per_layer`` with ``max_grad_norm`` (a global norm needs all gradients) or with fp16 (its scaler is
            the Trainer's), FSDP or DeepSpeed, which shard what the method needs whole, and whatever ``apply_`` refuses.
    """
    if per_layer and args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm} clips by the norm of all gradients, and with per_layer=True no two "
            "exist at a time: set max_grad_norm=0 in the arguments, or per_layer=False"
        )
    if per_layer and args.fp16:
        raise ValueError("fp16 scales the loss by a scaler that per_layer=True does not see: use bf16=True instead")
    sharding = "FSDP" if getattr(args, "fsdp", None) else "DeepSpeed" if getattr(args, "deepspeed", None) else None
    if sharding is not None:
        raise ValueError(
            f"the Trainer's {sharding} shards the model by itself; lowrank train --engine fsdp does it here"
        )
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        model.enable_input_require_grads()  # type: ignore[operator]  # else nothing behind frozen layers gets a gradient
    betas, eps = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
    given: dict[str, Any] = {} if betas == (0.9, 0.999) else {"betas": betas}
    given |= {} if eps == 1e-8 else {"eps": eps}
    plan = apply_(model, groups(**given)(method) if given else method, seed=args.seed if seed is None else seed)
    accumulate = args.gradient_accumulation_steps if per_layer else 1  # else it is torch that adds up
    return plan.optimizer(args.learning_rate, args.weight_decay, per_layer=per_layer, accumulate=accumulate), None


class MergeOnSave(TrainerCallback):
    """What the Trainer saves opens as the trained model, adapters merged, by transformers alone.

    Without it a checkpoint of a model with adapters opens as its untrained base: ``from_pretrained`` passes over what
    it does not know. With it every ``save_pretrained`` of the model writes the merged weights, and beside them
    ``lowrank_training.safetensors``, by which the Trainer goes on where it was. The model in training is untouched.

    Raises:
        FileNotFoundError: on going on from a checkpoint that has no such file.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if next(adapted_layers(model), None) is None:
            return
        plain_save = model.save_pretrained

        def save_pretrained(folder: str | os.PathLike[str], *, state_dict: Any = None, **options: Any) -> None:
            if next(adapted_layers(model), None) is None:  # unloaded by now
                plain_save(folder, state_dict=state_dict, **options)
                return
            if options.get("is_main_process", True):
                Path(folder).mkdir(parents=True, exist_ok=True)
                held = model.state_dict() if state_dict is None else state_dict
                save_file({name: tensor.contiguous().clone() for name, tensor in held.items()}, Path(folder) / TRAINED)
            plain_save(folder, state_dict=merged_state(model), **options)

        model.save_pretrained = save_pretrained

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step:
            given = args.resume_from_checkpoint
            named = Path(given) if isinstance(given, str) and Path(given).is_dir() else None
            self._load_(model, named or Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_(model, Path(state.best_model_checkpoint))

    def _load_(self, model: nn.Module, folder: Path) -> None:
        if next(adapted_layers(model), None) is None:
            return
        file = folder / TRAINED
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is not there: the checkpoint was saved without MergeOnSave, or lies elsewhere than in "
                "output_dir; say where in the arguments' resume_from_checkpoint"
            )
        model.load_state_dict(load_file(file))


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model`` with every adapter merged, by the names of the plain model, which stays as it is."""
    layers = dict(adapted_layers(model))
    merged: dict[int, nn.Parameter] = {}  # by the weight's id: layers may share one
    for layer in layers.values():
        weight = layer._parameters["weight"]
        assert weight is not None
        copied = merged.setdefault(id(weight), nn.Parameter(weight.detach().clone(), requires_grad=False))
        layer._parameters["weight"] = copied
        try:
            for _, adapter, W in layer.pieces():
                W.copy_(adapter.merged(W.to(wide(W.dtype))))
        finally:
            layer._parameters["weight"] = weight
    inside = tuple(f"{name}.adapters." for name in layers)
    state = model.state_dict(keep_vars=True).items()
    return {name: merged.get(id(held), held).detach() for name, held in state if not name.startswith(inside)}
