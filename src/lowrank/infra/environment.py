"""What a run ran on: versions, hardware, the source's commit, the command line. Written to `env.json`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "lowrank-training",
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "datasets",
    "timm",
    "torchvision",
    "medmnist",
)


def environment() -> dict[str, Any]:
    """Everything about this process that a run's numbers or speed may depend on, as JSON."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "commit": _commit(Path(__file__).resolve().parent),
    }


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free on ``device``, on a CPU also by a container's limit; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for limit, used in _CONTROL_GROUP:
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            free.append(max(0, int((_GROUPS / limit).read_text()) - int((_GROUPS / used).read_text()) + _cached()))
    return min(free, default=None)


_GROUPS = Path("/sys/fs/cgroup")  # of Linux, as a container sees it; versions 2 and 1
_CONTROL_GROUP = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def _cached() -> int:
    """Bytes of files that count as a control group's memory, and are let go when they are wanted."""
    for file in (_GROUPS / "memory.stat", _GROUPS / "memory" / "memory.stat"):
        with suppress(OSError, ValueError):
            told = dict(line.split() for line in file.read_text().splitlines())
            return int(told.get("total_inactive_file", told.get("inactive_file", 0)))
    return 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's model; Linux tells it only in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": each.name, "bytes": each.total_memory, "capability": f"{each.major}.{each.minor}"} for each in found
    ]


def _commit(folder: Path) -> str | None:
    """Commit of the checkout that tracks this very file, with "+changes" where the sources differ from it."""
    if _git(folder, "ls-files", "--error-unmatch", "environment.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    return f"{commit}+changes" if commit and _git(folder.parent, "status", "--porcelain", "--", ".") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
