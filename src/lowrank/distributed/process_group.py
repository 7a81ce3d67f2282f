"""Several processes that train together: the group that ``torchrun`` starts, and what they send each other.

    with joined(device) as ranks:      None in a single process, which needs nothing of this and pays nothing
        ranks.sum_(tensors)            in place, bitwise the same on every rank
        ranks.gather(tensors)          those of all ranks, in the order of the ranks

Everything that is sent goes through a few collectives (``collectives.Group``), which count it.

A rank that no longer answers is an error (:class:`RankLost`) within the timeout. To name it, every rank keeps a
liveness socket listening: nothing is sent there, but a process that is gone, or its machine, refuses the connection.

gloo on CPUs, nccl on GPUs. What this module opens listens on one interface: the one that GLOO_SOCKET_IFNAME or
NCCL_SOCKET_IFNAME names, else the one by which the meeting point (MASTER_ADDR) is reached.
"""

from __future__ import annotations

import copy
import gc
import os
import queue
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank.distributed.collectives import Group, Traffic, buckets, ring_gather_bytes, ring_sum_bytes
from lowrank.infra.fingerprints import digest

T = TypeVar("T")
TIMEOUT_SECONDS = 300.0  # LOWRANK_TIMEOUT overrides it
_ADDRESS_OF = 0x8915  # Linux: SIOCGIFADDR
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankLost(ConnectionError):
    """Another rank is gone or does not answer; the message names it where that can be known."""


class RanksDisagree(ValueError):
    """The ranks were not started alike; the message says who differs in what."""


