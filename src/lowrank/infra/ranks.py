"""Several processes that train together: the group that ``torchrun`` starts, and what they send each other.

    with joined(device) as ranks:      None in a single process, which needs nothing of this and pays nothing
        ranks.sum_(tensors)            in place, bitwise the same on every rank
        ranks.gather(tensors)          those of all ranks, in the order of the ranks

Everything that is sent goes through these few functions, which count it. Bytes are what a ring sends per rank, whatever
the backend does: 2(R−1)/R of a sum's bytes, R−1 times what one rank contributes to a gather, all of a broadcast. A rank
receives as much.

A rank that no longer answers is an error (:class:`RankLost`) within the timeout. To name it, every rank keeps a socket
listening, its doorbell: nothing is sent there, but a process that is gone, or its machine, refuses the connection.

gloo on CPUs, nccl on GPUs. Shape legend: R ranks.
"""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
TIMEOUT_SECONDS = 300.0  # LOWRANK_TIMEOUT overrides it
BUCKET_BYTES = 25 * 2**20
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankLost(ConnectionError):
    """Another rank is gone or does not answer; the message names it where that can be known."""


class RanksDisagree(ValueError):
    """The ranks were not started alike; the message says who differs in what."""


@dataclass
class Traffic:
    """Bytes that one rank has sent and received."""

    sent: int = 0
    received: int = 0
    collectives: int = 0

    def count(self, size: int) -> None:
        self.sent, self.received, self.collectives = self.sent + size, self.received + size, self.collectives + 1


def ring_sum_bytes(size: int, ranks: int) -> int:
    """Bytes that each rank of a ring sends (and receives) to sum ``size`` bytes: scatter the sums, gather them.

    >>> ring_sum_bytes(1000, 4)
    1500
    """
    return 2 * (ranks - 1) * size // ranks


def ring_gather_bytes(size: int, ranks: int) -> int:
    """Bytes that each rank of a ring sends (and receives) until everyone has everyone's ``size`` bytes.

    >>> ring_gather_bytes(1000, 4)
    3000
    """
    return (ranks - 1) * size


