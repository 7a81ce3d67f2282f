"""What processes send each other: data as JSON, tensors as safetensors. Nothing in a message can run code, as a pickle
could, whoever has sent it.

    8 bytes: n | n bytes of JSON: {"tree": …, "notes": …} | safetensors
"""

from __future__ import annotations

import json
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from lowrank.infra.checkpoint_tensors import PyTree, flatten, pack, unflatten, unpack


class NotAMessage(ValueError):
    """Bytes that ``encode`` has not made."""


def encode(value: PyTree) -> bytes:
    """A pytree of data and tensors as bytes.

    Raises:
        TypeError: something in it is neither data nor a tensor.
    """
    tree, leaves = flatten(value)
    packed, notes = pack({name: tensor.detach().cpu() for name, tensor in leaves.items()})
    head = json.dumps({"tree": tree, "notes": notes}, allow_nan=False).encode()
    return len(head).to_bytes(8, "little") + head + save(packed)


def decode(message: bytes) -> Any:
    """The pytree that ``encode`` was given, tensors on the CPU.

    Raises:
        NotAMessage: these bytes are something else.
    """
    end = 8 + int.from_bytes(message[:8], "little")
    try:
        head = json.loads(message[8:end])
        return unflatten(head["tree"], unpack(load(message[end:]), head["notes"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise NotAMessage(
            f"what another rank has sent is no message of lowrank's ({type(error).__name__}): start all ranks with the "
            "same version, on a network that only they use"
        ) from error
