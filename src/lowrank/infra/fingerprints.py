"""Short fingerprints of tensors and of this package's code: ranks see by them that they were started alike, and
adapters that a base is theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short fingerprint of tensors: names, shapes, dtypes and every bit."""
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_of(parameter: Tensor) -> str:
    """A short fingerprint of one tensor's shape, dtype and bytes."""
    values = parameter.detach().cpu().contiguous()
    content = f"{tuple(values.shape)} {values.dtype}".encode() + values.view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def code_version(version: str) -> str:
    """``version`` and a short fingerprint of the package's sources."""
    found = hashlib.blake2b(digest_size=6)
    package = Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*.py")):
        found.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return f"{version} ({found.hexdigest()})"