def is_first() -> bool:
    """Whether this process is the one that writes and prints: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0" or world_size() == 1


def first_on_node() -> bool:
    """Whether this process is the first on its machine, as ``torchrun`` says; rank 0 where nothing says so."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def world_size() -> int:
    """Processes in the group that ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class ProcessGroup(Group):
    """This process among ``count``, as number ``rank``: all that there are (:func:`joined`), or some (``divided``)."""

    def __init__(self, device: torch.device, timeout: float):
        self.rank, self.count, self.device, self.timeout = dist.get_rank(), dist.get_world_size(), device, timeout
        self.traffic, self.between = Traffic(), True
        self.numbers: Sequence[int] = range(self.count)  # of each member among all ranks
        self.process_group: Any = dist.group.WORLD
        self._mesh: Any = None
        self._divided: dict[tuple[tuple[int, ...], ...], ProcessGroup] = {}
        self._liveness = listening(own_address())
        self._addresses: list[tuple[str, int]] = []
        self._addresses = self.gather_objects(self._liveness.getsockname()[:2])

    def __str__(self) -> str:
        return f"{self.count} ranks ({dist.get_backend()}, timeout {self.timeout:g} s), this is rank {self.rank}"

    @property
    def mesh(self) -> Any:
        """torch's device mesh of one dimension with these ranks."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.utils._python_dispatch import _disable_current_modes

        if self._mesh is None:
            with _disable_current_modes():  # the ranks' numbers are no bytes of a model that is being counted
                self._mesh = DeviceMesh.from_group(self.process_group, self.device.type)
        return self._mesh

    def close(self) -> None:
        self._divided.clear()
        self._liveness.close()

    def divided(self, groups: Sequence[Sequence[int]], *, between: bool) -> ProcessGroup:
        """The one of ``groups``, which divide all ranks, that this rank is in. All ranks must call it.

        Args:
            groups: the numbers of each group's ranks.
            between: what is sent there goes to other workers, and is counted as such; what is sent to all is too.
        """
        key = tuple(tuple(numbers) for numbers in groups)
        if key in self._divided:  # making groups takes time, and torch keeps them until the end
            return self._divided[key]
        timeout, numbers = timedelta(seconds=self.timeout), [list(numbers) for numbers in key]
        make = partial(dist.new_subgroups_by_enumeration, numbers, timeout=timeout)
        group, _ = self._guarded("a group of them", make)
        found = self._divided[key] = copy.copy(self)  # which counts into the same traffic
        found.numbers = next(numbers for numbers in key if self.rank in numbers)
        found.rank, found.count = found.numbers.index(self.rank), len(found.numbers)
        found.process_group, found.between, found._mesh = group, between, None
        found._addresses = [self._addresses[number] for number in found.numbers]
        return found

    # --- collectives ---------------------------------------------------------------------------------------------

    def collective(self, what: str, run: Callable[[], T], size: int) -> T:
        """Run a collective that somebody else has made (FSDP's), counted as ``size`` bytes sent and received.

        Raises:
            RankLost: it failed.
        """
        found: T = self._guarded(what, run)
        self.traffic.count(size, between=self.between)
        return found

    def _add_up(self, flat: Tensor) -> Callable[[], object]:
        reduce = partial(dist.all_reduce, flat, group=self.process_group, async_op=True)
        wait = self._start("a sum", reduce)
        self.traffic.count(ring_sum_bytes(flat.nbytes, self.count), between=self.between)
        return wait

    def _collect(self, flat: Tensor) -> Callable[[], Tensor]:
        gathered = flat.new_empty(self.count, flat.numel())
        gather = partial(dist.all_gather, list(gathered), flat, group=self.process_group, async_op=True)
        wait = self._start("a gathering", gather)
        self.traffic.count(ring_gather_bytes(flat.nbytes, self.count), between=self.between)

        def finish() -> Tensor:
            wait()
            return gathered.view(self.count, flat.numel())  # and so flat is held until all have read it

        return finish

    def broadcast_(self, tensors: Sequence[Tensor], source: int) -> None:
        """Replace each tensor by that of rank ``source``; they may lie elsewhere than the ranks talk."""
        number = self.numbers[source]
        for bucket in buckets(tensors):
            flat = torch.cat([t.detach().reshape(-1) for t in bucket]).to(self.device)
            self._guarded("a broadcast", partial(dist.broadcast, flat, number, group=self.process_group))
            self.traffic.count(flat.nbytes, between=self.between)
            parts = flat.split([t.numel() for t in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def agree(self, facts: Mapping[str, object]) -> None:
        """Refuse ranks that were not started alike.

        Raises:
            RanksDisagree: on every rank, naming each rank that differs from the first, and in what.
        """
        first, *others = zip(self.numbers, self.gather_objects(dict(facts)), strict=True)
        objections = [
            f"rank {rank} has {name} {theirs.get(name)}, rank {first[0]} has {first[1].get(name)}"
            for rank, theirs in others
            for name in {**first[1], **theirs}
            if theirs.get(name) != first[1].get(name)
        ]
        if objections:
            raise RanksDisagree(
                f"the ranks were not started alike: {'; '.join(objections)}. Start all of them with the same command, "
                "data and version"
            )

    def agree_on(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse ranks whose tensors differ.

        Raises:
            RanksDisagree: as ``agree``.
        """
        self.agree({"weights": digest(tensors)})

    # --- who is gone ---------------------------------------------------------------------------------------------

    def _start(self, what: str, start: Callable[[], Any]) -> Callable[[], object]:
        """Start a collective; the function returned waits for it."""
        started = self._guarded(what, start)
        return lambda: self._guarded(what, started.wait)

    def _guarded(self, what: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except RuntimeError as error:
            raise RankLost(self._explain(what, error)) from error

    def _explain(self, what: str, error: Exception) -> str:
        me, others = self.numbers[self.rank], [r for r in range(len(self._addresses)) if r != self.rank]
        lost = [r for r in others if not self._answers(r)]
        reason = _reason(error)
        if lost:
            names = ", ".join(f"rank {self.numbers[r]} ({self._addresses[r][0]})" for r in lost)
            return f"{names} is gone; rank {me} was waiting for {what}: {reason}. Resume from the checkpoint"
        numbers = ", ".join(str(self.numbers[r]) for r in others)
        names = f"rank {numbers}" if len(others) == 1 else f"one of ranks {numbers}"
        return (
            f"{names} lives but did not answer rank {me} in {what} within {self.timeout:g} s ({reason}); if it "
            "is only slow, set LOWRANK_TIMEOUT to more seconds"
        )

    def _answers(self, rank: int) -> bool:
        """Whether the process still holds its liveness socket; looked at for a second, as a process takes time to die.

        Often, and not once at the end of that second: a launcher that notices the death first stops this process too.
        """
        end = time.monotonic() + 1.0
        while _connects(self._addresses[rank]):
            if time.monotonic() > end:
                return True
            time.sleep(0.02)
        return False


@contextmanager
def joined(device: torch.device) -> Iterator[ProcessGroup | None]:
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
    timeout = _timeout_seconds()
    if ours:
        _start(device, timeout)
    try:
        if dist.get_world_size() == 1:
            yield None
            return
        with closing(ProcessGroup(device, timeout)) as ranks:
            yield ranks
        if ours:
            gc.collect()  # a sharded model holds the group in cycles, and one that outlives it aborts the process
    finally:
        if ours:
            dist.destroy_process_group()


def _timeout_seconds() -> float:
    text = os.environ.get("LOWRANK_TIMEOUT", str(TIMEOUT_SECONDS))
    with suppress(ValueError):
        if 0 < float(text) < 1e9:
            return float(text)
    raise ValueError(f"LOWRANK_TIMEOUT={text}: it is a number of seconds above 0, such as 300")


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
    backend, rank, count = "nccl" if device.type == "cuda" else "gloo", int(os.environ["RANK"]), world_size()
    _keep_gloo_to(own_address())
    try:
        store = within(timeout, lambda: _meet(rank, count, timeout))
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), store=store, rank=rank, world_size=count)
    except RuntimeError as error:
        raise RankLost(
            f"rank {rank} did not find the other {count - 1} at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {timeout:g} s: {str(error).splitlines()[0]}"
        ) from error


def _meet(rank: int, count: int, timeout: float) -> dist.Store:
    """The store in which the ranks find each other."""
    if dist.is_torchelastic_launched():
        return _store_of_this_generation(timeout)
    # torch's own rendezvous would listen on every interface
    server = listening(own_address(), int(os.environ["MASTER_PORT"])) if rank == 0 else None
    where = (os.environ["MASTER_ADDR"] if server is None else server.getsockname()[0], int(os.environ["MASTER_PORT"]))
    how: dict[str, Any] = {} if server is None else {"master_listen_fd": server.detach()}
    return dist.TCPStore(*where, count, server is not None, timedelta(seconds=timeout), **how)


def _store_of_this_generation(timeout: float) -> dist.Store:
    """A store in which nothing stands that the processes before a restart have left.

    The launcher's own outlives them, and a rank that looks for another in it may find where the dead one was. So rank 0
    names this generation of processes to every one that answers; a dead one does not.
    """
    store, rank, count = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    if rank:
        me = uuid.uuid4().hex
        store.set(f"lowrank/rank/{rank}", me)
        generation = store.get(f"lowrank/{me}").decode()
        store.set(f"lowrank/{me}/{generation}", "")
        return dist.PrefixStore(generation, store)
    generation, end = uuid.uuid4().hex, time.monotonic() + timeout
    for other in range(1, count):
        them = ""
        while not them or not store.check([f"lowrank/{them}/{generation}"]):
            if time.monotonic() > end:
                raise RuntimeError(f"rank {other} has not come")
            time.sleep(0.05 if them else 0.0)
            them = store.get(f"lowrank/rank/{other}").decode()
            store.set(f"lowrank/{them}", generation)
    return dist.PrefixStore(generation, store)


def within(seconds: float, function: Callable[[], T]) -> T:
    """What ``function`` returns or raises. One that does not come to an end, as torch's store does not where somebody
    takes the connection and is silent, is left to itself, in a thread that ends with the process.

    Raises:
        RuntimeError: it takes longer than that.
    """
    outcome: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def run() -> None:
        try:
            outcome.put((True, function()))
        except BaseException as error:
            outcome.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        good, found = outcome.get(timeout=seconds + 1.0)  # its own timeout has better words
    except queue.Empty:
        raise RuntimeError("somebody listens there and does not answer") from None
    if not good:
        raise found
    return cast(T, found)


# --- where to listen -------------------------------------------------------------------------------------------------


def listening(address: str, port: int = 0) -> socket.socket:
    """A socket that listens at one address of this machine and at no other.

    Raises:
        ValueError: it cannot.
    """
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=64)
    except OSError as error:
        where = f"{address}:{port}" if port else address
        raise ValueError(
            f"cannot listen at {where} ({error.strerror or error}): give a free port of the first machine as "
            "MASTER_PORT, and the interface by which the others reach it as GLOO_SOCKET_IFNAME"
        ) from error


def own_address() -> str:
    """This machine's address as the others see it: of the interface that GLOO_SOCKET_IFNAME (or NCCL's) names, else the
    one from which the meeting point is reached. Sends nothing.

    Raises:
        ValueError: there is no such interface.
    """
    if name := os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME", "").lstrip("="):
        known = _interfaces()
        found = known.get(name.split(",")[0])
        if found is None and "GLOO_SOCKET_IFNAME" in os.environ and known:
            raise ValueError(f"GLOO_SOCKET_IFNAME={name}: there are {', '.join(known)}")
        if found is not None:
            return found
    master = os.environ.get("MASTER_ADDR", "localhost")
    with suppress(OSError):
        family, kind, _, _, place = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with closing(socket.socket(family, kind)) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def _keep_gloo_to(address: str) -> None:
    """Have gloo, which else asks for the host's name, listen where this process does; where that is the machine itself,
    only if no other takes part."""
    here = address.startswith("127.") or address == "::1"
    alone = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]) == os.environ["WORLD_SIZE"]
    names = [name for name, its in _interfaces().items() if its == address]
    if names and (alone or not here):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def _interfaces() -> dict[str, str]:
    """The IPv4 address of each network interface that has one, by name; empty where the system does not say."""
    found: dict[str, str] = {}
    with suppress(ImportError, OSError), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        import fcntl

        for _, name in socket.if_nameindex():
            with suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe, _ADDRESS_OF, request)[20:24])
    return found


# --- small helpers ---------------------------------------------------------------------------------------------------


def _reason(error: Exception) -> str:
    """The first sentence of the backend's message, without the place in its source."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip())
    return text.splitlines()[0].partition(". ")[0] if text else type(error).__name__


def _connects(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=2.0).close()
    except OSError:
        return False
    return True