def share(count: int, rank: int, ranks: int) -> range:
    """Which of ``count`` things are this rank's: consecutive, as even as it goes.

    >>> [list(share(5, rank, 2)) for rank in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(rank * count // ranks, (rank + 1) * count // ranks)


def largest_share(count: int, ranks: int) -> int:
    """The longest of the ranks' shares: what is gathered is padded to it."""
    return -(-count // ranks)


def is_first() -> bool:
    """Whether this process is the one that writes and prints: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0" or world_size() == 1


def first_on_node() -> bool:
    """Whether this process is the first on its machine, as ``torchrun`` says; rank 0 where nothing says so."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def world_size() -> int:
    """Processes in the group that ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Ranks:
    """This process among ``count``, as number ``rank``; made by :func:`joined`."""

    def __init__(self, device: torch.device, timeout: float):
        self.rank, self.count, self.device, self.timeout = dist.get_rank(), dist.get_world_size(), device, timeout
        self.traffic = Traffic()
        self._door = socket.create_server(("", 0), backlog=64)
        self._doors: list[tuple[str, int]] = []
        self._doors = self.gather_objects((_own_address(), self._door.getsockname()[1]))

    def __str__(self) -> str:
        return f"{self.count} ranks ({dist.get_backend()}, timeout {self.timeout:g} s), this is rank {self.rank}"

    def close(self) -> None:
        self._door.close()

    # --- what is said --------------------------------------------------------------------------------------------

    def say(self, what: str, collective: Callable[[], T], size: int) -> T:
        """Run a collective that somebody else has made (FSDP's), counted as ``size`` bytes sent and received.

        Raises:
            RankLost: it failed.
        """
        found: T = self._say(what, collective)
        self.traffic.count(size)
        return found

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks; all ranks give the same shapes, in the same order.

        Sums are float32 or wider, whatever the tensors are. Each number is summed on one rank and then passed on, so
        that all ranks hold the same bits.
        """
        self.sum_later(tensors)()

    def sum_later(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Start ``sum_`` and go on; the function returned waits for it and writes the sums. What the tensors are in the
        meantime does not matter."""
        started = []
        for bucket in _buckets(tensors):
            flat = torch.cat([t.detach().reshape(-1).to(_wide(t.dtype)) for t in bucket])
            wait = self._start("a sum", partial(dist.all_reduce, flat, async_op=True))
            started.append((bucket, flat, wait))
            self.traffic.count(ring_sum_bytes(flat.nbytes, self.count))

        def finish() -> None:
            for bucket, flat, wait in started:
                wait()
                for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view(tensor.shape))

        return finish

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """For each tensor everyone's, (R, ...); all ranks give the same shapes and dtypes, in the same order."""
        return self.gather_later(tensors)()

    def gather_later(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Start ``gather`` and go on; the function returned waits for it."""
        started = []
        for bucket in _buckets(tensors):
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            everyone = flat.new_empty(self.count, flat.numel())
            wait = self._start("a gathering", partial(dist.all_gather, list(everyone), flat, async_op=True))
            started.append((bucket, flat, everyone, wait))  # flat is read until then
            self.traffic.count(ring_gather_bytes(flat.nbytes, self.count))

        def finish() -> list[Tensor]:
            gathered: list[Tensor] = []
            for bucket, _, everyone, wait in started:
                wait()
                parts = everyone.split([t.numel() for t in bucket], dim=1)
                gathered += [part.reshape(self.count, *t.shape) for part, t in zip(parts, bucket, strict=True)]
            return gathered

        return finish

    def broadcast_(self, tensors: Sequence[Tensor], source: int) -> None:
        """Replace each tensor by that of rank ``source``; they may lie elsewhere than the ranks talk."""
        for bucket in _buckets(tensors):
            flat = torch.cat([t.detach().reshape(-1) for t in bucket]).to(self.device)
            self._say("a broadcast", lambda flat=flat: dist.broadcast(flat, source))  # type: ignore[misc]
            self.traffic.count(flat.nbytes)
            parts = flat.split([t.numel() for t in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def gather_objects(self, value: T) -> list[T]:
        """The ``value`` of every rank, in the order of the ranks; for small objects, since it is pickled."""
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self.device)
        sizes = self.gather([torch.tensor([data.numel()], device=self.device)])[0].flatten().tolist()
        padded = data.new_zeros(max(sizes))
        padded[: data.numel()] = data
        rows = self.gather([padded])[0].cpu()
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def total(self, *numbers: float) -> list[float]:
        """The sums over the ranks of a few numbers, in float64."""
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.sum_([values])
        return values.tolist()

    def agree(self, facts: Mapping[str, object]) -> None:
        """Refuse ranks that were not started alike.

        Raises:
            RanksDisagree: on every rank, naming each rank that differs from rank 0, and in what.
        """
        everyone = self.gather_objects(dict(facts))
        objections = [
            f"rank {rank} has {name} {theirs.get(name)}, rank 0 has {everyone[0].get(name)}"
            for rank, theirs in enumerate(everyone)
            for name in {**everyone[0], **theirs}
            if theirs.get(name) != everyone[0].get(name)
        ]
        if objections:
            raise RanksDisagree(
                f"the ranks were not started alike: {'; '.join(objections)}. Start all of them with the same command, "
                "data and version"
            )

    # --- who is gone ---------------------------------------------------------------------------------------------

    def _start(self, what: str, collective: Callable[[], Any]) -> Callable[[], object]:
        """Start a collective; the function returned waits for it."""
        started = self._say(what, collective)
        return lambda: self._say(what, started.wait)

    def _say(self, what: str, collective: Callable[[], Any]) -> Any:
        try:
            return collective()
        except RuntimeError as error:
            raise RankLost(self._explain(what, error)) from error

    def _explain(self, what: str, error: Exception) -> str:
        others = [r for r in range(len(self._doors)) if r != self.rank]
        lost = [r for r in others if not self._answers(r)]
        reason = _reason(error)
        if lost:
            names = ", ".join(f"rank {r} ({self._doors[r][0]})" for r in lost)
            return f"{names} is gone; rank {self.rank} was waiting for {what}: {reason}. Resume from the checkpoint"
        names = f"rank {others[0]}" if len(others) == 1 else f"one of ranks {', '.join(map(str, others))}"
        return (
            f"{names} lives but did not answer rank {self.rank} in {what} within {self.timeout:g} s ({reason}); if it "
            "is only slow, set LOWRANK_TIMEOUT to more seconds"
        )

    def _answers(self, rank: int) -> bool:
        """Whether the rank's process still holds its doorbell; looked at twice, as a process takes time to die."""
        if not _connects(self._doors[rank]):
            return False
        time.sleep(1.0)
        return _connects(self._doors[rank])


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks | None]:
    """The ranks of this run, None in a single process.

    They are torch.distributed's group; where the program has made none, it is made from the environment that
    ``torchrun`` sets, and left at the end.

    Raises:
        ValueError: the environment is incomplete, or there are more ranks on this machine than GPUs.
    """
    if not dist.is_available() or (not dist.is_initialized() and world_size() == 1):
        yield None
        return
    ours = not dist.is_initialized()
    timeout = float(os.environ.get("LOWRANK_TIMEOUT", TIMEOUT_SECONDS))
    if ours:
        _start(device, timeout)
    try:
        if dist.get_world_size() == 1:
            yield None
            return
        with closing(Ranks(device, timeout)) as ranks:
            yield ranks
        if ours:
            gc.collect()  # a sharded model holds the group in cycles, and one that outlives it aborts the process
    finally:
        if ours:
            dist.destroy_process_group()


def _start(device: torch.device, timeout: float) -> None:
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {world_size()} but {', '.join(missing)} is not set: start with torchrun, or unset "
            "WORLD_SIZE to train in one process"
        )
    if device.type == "cuda":
        local, present = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= present:
            raise ValueError(f"local rank {local} has no GPU of its own: use --nproc-per-node {present}")
        torch.cuda.set_device(local)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store = _store_of_this_life(timeout) if dist.is_torchelastic_launched() else None
        rank, count = (int(os.environ["RANK"]), world_size()) if store is not None else (-1, -1)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), store=store, rank=rank, world_size=count)
    except RuntimeError as error:
        raise RankLost(
            f"rank {os.environ['RANK']} did not find the other {world_size() - 1} at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {timeout:g} s: {str(error).splitlines()[0]}"
        ) from error


