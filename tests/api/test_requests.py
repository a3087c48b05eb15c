"""Bodies, routes, methods, keys and ids of HTTP requests."""

import json
import logging
import socket
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from serve_app.api.ingress import create_app
from serve_app.protocol import prompt
from tests.api.conftest import Endpoint


def test_an_unforeseen_failure_at_the_endpoint_keeps_its_text(
    endpoint: Endpoint,
    http: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log has the id and the lines of code; neither log nor answer has the exception's text."""

    def fail(*_: Any) -> None:
        raise RuntimeError("my words")

    monkeypatch.setattr(prompt, "body", fail)
    with caplog.at_level(logging.INFO):
        response = http.post("/prompt", json={"prompt": "a"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (500, "internal_error")
    assert error["request_id"] in caplog.text
    assert "ingress.py" in caplog.text
    assert "my words" not in caplog.text + response.text


def test_what_json_does_not_have_is_an_error(
    endpoint: Endpoint, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in an answer, or a lone surrogate in a chunk, gives one error with the usual body."""
    monkeypatch.setattr(prompt, "body", lambda *_: {"token": float("nan")})
    monkeypatch.setattr(prompt, "chunks", lambda *_: [{"token": "\ud83d"}])
    response = http.post("/prompt", json={"prompt": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    (event,) = http.post("/prompt", json={"prompt": "a", "stream": True}).text.split("\n\n")[:-1]
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "internal_error"


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"nothing",
        b"\xff\xfe",
        b'{"temperature": NaN}',
        b'{"seed": ' + b"1" * 5000 + b"}",
        b"[" * 100_000,
        b"[]",
        b'"text"',
        b"",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
    ids=range(10),
)
def test_a_body_that_cannot_be_read(http: httpx.Client, content: bytes) -> None:
    """An unreadable body is a 400 in OpenAI's shape, and the next request is answered."""
    response = http.post("/v1/chat/completions", content=content)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert http.post("/prompt", json={"prompt": "Hi"}).status_code == 200


def test_a_body_over_the_limit_is_not_read(endpoint: Endpoint, http: httpx.Client) -> None:
    """413, whether the size is declared or only found out while reading."""
    endpoint.serve(api={"max_body_bytes": 2000})
    declared = http.post("/prompt", content=b" " * 2001)
    chunked = http.post("/prompt", content=(b" " * 1000 for _ in range(50)))
    fits = http.post("/prompt", content=json.dumps({"prompt": "Hi"}).encode().ljust(2000))
    for response in (declared, chunked):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
    assert fits.status_code == 200


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    """404 and 405 have the usual error body."""
    for method, path, status in (
        ("GET", "/redoc", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/prompt", 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("TRACE", "/prompt", 405),
    ):
        response = http.request(method, path)
        assert response.status_code == status, (method, path)
        assert response.json()["error"]["status"] == "VALIDATION_FAILED"
        allowed = {"/prompt": "POST", "/health": "GET, HEAD", "/v1/models/tiny": "GET, HEAD"}
        assert response.headers.get("allow") == (allowed[path] if status == 405 else None)


def test_a_path_that_is_none(http: httpx.Client) -> None:
    """`OPTIONS *` gets a 404 with the usual error body."""
    host, port = http.base_url.host, http.base_url.port or 80
    with socket.create_connection((host, port)) as connection:
        connection.sendall(b"OPTIONS * HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        with connection.makefile("rb") as received:
            head, _, body = received.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404")
    assert json.loads(body)["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", ["/health", "/ping", "/metrics", "/v1/models"])
def test_head_is_get_without_its_body(http: httpx.Client, path: str) -> None:
    """HEAD gets the status without a body, for load balancers."""
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_the_app_may_be_mounted_below_a_prefix(endpoint: Endpoint) -> None:
    """Under a route prefix every route is there, needs its key, and is named without the prefix."""
    mounted = Starlette(routes=[Mount("/mix", app=create_app(lambda: endpoint.server))])
    with TestClient(mounted) as http:
        assert http.get("/mix/v1/models").json()["data"][0]["id"] == "tiny"
        assert http.post("/mix/prompt", json={"prompt": "a"}).json()["text"] == "Hello there."
        assert http.get("/mix/ping").status_code == 200
        assert http.get("/mix/mix/ping").status_code == 404
        assert http.get("/mixed/ping").status_code == 404


def test_keys(endpoint: Endpoint, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every route but those for monitoring needs one of the keys, as a bearer token."""
    monkeypatch.setenv("API_KEYS", "first, sécond")
    endpoint.serve()
    for path in ("/health", "/ping", "/metrics"):
        assert http.get(path).status_code == 200
    for given in ("", "Bearer", "Bearer wrong", "first", "Basic first", "Bearer first, sécond"):
        response = http.get("/v1/models", headers={b"Authorization": given.encode()})
        assert response.status_code == 401, given
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for key in ("first", "sécond"):
        headers = {b"Authorization": f"bearer {key}".encode()}
        assert http.get("/v1/models", headers=headers).status_code == 200
    with endpoint.client("first") as client:
        assert client.models.list().data
    with endpoint.client("other") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_every_answer_has_an_id_of_ours(http: httpx.Client) -> None:
    """Header, error body and answer agree; a client's id is never taken for ours."""
    good = http.post("/v1/completions", json={"prompt": "a"})
    bad = http.post("/v1/completions", json={})
    given = http.post("/v1/completions", json={}, headers={"x-request-id": "mine"})
    assert good.json()["id"] == f"cmpl-{good.headers['x-request-id']}"
    assert bad.json()["error"]["request_id"] == bad.headers["x-request-id"]
    assert given.json()["error"]["request_id"] == given.headers["x-mixtral-request-id"] != "mine"
    assert len({each.headers["x-mixtral-request-id"] for each in (good, bad, given)}) == 3


def test_the_two_ids_of_a_request_are_in_the_log(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """One log line at the default level has both ids, also for the longest id that a client may
    send."""
    with caplog.at_level(logging.INFO):
        given = http.post("/prompt", json={}, headers={"x-request-id": "mine" * 32})
    ours = given.headers["x-mixtral-request-id"]
    (line,) = [record.getMessage() for record in caplog.records if ours in record.getMessage()]
    assert "minemine" in line
    assert len(line) < 300


def test_health_while_draining(endpoint: Endpoint, http: httpx.Client) -> None:
    """/health and /ping are 200 when ready and 503, still with their object, when draining."""
    assert http.get("/health").json()["status"] == "ready"
    assert http.get("/ping").status_code == 200
    endpoint.server.drain()
    health = http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    refused = http.post("/prompt", json={"prompt": "a"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
