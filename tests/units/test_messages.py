"""What ranks send each other, and how long they wait for somebody who is silent."""

from __future__ import annotations

import pickle
import socket
import time

import pytest
import torch

from lowrank.distributed import process_group
from lowrank.distributed.process_group import RankLost, joined, listening, own_address
from lowrank.evaluate.text_task import TextTask
from lowrank.infra.checkpoint_tensors import random_state
from lowrank.infra.messages import NotAMessage, decode, encode


def test_data_and_tensors_arrive_as_they_were_sent() -> None:
    value = {"a": (1, 2.5, None, "ä"), 3: [float("inf"), True], "t": [torch.arange(6).view(2, 3).T, torch.tensor(True)]}
    found = decode(encode(value))
    assert found["a"] == value["a"]
    assert found[3] == value[3]
    assert torch.equal(found["t"][0], value["t"][0])  # type: ignore[index]
    assert found["t"][1].dtype == torch.bool
    state = random_state()
    assert decode(encode(state))["python"] == state["python"]


class Fires:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> object:
        return pytest.fail, ("a message was unpickled",)


@pytest.mark.parametrize(
    "message",
    [pickle.dumps(Fires()), b"", b"GET / HTTP/1.1\r\n\r\n", encode([1])[:-9], (2).to_bytes(8, "little") + b"[]"],
    ids=["pickle", "nothing", "a browser", "cut", "another tree"],
)
def test_what_is_no_message_is_refused_and_never_run(message: bytes) -> None:
    with pytest.raises(NotAMessage, match="on a network that only they use"):
        decode(message)


def test_objects_are_not_sent() -> None:
    with pytest.raises(TypeError, match="x is a Fires"):
        encode({"x": Fires()})


def test_a_tally_is_sent_as_numbers() -> None:
    one, other = TextTask().tally(), TextTask().tally()
    one.total, one.tokens, one.means, one.batches = 6.0, 3, 2.0, 1
    other.absorb(decode(encode(one.counted())))
    assert other.result() == one.result()


def test_a_rank_that_meets_a_silent_listener_ends_at_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system takes connections; nobody answers them
        port = silent.getsockname()[1]
        group = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in {**group, "LOWRANK_TIMEOUT": "1", "GLOO_SOCKET_IFNAME": "lo"}.items():
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        with pytest.raises(RankLost, match=f"127.0.0.1:{port} within 1 s: somebody listens there and does not answer"):
            joined(torch.device("cpu")).__enter__()
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", ""])
def test_a_timeout_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOWRANK_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"LOWRANK_TIMEOUT={text}: it is a number of seconds above 0"):
        joined(torch.device("cpu")).__enter__()


def test_listens_where_it_is_told_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(process_group, "_interfaces", lambda: {"lo": "127.0.0.1", "eth7": "10.9.8.7"})
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert own_address() == "127.0.0.1"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=eth7")
    assert own_address() == "10.9.8.7"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME=eth9: there are lo, eth7"):
        own_address()
    with listening("127.0.0.1") as server:
        port = server.getsockname()[1]
        assert server.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1:{port}"):
            listening("127.0.0.1", port)
