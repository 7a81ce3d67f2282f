"""The hub is asked once whether it answers; where it does not, nothing waits for it again."""

import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from lowrank.infra.hub import ask_hub, located


@pytest.fixture
def endpoint(monkeypatch):
    """Sets where the hub is, as somebody would who has a mirror, and forgets that it was asked."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that the variable's own value comes back
    monkeypatch.delenv("HF_HUB_OFFLINE")
    ask_hub.cache_clear()
    yield lambda url: monkeypatch.setenv("HF_ENDPOINT", url)
    ask_hub.cache_clear()


def test_a_hub_that_is_silent_is_told_once_and_left_alone(endpoint, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    endpoint(url)
    assert located(str(tmp_path)) == tmp_path  # a folder asks nobody
    assert "HF_HUB_OFFLINE" not in os.environ
    with pytest.warns(UserWarning, match=r"does not answer .*refused.*only what its cache here holds"):
        assert located("some/model") == "some/model"
    assert located("some/model") == "some/model"

    import huggingface_hub

    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_anything_is_used(endpoint):
    class Refuses(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    endpoint(f"http://127.0.0.1:{server.server_port}")
    ask_hub()
    thread.join()
    server.server_close()
    assert "HF_HUB_OFFLINE" not in os.environ
