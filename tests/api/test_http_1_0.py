"""Clients of HTTP/1.0 get streams that they can read."""

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from uvicorn.protocols.http import httptools_impl

from serve_app.api import http_1_0
from tests.api.conftest import Endpoint


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    """The class is in uvicorn's module for the time of a test."""
    before = httptools_impl.RequestResponseCycle
    http_1_0.install()
    yield
    httptools_impl.RequestResponseCycle = before  # type: ignore[misc]


def old_client(url: str, path: str, body: dict[str, object] | None = None) -> tuple[str, bytes]:
    """Returns the head and body that a client of HTTP/1.0 reads until the connection ends."""
    parts = urlsplit(url)
    data = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        head = f"{method} {path} HTTP/1.0\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    first, _, rest = answer.partition(b"\r\n\r\n")
    return first.decode().lower(), rest


REQUEST = {"prompt": "Hi", "max_tokens": 3, "stream": True}


def test_a_stream_has_no_chunks(endpoint: Endpoint, http: httpx.Client) -> None:
    """Its bytes are the events alone, the same as an HTTP/1.1 client decodes."""
    head, events = old_client(endpoint.url, "/prompt", REQUEST)
    assert head.startswith("http/1.0 200")
    assert "transfer-encoding" not in head
    assert "content-length" not in head
    assert events == http.post("/prompt", json=REQUEST).content


def test_a_whole_answer_has_its_length(endpoint: Endpoint) -> None:
    """Nothing changes where the length is known."""
    head, body = old_client(endpoint.url, "/prompt", {"prompt": "Hi"})
    assert head.startswith("http/1.0 200")
    assert f"content-length: {len(body)}" in head
    assert json.loads(body)["finish_reason"] == "stop"


def test_newer_clients_keep_their_connection(endpoint: Endpoint, http: httpx.Client) -> None:
    """A response of HTTP/1.1 is uvicorn's own."""
    with http.stream("POST", "/prompt", json=REQUEST) as response:
        assert response.http_version == "HTTP/1.1"
        assert response.headers["transfer-encoding"] == "chunked"
        assert "connection" not in response.headers