def _store_of_this_life(timeout: float) -> dist.Store:
    """A store in which nothing stands that the processes before a restart have left.

    The launcher's own outlives them, and a rank that looks for another in it may find where the dead one was. So rank 0
    names this life, and tells it to every process that answers; a dead one does not.
    """
    store, rank, count = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    if rank:
        me = uuid.uuid4().hex
        store.set(f"lowrank/rank/{rank}", me)
        life = store.get(f"lowrank/{me}").decode()
        store.set(f"lowrank/{me}/{life}", "")
        return dist.PrefixStore(life, store)
    life, end = uuid.uuid4().hex, time.monotonic() + timeout
    for other in range(1, count):
        them = ""
        while not them or not store.check([f"lowrank/{them}/{life}"]):
            if time.monotonic() > end:
                raise RuntimeError(f"rank {other} has not come")
            time.sleep(0.05 if them else 0.0)
            them = store.get(f"lowrank/rank/{other}").decode()
            store.set(f"lowrank/{them}", life)
    return dist.PrefixStore(life, store)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short fingerprint of tensors: names, shapes, dtypes and every bit."""
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def code_version(version: str) -> str:
    """``version`` and a short fingerprint of the package's sources."""
    found = hashlib.blake2b(digest_size=6)
    package = Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*.py")):
        found.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return f"{version} ({found.hexdigest()})"


# --- small helpers ---------------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype together, up to ``BUCKET_BYTES`` (or one larger tensor)."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(t.nbytes for t in bucket)
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _reason(error: Exception) -> str:
    """The first sentence of the backend's message, without the place in its source."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip())
    return text.splitlines()[0].partition(". ")[0] if text else type(error).__name__


def _own_address() -> str:
    """This machine's address as the others see it: the one from which it reaches the meeting point. Sends nothing."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "localhost"), 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _connects(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=2.0).close()
    except OSError:
        return False
    return True
